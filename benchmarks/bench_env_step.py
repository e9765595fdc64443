"""Tokens per second of the environment alone: the vector env against one env a slot.

    python benchmarks/bench_env_step.py

Both play the same random tokens in interleaved rounds; the ratio is of medians.
"""

from __future__ import annotations

import time
from statistics import median

import click
import gymnasium as gym
import numpy as np
import record
from rich.progress import track

import lmrl_env


def seconds_per_round(envs: gym.vector.VectorEnv, actions: np.ndarray) -> float:
    started = time.perf_counter()
    for row in actions:
        envs.step(row)
    return time.perf_counter() - started


@click.command()
@click.option("--slots", default=256, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--steps", default=40, show_default=True, help="single-token steps a round")
def main(slots: int, rounds: int, steps: int) -> None:
    """Compare `TokenVectorEnv` with `SyncVectorEnv` over `TokenEnv`."""
    env_id, budget = "MathR1-v0", 96
    ours = gym.make_vec(env_id, slots, max_new_tokens=budget)
    sync = gym.make_vec(env_id, slots, max_new_tokens=budget, vectorization_mode="sync")
    ours.reset(seed=0)
    sync.reset(seed=0)
    vocab_size = ours.single_action_space.n
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {"vector": [], "sync": []}
    for _ in track(range(rounds), description="rounds"):
        actions = random.integers(0, vocab_size, (steps, slots))
        times["sync"].append(seconds_per_round(sync, actions))
        times["vector"].append(seconds_per_round(ours, actions))
    tokens = slots * steps
    ratios = [s / v for s, v in zip(times["sync"], times["vector"], strict=True)]
    record.write(
        "env_step",
        {
            "slots": slots,
            "env_id": env_id,
            "vector_env_tokens_per_s": tokens / median(times["vector"]),
            "sync_vector_env_tokens_per_s": tokens / median(times["sync"]),
            "ratio": median(times["sync"]) / median(times["vector"]),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "version": lmrl_env.__version__,
        },
    )


if __name__ == "__main__":
    main()
