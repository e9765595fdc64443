"""Stands in for a vLLM server: the routes that the engine uses, and the faults it must survive."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeVllmServer:
    """A server that answers each request for a response with the tokens 1, 2.

    Attributes:
        log: of requests, as (path, body).
        stamp: of its weights; ``default`` after a start.
        faults: by path, functions of no argument that are called once each in the place of the
            usual answer, and return (status, answer).
        asked: released with every request for a response.
        may_answer: no response is given before it is set.
    """

    def __init__(self, port: int = 0, **settings):
        self.log: list[tuple[str, dict]] = []
        self.stamp = "default"
        self.faults: dict[str, list] = {}
        self.asked = threading.Semaphore(0)
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.settings = {
            "dtype": "torch.float32",
            "logprobs_mode": "processed_logprobs",
            "max_model_len": 320,
            "backend": "lmrl_http",
        } | settings
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({})

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body):
                try:
                    status, answer = fake.answer(self.path, body)
                    data = json.dumps(answer).encode()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self.http = Server(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: dict) -> tuple[int, dict]:
        self.log.append((path, body))
        if self.faults.get(path):
            return self.faults[path].pop(0)()
        if path == "/inference/v1/generate":
            stamp = self.stamp
            self.asked.release()
            self.may_answer.wait(10)
            return 200, response(stamp)
        if path == "/server_info?config_format=json":
            return 200, {"vllm_config": self.config()}
        if path == "/weight_info":
            return 200, {"weight_version": self.stamp}
        if path == "/update_weight_version":
            self.stamp = body["new_version"]
        return 200, {"success": True, "world_size": 2}

    def config(self) -> dict:
        model = {k: v for k, v in self.settings.items() if k != "backend"}
        backend = self.settings["backend"]
        return {
            "model_config": model,
            "weight_transfer_config": backend and {"backend": backend},
            "scheduler_config": {"max_num_seqs": 64},
        }

    def paths(self) -> list[str]:
        return [path for path, _ in self.log]

    def stop(self):
        self.may_answer.set()
        self.http.shutdown()
        self.http.server_close()


def response(stamp: str, finish_reason: str = "length", logprob: float = -0.5) -> dict:
    """Return the answer of vLLM to a request for a response."""
    content = [{"token_id": 1, "logprob": logprob}, {"token_id": 2, "logprob": -0.25}]
    choice = {
        "finish_reason": finish_reason,
        "token_ids": [1, 2],
        "weight_versions": [{"version": stamp, "start": 0, "end": 2}],
        "logprobs": {"content": content},
    }
    return {"choices": [choice]}
