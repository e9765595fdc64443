"""Tokens per second of one vLLM server, of two, and of vLLM in-process, on this machine.

    python benchmarks/bench_servers.py

Starts two servers by `lmrl serve`. The three take turns in every round, in an order that rotates,
and what is told is the median over the rounds of each round's ratio, so that a load that comes and
goes touches all alike. Two servers on one machine share its cores: that they are faster than one
is not expected here, but that the pool costs nothing is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median

import click
import record
from rich.progress import track

from lmrl_env import load_questions, make_engine
from lmrl_env.prompts import PromptTable
from lmrl_env.templates import get_template
from lmrl_env.tokenizer import load_tokenizer
from lmrl_env.types import Sampling


def start_server(port: int, max_model_len: int) -> subprocess.Popen[bytes]:
    """Start a server that leaves its threads to the system: by default each binds to core 0."""
    command = [sys.executable, "-m", "lmrl_env", "serve", "tiny", "--port", str(port)]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.Popen(
        [*command, "--max-model-len", str(max_model_len)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **environment},
    )


@click.command()
@click.option("--prompts", default=16, show_default=True)
@click.option("--group-size", default=8, show_default=True)
@click.option("--budget", default=96, show_default=True, help="max_new_tokens")
@click.option("--rounds", default=9, show_default=True)
@click.option("--port", default=8100, show_default=True, help="of the first server")
def main(prompts: int, group_size: int, budget: int, rounds: int, port: int) -> None:
    """Measure responses of the tiny model to arithmetic questions."""
    tokenizer = load_tokenizer("tiny")
    table = PromptTable(load_questions("arithmetic"), get_template("r1"), tokenizer, budget)
    width = table.width + budget
    token_ids = [table[i].tolist() for i in range(prompts)]
    sampling = Sampling(budget, stop=get_template("r1").stop)
    servers = [start_server(port + i, width) for i in range(2)]
    urls = [f"http://127.0.0.1:{port + i}" for i in range(2)]
    try:
        engines = {
            "one_server": make_engine("vllm_server", "tiny", max_model_len=width, servers=urls[0]),
            "two_servers": make_engine(
                "vllm_server", "tiny", max_model_len=width, servers=",".join(urls)
            ),
            "in_process": make_engine("vllm", "tiny", max_model_len=width),
        }
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        largest_gap, equal = 0.0, 0
        for i in track(range(rounds + 1), description="rounds"):
            seeds = range(i * prompts * group_size, (i + 1) * prompts * group_size)
            names = list(engines)
            completions = {}
            for name in names[i % 3 :] + names[: i % 3]:
                started = time.perf_counter()
                completions[name] = engines[name].generate(token_ids, sampling, group_size, seeds)
                seconds = time.perf_counter() - started
                tokens = sum(len(c.token_ids) for c in completions[name])
                speeds[name].append(tokens / seconds)
            for a, b in zip(completions["one_server"], completions["in_process"], strict=True):
                if a.token_ids.tolist() == b.token_ids.tolist():
                    equal += 1
                    largest_gap = max(largest_gap, float(abs(a.logprobs - b.logprobs).max()))
        for engine in engines.values():
            engine.close()
    finally:
        for server in servers:
            server.terminate()
            server.wait()

    def ratio(above: str, below: str) -> dict[str, float]:
        each = [a / b for a, b in zip(speeds[above][1:], speeds[below][1:], strict=True)]
        return {"median": median(each), "min": min(each), "max": max(each)}

    import vllm

    responses = prompts * group_size
    record.write(
        "servers",
        {
            "responses_a_call": responses,
            "max_new_tokens": budget,
            "rounds": rounds,
            "vllm": vllm.__version__,
            "load_average": os.getloadavg()[1],
            "tokens_per_s": {name: median(values[1:]) for name, values in speeds.items()},
            "two_servers_over_one": ratio("two_servers", "one_server"),
            "one_server_over_in_process": ratio("one_server", "in_process"),
            "two_servers_over_in_process": ratio("two_servers", "in_process"),
            "responses_equal_to_in_process": equal / (responses * (rounds + 1)),
            "largest_logprob_gap_of_equal_responses": largest_gap,
        },
    )


if __name__ == "__main__":
    main()
