"""What a step costs over response length, group size, number of slots and number of ranks.

    python benchmarks/bench_scaling.py

Sampling: the local engine and a random model of the tiny one's shape that hardly ever ends a
response, sizes in turn within each round. Ranks: whole steps of the default job, sampling,
training and all, with one thread a rank. Costs grow linearly where the fitted line has no curve to
hide: the largest distance of a point from it is reported. Training's own sweeps are
`bench_train_step`'s.

Writes `results/scaling.json` and `results/scaling.png`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import click
import matplotlib
import numpy as np
import record
import torch
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from lmrl_env.attention import use_attention
from lmrl_env.engines.local import LocalEngine
from lmrl_env.linear import use_onednn
from lmrl_env.tokenizer import load_tokenizer, model_path
from lmrl_env.types import Sampling

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ALGORITHM = Path(__file__).parents[1] / "algos" / "dr_grpo.py"
PROMPT_TOKENS = 150
DEFAULT = {"questions": 16, "group_size": 8, "budget": 48}
SWEEPS = {
    "response tokens": [{**DEFAULT, "budget": b} for b in (24, 48, 96, 144, 192)],
    "group size": [{**DEFAULT, "group_size": g} for g in (4, 8, 16, 24, 32)],
    "questions": [{**DEFAULT, "questions": q} for q in (4, 8, 16, 24, 32)],
}
COORDINATE = {"response tokens": "budget", "group size": "group_size", "questions": "questions"}


def endless_engine() -> LocalEngine:
    """Return an engine over a random model; EOS is as rare as any other of 480 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(model_path("tiny"))
    config.initializer_range = 0.02
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[list(load_tokenizer("tiny").eos_token_ids)] = 0.0
    use_attention(model, "packed")
    use_onednn(model)
    return LocalEngine(model, load_tokenizer("tiny"))


def sampler(engine: LocalEngine, questions: int, group_size: int, budget: int) -> Callable[[], int]:
    """Return a rollout of one size, which returns how many tokens it sampled."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 400, (questions, PROMPT_TOKENS)).tolist()
    seeds = list(range(questions * group_size))

    def sample() -> int:
        completions = engine.generate(prompts, Sampling(budget), group_size, seeds)
        return sum(len(completion.token_ids) for completion in completions)

    return sample


def sweep(
    engine: LocalEngine, sizes: list[dict[str, int]], key: str, rounds: int
) -> dict[str, Any]:
    """Return seconds of sampling by size, sizes in turn, and how linear they are."""
    rollouts = [sampler(engine, **size) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    for turn in range(rounds + 1):
        for size, rollout in enumerate(rollouts):
            started = time.perf_counter()
            rollout()
            if turn:
                seconds[size].append(time.perf_counter() - started)
    return linearity([size[key] for size in sizes], [median(times) for times in seconds])


def linearity(x: list[int], y: list[float]) -> dict[str, Any]:
    """Return points, the line fitted to them, and the largest distance from it.

    >>> linearity([1, 2, 3], [1.0, 2.0, 3.0])["largest_distance"]
    0.0
    """
    slope, start = np.polyfit(x, y, 1)
    apart = np.abs(np.array(y) / (start + slope * np.array(x)) - 1)
    return {
        "x": x,
        "seconds": y,
        "slope": float(slope),
        "start": float(start),
        "largest_distance": round(float(apart.max()), 6),
    }


def seconds_a_step(ranks: int, steps: int) -> float:
    """Return the median seconds of a step of the default job on so many ranks, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        subprocess.run(
            [sys.executable, *(launcher if ranks > 1 else []), str(ALGORITHM), f"--steps={steps}",
             "--eval-every=0", "--eval-questions=16", "--checkpoint-every=0", "--device=cpu",
             f"--run-dir={folder}/run"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return median(row["throughput/step_seconds"] for row in rows[2:])


def draw(sweeps: Mapping[str, Mapping[str, Any]], ranks: Mapping[int, float]) -> None:
    figure, panels = plt.subplots(1, 4, figsize=(15, 3.6), constrained_layout=True)
    for axes, (name, line) in zip(panels, sweeps.items(), strict=False):
        x = np.array([0, max(line["x"])])
        axes.plot(line["x"], line["seconds"], "o")
        axes.plot(x, line["start"] + line["slope"] * x, "--", color="grey", lw=1)
        axes.set(xlabel=name, ylabel="seconds of sampling", xlim=(0, None), ylim=(0, None))
    counts = np.array(list(ranks))
    panels[3].plot(counts, list(ranks.values()), "o", label="measured")
    panels[3].plot(counts, ranks[1] / counts, "--", color="grey", lw=1, label="1 / ranks")
    panels[3].set(xlabel="ranks, one thread each", ylabel="seconds a step", ylim=(0, None))
    panels[3].set_xticks(counts)
    panels[3].legend()
    figure.savefig(record.RESULTS / "scaling.png", dpi=120)


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=8, show_default=True, help="of the default job, for each count")
@click.option("--ranks", default="1,2", show_default=True, help="at most as many as cores")
def main(rounds: int, steps: int, ranks: str) -> None:
    """Measure how a step's cost grows."""
    engine = endless_engine()
    sweeps = {
        name: sweep(engine, sizes, COORDINATE[name], rounds)
        for name, sizes in track(SWEEPS.items(), description="sampling")
    }
    counts = [int(count) for count in ranks.split(",")]
    by_rank = {n: seconds_a_step(n, steps) for n in track(counts, description="ranks")}
    draw(sweeps, by_rank)
    speedup = {n: by_rank[1] / seconds for n, seconds in by_rank.items()}
    record.write("scaling", {"sampling": sweeps, "seconds_by_ranks": by_rank, "speedup": speedup})


if __name__ == "__main__":
    main()
