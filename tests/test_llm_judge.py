"""The verifier that asks a model: against a server that misbehaves on command, and against vLLM."""

import functools
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lmrl_env.grading import Grader
from lmrl_env.tokenizer import model_path
from lmrl_env.types import Question
from lmrl_env.verifiers import llm_judge
from lmrl_env.verifiers.judges import JUDGE_PROMPT

ROW = Question("row/1", "How many {gold} legs?", "4")


def says(text):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Server(ThreadingHTTPServer):
    """Answers each request with the next of its replies, and the last one for ever."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = [says("CORRECT")]
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if reply == "hang":
            time.sleep(20)
        elif reply == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif reply == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            status, text = reply
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def judge(server, response="It has 4.", answer="4", **options):
    options = {"base_url": server.url, "timeout": 5.0, **options}
    return llm_judge(response, answer, question=ROW, **options)


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        ("CORRECT", "correct"),
        ("WRONG", "wrong"),
        ("INCORRECT", "wrong"),
        ("Is it CORRECT? No: WRONG.", "wrong"),
        ("First I thought WRONG, but **CORRECT**", "correct"),
        ("correct, I guess", "crash"),
        ("perhaps", "crash"),
        ("", "crash"),
    ],
)
def test_the_last_verdict_of_the_reply_counts(server, reply, status):
    server.replies = [says(reply)]
    verdict = judge(server)
    assert (verdict.status, verdict.score) == (status, float(status == "correct"))
    assert len(server.requests) == 1


def test_the_judge_is_asked_greedily_for_the_answer_behind_the_thinking(server):
    judge(server, "I wonder </think> It has 4.", ("4", "four"), model="wise", max_tokens=7)
    (path, headers, body), *rest = server.requests
    prompt = JUDGE_PROMPT.replace("{response}", "It has 4.").replace("{gold}", "4\nfour", 1)
    prompt = prompt.replace("{question}", ROW.question)
    assert not rest
    assert path == "/v1/chat/completions"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "model": "wise",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.0,
        "max_tokens": 7,
    }


def test_the_prompt_and_the_reply_are_recorded(server):
    server.replies = [says("I say WRONG")]
    verdict = judge(server, prompt="{response} is {gold}?")
    assert verdict.detail == (
        f"prompt:\nIt has 4. is 4?\n\nreply of the model at {server.url}:\nI say WRONG"
    )


def test_braces_in_a_response_are_left_alone(server):
    judge(server, "{gold} {0} {", prompt="{response}|{gold}|{other}")
    assert server.requests[0][2]["messages"][0]["content"] == "{gold} {0} {|4|{other}"


def test_a_long_response_is_cut_from_the_front(server):
    judge(server, "a" * 10**6 + "b", prompt="{response}")
    assert server.requests[0][2]["messages"][0]["content"] == "a" * 19_999 + "b"


def test_the_key_is_sent_and_not_recorded(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "hunter2")
    verdict = judge(server, key_variable="JUDGE_KEY")
    assert server.requests[0][1]["Authorization"] == "Bearer hunter2"
    assert "hunter2" not in verdict.detail
    monkeypatch.delenv("JUDGE_KEY")
    judge(server, key_variable="JUDGE_KEY")
    assert "Authorization" not in server.requests[1][1]


@pytest.mark.parametrize("failure", [(429, "busy"), (500, ""), (503, "loading"), "hang up"])
def test_a_failure_that_may_pass_is_tried_again(server, failure):
    server.replies = [failure, failure, says("CORRECT")]
    assert judge(server).status == "correct"
    assert len(server.requests) == 3


def test_garbage_is_tried_again_and_then_a_crash(server):
    for garbage in ("", "<html>", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', "null"):
        server.replies = [(200, garbage)]
        server.requests.clear()
        verdict = judge(server, retries=1)
        assert verdict.status == "crash", garbage
        assert "no reply after 2 attempts: not the reply of an OpenAI-compatible" in verdict.detail
        assert len(server.requests) == 2


def test_an_endless_reply_is_cut(server):
    server.replies = [(200, "x" * (2**20 + 2))]
    assert "more than 1048576 bytes" in judge(server, retries=0).detail


def test_a_refusal_is_a_crash_at_once_that_says_why(server):
    server.replies = [(404, "no such model")]
    verdict = judge(server)
    assert (verdict.status, len(server.requests)) == ("crash", 1)
    assert verdict.detail.endswith("HTTP Error 404: Not Found no such model")


@pytest.mark.parametrize("trouble", ["hang", "drip"])
def test_a_judge_that_does_not_answer_in_time_is_a_timeout(server, trouble):
    server.replies = [trouble]
    start = time.monotonic()
    assert judge(server, timeout=0.5).status == "timeout"
    assert time.monotonic() - start < 5


def test_a_judge_that_is_not_there_is_a_crash():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    verdict = llm_judge("4", "4", base_url=url, retries=1, timeout=5.0)
    assert verdict.status == "crash"
    assert "no reply after 2 attempts: URLError" in verdict.detail
    assert "(not given)" in verdict.detail


def test_a_grader_judges_in_its_workers(server):
    server.replies = [says("WRONG"), says("CORRECT")]
    verifier = functools.partial(llm_judge, base_url=server.url, retries=0, timeout=5.0)
    with Grader(verifier, workers=1) as grader:
        verdicts = grader.grade(["3", "4"], ["4", "4"], [ROW, ROW])
    assert [verdict.status for verdict in verdicts] == ["wrong", "correct"]


VLLM = importlib.util.find_spec("vllm") is not None or os.environ.get("CI")


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """vLLM's own server of the tiny model, which has no chat template."""
    folder = tmp_path_factory.mktemp("vllm")
    template = folder / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", model_path("tiny"), "--served-model-name", "judge"),
                *("--host", "127.0.0.1", "--port", str(port), "--chat-template", str(template)),
                *("--dtype", "float32", "--enforce-eager"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_NO_USAGE_STATS": "1",
            },
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", folder / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def wait_until_healthy(process, url, log):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"vLLM's server did not start: {log.read_text()[-3000:]}")


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="vLLM is not installed")
def test_a_real_server_of_vllm_judges(vllm_server):
    options = {"base_url": vllm_server, "model": "judge", "max_tokens": 8, "prompt": "{response}"}
    first, again = (llm_judge("2 + 2 = 4", "4", timeout=60.0, **options) for _ in range(2))
    assert first == again  # greedy
    assert first.status == "crash"  # the tiny model knows neither word
    _, _, reply = first.detail.partition(f"reply of judge at {vllm_server}:\n")
    assert reply and "no reply" not in reply
    with Grader(functools.partial(llm_judge, **options), workers=1) as grader:
        assert grader.grade(["2 + 2 = 4"], ["4"]) == [first]
    unknown = llm_judge("4", "4", **{**options, "model": "no such model"})
    assert unknown.status == "crash" and "HTTP Error 404" in unknown.detail
