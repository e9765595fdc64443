"""How long the engines take to get new weights.

    python benchmarks/bench_weight_sync.py

A float32 model's state dict goes to every kind of engine that runs here, in turns: to the local
engine that shares the trainer's module, which compares names and copies nothing; to one with a
copy of its own; and to vLLM in this process. With `--server`, which takes half a minute more to
start, also over HTTP to a vLLM server here. The models are the tiny one and a random one of 71
million parameters. The floor is a copy of the weights at the measured rate.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import floor
import record
import torch
from bench_servers import start_server
from rich.progress import track
from transformers import AutoModelForCausalLM, LlamaConfig

from lmrl_env import make_engine
from lmrl_env.policy import load_model
from lmrl_env.tokenizer import TINY_MODEL, load_tokenizer

WIDTH = 512
"""Tokens of a prompt and its response: what engines make room for."""


def random_model(folder: Path) -> None:
    """Write a random model of 71 million parameters that reads the tiny model's tokens."""
    tokenizer = load_tokenizer("tiny")
    config = LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=10,
        num_attention_heads=12, max_position_embeddings=2 * WIDTH, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_ids[0], pad_token_id=tokenizer.eos_token_ids[0],
        bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in TINY_MODEL.glob("*token*"):
        shutil.copy(path, folder)


def makers(name: str, model: Any, server: str | None) -> dict[str, Callable[[], Any]]:
    """Return what starts each kind of engine that can run here."""
    kinds: dict[str, Callable[[], Any]] = {
        "local": lambda: make_engine("local", name, max_model_len=WIDTH, module=model),
        "local_own_copy": lambda: make_engine("local", name, max_model_len=WIDTH, device="cpu"),
    }
    if importlib.util.find_spec("vllm") is not None:
        kinds["vllm"] = lambda: make_engine("vllm", name, max_model_len=WIDTH)
    if server is not None:
        kinds["lmrl_http"] = lambda: make_engine(
            "vllm_server", name, max_model_len=WIDTH, servers=server
        )
    return kinds


def measure(name: str, rounds: int, server: str | None) -> dict[str, Any]:
    """Return the figures of a model."""
    model = load_model(name)
    weights = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    distinct = {tensor.data_ptr(): tensor for tensor in weights.values()}
    nbytes = sum(tensor.nbytes for tensor in distinct.values())
    engines, start = {}, {}
    for kind, make in makers(name, model, server).items():
        started = time.perf_counter()
        engines[kind] = make()
        start[kind] = time.perf_counter() - started
    seconds: dict[str, list[float]] = {kind: [] for kind in engines}
    for i in track(range(rounds + 1), description=f"{nbytes / 2**20:.0f} MiB"):
        for kind, engine in engines.items():
            started = time.perf_counter()
            engine.update_weights(weights.items(), i + 1)
            seconds[kind].append(time.perf_counter() - started)
    for engine in engines.values():
        engine.close()
    least = floor.of_work("the weights, read and written once", moved_bytes=2 * nbytes)
    typical = {kind: median(each[1:]) for kind, each in seconds.items()}
    return {
        "parameters": sum(tensor.numel() for tensor in distinct.values()),
        "weight_bytes": nbytes,
        "start_seconds": start,
        "first_update_seconds": {kind: each[0] for kind, each in seconds.items()},
        "update_seconds": typical,
        "weight_bytes_per_s": {kind: nbytes / s for kind, s in typical.items() if kind != "local"},
        "floor": least,
        "times_the_floor": {kind: s / least["seconds"] for kind, s in typical.items()},
    }


def default_step_seconds() -> float:
    """Return the seconds of a step of the default job, evaluation included, as recorded last."""
    path = record.RESULTS / "default_run_local.json"
    run = json.loads(path.read_text())["figures"]["runs"][0]
    return float(run["seconds"] / run["steps"])


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--server/--no-server", default=False, help="also over HTTP to a vLLM server")
@click.option("--port", default=8120, show_default=True, help="of that server")
def main(rounds: int, server: bool, port: int) -> None:
    """Measure weight updates of a tiny model and one of 71 million parameters."""
    step_seconds = default_step_seconds()
    process = start_server(port, WIDTH) if server else None
    url = f"http://127.0.0.1:{port}" if server else None
    figures: dict[str, Any] = {"default_step_seconds": step_seconds}
    try:
        figures["tiny"] = measure("tiny", rounds, url)
    finally:
        if process is not None:
            process.terminate()
            process.wait(60)
    figures["share_of_a_default_step"] = {
        kind: seconds / step_seconds for kind, seconds in figures["tiny"]["update_seconds"].items()
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        random_model(Path(folder))
        figures["71M"] = measure(folder, rounds, None)
    record.write("weight_sync", figures)


if __name__ == "__main__":
    main()
