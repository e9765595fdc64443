"""One rank of several that train together: run under torchrun, by the tests and the benchmark.

    torchrun --nproc_per_node 2 tests/rank_program.py FOLDER JOBS

A job is ``NAME,DTYPE,STEPS``, with ``,sharded`` for modules that Accelerate shards, or with
``,oom`` for a last rank that runs out of memory once: what the first rank logged and the first
update's gradient go into ``FOLDER/JOB.json`` and ``FOLDER/JOB.safetensors``. The job
``fully_shard`` compares a sharded module with a whole one, for ``FOLDER/fully_shard.RANK.json``.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from random_models import VOCAB_SIZE, norm_in_float64, random_model
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lmrl_env import distributed, make_token_vector_env, run, run_setup
from lmrl_env.policy import Policy, TokenBatch, load_model
from lmrl_env.sharding import (
    full_optimizer_state,
    full_tensor,
    full_tensors,
    load_full_optimizer_state,
    load_full_tensors,
)
from lmrl_env.wrappers import OutcomeReward

ROOT = Path(__file__).parents[1]
SETTINGS = {  # without tis_cap, whose weights bring the engine's rounding into the gradient
    "env": "rank_program:Digits-v0",
    "questions": "arithmetic:size=40",
    "prompts_per_step": 4,
    "group_size": 4,
    "max_new_tokens": 16,
    "micro_batch_tokens": 200,  # of a question's 113 and its responses': several micro-batches
    "updates_per_step": 2,  # of some of which a rank of four has nothing
    "entropy_coef": 0.01,
    "eval_questions": 4,
    "eval_every": 0,
    "device": "cpu",
    "seed": 1,
}
OWN = {
    "dapo": {"overlong_cache": 8, "max_refills": 1},
    "ppo": {"gae_lambda": 0.9},
    **{name: {"kl_coef": 0.1} for name in ("grpo", "rloo", "reinforce_pp")},
}


class ShareOfDigits(OutcomeReward):
    """Pays for digits, so that untrained short responses differ in their rewards."""

    def outcome_rewards(self, ended, truncated, info):
        texts = [response or "" for response in info["response"]]
        return np.array([sum(map(str.isdigit, t)) / max(1, len(t)) - 0.1 for t in texts])


def make_envs(num_envs=1, **kwargs):
    return ShareOfDigits(make_token_vector_env(num_envs, **kwargs))


gym.register("Digits-v0", vector_entry_point=make_envs)


def launch(ranks: int, *arguments: str, timeout: float = 800, check: bool = True):
    """Run this program on a number of ranks, and return what became of it."""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, *arguments],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(done.stdout[-2000:] + done.stderr[-6000:])
    return done


def read(folder: Path, job: str) -> dict[str, Any]:
    """Return what the first rank found of a job."""
    return json.loads((folder / f"{job}.json").read_text())


OF_THE_MACHINE = ("time/", "throughput/", "policy/micro_batch_tokens")
"""Beginnings of metrics that say how, not what, was computed."""


class Gap(NamedTuple):
    """How far two runs are from each other.

    Attributes:
        steps: that both logged.
        gradient: relative difference of the first update's, by norm.
        gradient_norm: of the first run.
        metric: largest difference of a metric, of those above 1 relative.
        of: name and step of that metric.
    """

    steps: int
    gradient: float
    gradient_norm: float
    metric: float
    of: tuple[str, int]


def compare(first: tuple[Path, str], second: tuple[Path, str]) -> Gap:
    """Return how far two runs are from each other, each a folder and a job."""
    rows, others = (read(*run)["rows"] for run in (first, second))
    worst = (0.0, ("", 0))
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {n for n in row if n.startswith(OF_THE_MACHINE)}:
            value, its = row[name], other[name]
            if value is None or its is None:
                gap = 0.0 if value is its else math.inf
            else:
                gap = abs(value - its) / max(1.0, abs(value))
                gap = math.inf if math.isnan(gap) else gap
            worst = max(worst, (gap, (name, row["step"])))
    flat = []
    for folder, job in (first, second):
        gradient = load_file(folder / f"{job}.safetensors")
        flat.append(torch.cat([gradient[name].double().ravel() for name in sorted(gradient)]))
    norm = flat[0].norm().item()
    gap = (flat[0] - flat[1]).norm().item() / norm
    return Gap(rows[-1]["step"], gap, norm, *worst)


# --- training


def load_float64(*args, **kwargs):
    model = load_model(*args, **kwargs, dtype="float64")
    norm_in_float64(model)
    return model


def make_sharding_accelerator(*args, **kwargs) -> Accelerator:
    """Let Accelerate shard by FSDP2 on the CPU too, which it does on GPUs alone."""
    accelerator = distributed.make_accelerator(*args, **kwargs)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.fsdp_plugin = plugin
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    distributed.set_up_sharding(accelerator, 1.0)
    return accelerator


def train(folder: Path, job: str) -> None:
    """Train as a job says."""
    name, dtype, steps, *options = job.split(",")
    torch.set_default_dtype(getattr(torch, dtype))
    run_setup.load_model = load_float64 if dtype == "float64" else load_model
    sharding = "sharded" in options
    run.make_accelerator = make_sharding_accelerator if sharding else distributed.make_accelerator
    gradient: dict[str, torch.Tensor] = {}
    world_sizes: list[int] = []
    parts: list[bool] = []

    def clip_grad_norm(accelerator, module, max_norm):
        world_sizes.append(accelerator.num_processes)
        if len(world_sizes) == 1:
            for key, parameter in accelerator.unwrap_model(module).named_parameters():
                gradient[key] = full_tensor(parameter.grad).clone()
                parts.append(isinstance(parameter, DTensor))
        return original(accelerator, module, max_norm)

    def backward(accelerator, loss):
        whole_backward(accelerator, loss)
        if "oom" in options:
            options.remove("oom")
            if accelerator.process_index == accelerator.num_processes - 1:
                raise torch.OutOfMemoryError("made up")

    whole_backward, distributed.backward = distributed.backward, backward
    original, distributed.clip_grad_norm = distributed.clip_grad_norm, clip_grad_norm
    algorithm = importlib.import_module(f"algos.{name}")
    settings = {**SETTINGS, **OWN.get(name, {}), "steps": int(steps)}
    run_dir = folder / f"run-{job}"
    algorithm.main(algorithm.Args(**settings, run_dir=str(run_dir)))
    distributed.clip_grad_norm, distributed.backward = original, whole_backward
    if int(os.environ.get("RANK", 0)) == 0:
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        result = {"world_sizes": sorted(set(world_sizes)), "sharded": any(parts), "rows": rows}
        (folder / f"{job}.json").write_text(json.dumps(result))
        save_file(gradient, folder / f"{job}.safetensors")


# --- torch's own fully_shard


def whole_and_sharded() -> list[tuple[Policy, torch.optim.Optimizer]]:
    """Return a policy and its optimiser, whole and sharded layer by layer."""
    pairs = []
    for sharded in (False, True):
        policy = Policy(random_model("qwen2"), VOCAB_SIZE)
        for layer in (*policy.model.model.layers, policy) if sharded else ():
            fully_shard(layer)
        pairs.append((policy, torch.optim.AdamW(policy.parameters(), lr=1e-2)))
    return pairs


def add_gradients(policy: Policy, ranks: list[int], step: int) -> None:
    """Add up the gradients of some ranks' batches, as ``backward`` and FSDP2 do together."""
    for rank in ranks:
        random = torch.Generator().manual_seed(100 * step + rank)
        tokens = TokenBatch(
            prompt_ids=torch.randint(VOCAB_SIZE, (2, 5), generator=random),
            prompt_lengths=torch.tensor([5, 3]),
            prompt_index=torch.tensor([0, 0, 1]),
            response_ids=torch.randint(VOCAB_SIZE, (3, 4), generator=random),
            response_lengths=torch.tensor([4, 2, 3]),
        )
        logprobs, _ = policy(tokens, temperature=1.0)
        share = dist.get_world_size() / len(ranks)  # FSDP2 divides by the number of ranks
        (share * (rank + 1) * logprobs.sum() / 10).backward()


