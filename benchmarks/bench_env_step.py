"""Tokens per second of the environment alone: the vector env against one env a slot.

    python benchmarks/bench_env_step.py

All play the same random tokens in interleaved rounds, episodes that end and start again included;
a ratio is the median over the rounds of that within a round. `views` returns observations without
copies (`copy=False`), `copies` returns copies, as Gymnasium does by default, and `sync` is
Gymnasium's `SyncVectorEnv` of `TokenEnv`. `bare` pays nothing; each wrapper on it is named by what
it adds. The floor is the bytes that a step without an end touches over the measured copy rate.
"""

from __future__ import annotations

import time
from statistics import median

import click
import floor
import gymnasium as gym
import numpy as np
import record
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from rich.progress import track

import lmrl_env
from lmrl_env import make_token_vector_env
from lmrl_env.wrappers import FormatReward, VerifierReward

SLOT_BYTES = 2 * 8 + 4 + 1 + 3 * 8 + 1 + 8 + 2
"""Touched for a slot: the action read twice (range, token), token, mask and is-action written,
lengths read and written, the prompt's length, whether it is done, its reward, its two flags."""


def seconds_per_round(envs: gym.vector.VectorEnv, actions: np.ndarray) -> list[float]:
    """Return the seconds of each step."""
    seconds = []
    for row in actions:
        started = time.perf_counter()
        envs.step(row)
        seconds.append(time.perf_counter() - started)
    return seconds


def make_all(env_id: str, slots: int, budget: int) -> dict[str, gym.vector.VectorEnv]:
    """Return the environments that take turns."""

    def bare() -> gym.vector.VectorEnv:
        return make_token_vector_env(slots, max_new_tokens=budget, copy=False)

    verifier = "lmrl_env.verifiers:answer_tag_math"
    return {
        "sync": gym.make_vec(env_id, slots, max_new_tokens=budget, vectorization_mode="sync"),
        "copies": gym.make_vec(env_id, slots, max_new_tokens=budget),
        "views": gym.make_vec(env_id, slots, max_new_tokens=budget, copy=False),
        "bare": bare(),
        "RecordEpisodeStatistics": RecordEpisodeStatistics(bare()),
        "VerifierReward": VerifierReward(bare(), verifier),
        "FormatReward": FormatReward(bare()),
    }


@click.command()
@click.option("--slots", default=1024, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--steps", default=40, show_default=True, help="single-token steps a round")
def main(slots: int, rounds: int, steps: int) -> None:
    """Compare `TokenVectorEnv` with `SyncVectorEnv` over `TokenEnv`."""
    env_id, budget = "MathR1-v0", 96
    envs = make_all(env_id, slots, budget)
    for one in envs.values():
        one.reset(seed=0)
    vocab_size = envs["views"].single_action_space.n
    random = np.random.default_rng(0)
    times: dict[str, list[list[float]]] = {name: [] for name in envs}
    for _ in track(range(rounds), description="rounds"):
        actions = random.integers(0, vocab_size, (steps, slots))
        for name, one in envs.items():
            times[name].append(seconds_per_round(one, actions))
    for one in envs.values():
        one.close()

    def ratio(slow: str, fast: str) -> dict[str, float]:
        each = [sum(s) / sum(f) for s, f in zip(times[slow], times[fast], strict=True)]
        return {"median": median(each), "min": min(each), "max": max(each)}

    # A step in the middle of the distribution has few ends or none.
    typical = {name: median(np.concatenate(seconds).tolist()) for name, seconds in times.items()}
    least = floor.of_work(
        f"{slots} slots × {SLOT_BYTES} bytes of a one-token step, no observation copied",
        moved_bytes=slots * SLOT_BYTES,
    )
    record.write(
        "env_step",
        {
            "slots": slots,
            "env_id": env_id,
            "tokens_per_s": {
                name: slots * steps / median(map(sum, seconds)) for name, seconds in times.items()
            },
            "views_over_sync": ratio("sync", "views"),
            "copies_over_sync": ratio("sync", "copies"),
            "views_over_copies": ratio("copies", "views"),
            "cost_of_wrapper": {
                name: ratio(name, "bare")["median"] - 1
                for name in ("RecordEpisodeStatistics", "VerifierReward", "FormatReward")
            },
            "median_step_us": {name: 1e6 * seconds for name, seconds in typical.items()},
            "floor": least,
            "median_step_over_floor": typical["views"] / least["seconds"],
            "version": lmrl_env.__version__,
        },
    )


if __name__ == "__main__":
    main()