def compare_fully_sharded(folder: Path) -> None:
    """Write how far a sharded module's norms, weights and optimiser are from a whole one's."""
    torch.set_default_dtype(torch.float64)
    dist.is_initialized() or dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), distributed_type=None, is_main_process=rank == 0
    )
    (whole, whole_optimizer), (sharded, optimizer) = whole_and_sharded()
    result: dict[str, Any] = {"world_size": ranks, "norms": [], "differences": {}}
    for step in range(3):
        add_gradients(whole, list(range(ranks)), step)
        add_gradients(sharded, [rank], step)
        norms = [distributed.clip_grad_norm(accelerator, m, 0.5) for m in (whole, sharded)]
        clipped = [full_norm(m) for m in (whole, sharded)]
        result["norms"].append([*norms, *clipped])
        for each in (whole_optimizer, optimizer):
            each.step()
            each.zero_grad()
    differences = result["differences"]
    differences["weights"] = difference(whole.state_dict(), dict(full_tensors(sharded)))
    state = full_optimizer_state(accelerator, sharded, optimizer)
    differences["other ranks' state"] = len(state) if rank else 0
    box = [state]
    dist.broadcast_object_list(box)
    expected = full_optimizer_state(SimpleNamespace(is_main_process=True), whole, whole_optimizer)
    differences["optimizer"] = difference(expected, box[0])

    _, (other, other_optimizer) = whole_and_sharded()
    weights = {name: 0 * tensor for name, tensor in whole.state_dict().items()}
    load_full_tensors(other, weights)
    differences["weights of 0"] = difference(weights, dict(full_tensors(other)))
    load_full_tensors(other, whole.state_dict())
    load_full_optimizer_state(other, other_optimizer, box[0])
    add_gradients(whole, list(range(ranks)), 9)
    add_gradients(other, [rank], 9)
    for each in (whole_optimizer, other_optimizer):
        each.step()
    differences["after going on"] = difference(whole.state_dict(), dict(full_tensors(other)))

    alive: list[int] = []
    tensors: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in full_tensors(sharded):
        tensors.append(weakref.ref(tensor))
        alive.append(sum(ref() is not None for ref in tensors))
    result["whole tensors alive"] = max(alive)
    result["is sharded"] = sum(isinstance(p, DTensor) for p in sharded.parameters())
    (folder / f"fully_shard.{rank}.json").write_text(json.dumps(result))


def full_norm(module: torch.nn.Module) -> float:
    """Return the norm of a module's gradients, made whole first."""
    flat = [full_tensor(p.grad).ravel() for p in module.parameters()]
    return torch.cat(flat).norm().item()


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of tensors of the same names."""
    assert expected.keys() == found.keys()
    return max((expected[k] - found[k]).abs().max().item() for k in expected)


def main(folder: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    run.plot_curves = lambda *args: None
    run.Run.save = lambda *args: None
    # One group for all jobs: torchrun's store keeps the addresses of the first.
    dist.destroy_process_group = lambda: None
    for job in jobs:
        if job == "fully_shard":
            compare_fully_sharded(Path(folder))
        else:
            train(Path(folder), job)
    if dist.is_initialized():
        dist.barrier()
    # Gloo may abort while it is taken down beside modules of so many jobs; all is written by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
