"""Where the wall time of a rollout goes: engine, or environment with wrappers and verifier.

    python benchmarks/bench_rollout.py

The share is measured within each rollout of the default job, so it does not move with the
machine's load: all that is not in the engine, the reset and the collection of the batch included.
With `RecordEpisodeStatistics` around it too, in turns. The floor is the bytes of observations,
actions and masks that a rollout writes, over the measured copy rate.
"""

from __future__ import annotations

import time
from statistics import median

import click
import floor
import gymnasium as gym
import record
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from rich.progress import track

from lmrl_env import make_engine
from lmrl_env.rollout import response_seeds, rollout


@click.command()
@click.option("--prompts", default=16, show_default=True)
@click.option("--group-size", default=8, show_default=True)
@click.option("--budget", default=96, show_default=True, help="max_new_tokens")
@click.option("--rounds", default=20, show_default=True)
@click.option("--engine", "engine_name", default="local", show_default=True)
def main(prompts: int, group_size: int, budget: int, rounds: int, engine_name: str) -> None:
    """Measure the environment's share of rollouts of the tiny model in `MathR1-v0`."""
    slots = prompts * group_size
    envs = gym.make_vec(
        "MathR1-v0",
        slots,
        group_size=group_size,
        max_new_tokens=budget,
        tokens_per_step=budget,
        autoreset_mode="Disabled",
    )
    width = envs.unwrapped.prompts.width + budget
    engine = make_engine(engine_name, "tiny", max_model_len=width)
    chains = {"verifier": envs, "verifier_and_statistics": RecordEpisodeStatistics(envs)}
    shares: dict[str, list[float]] = {name: [] for name in chains}
    outside: list[float] = []
    speeds: list[float] = []
    tokens: list[int] = []
    for i in track(range(rounds + 1), description="rollouts"):
        for name, chain in chains.items():
            started = time.perf_counter()
            batch = rollout(
                chain,
                engine,
                question_ids=range(i * prompts, (i + 1) * prompts),
                seeds=response_seeds(0, i, slots),
            )
            seconds = time.perf_counter() - started
            if i == 0:  # processes start, caches fill
                continue
            shares[name].append((seconds - batch.sample_seconds) / seconds)
            outside.append(seconds - batch.sample_seconds)
            tokens.append(int(batch.mask.sum()))
            speeds.append(tokens[-1] / batch.sample_seconds)
    record.write(
        f"rollout_{engine_name}",
        {
            "responses": slots,
            "max_new_tokens": budget,
            "share_outside_engine": {name: median(each) for name, each in shares.items()},
            "share_outside_engine_max": {name: max(each) for name, each in shares.items()},
            "ms_outside_engine": 1000 * median(outside),
            "engine_tokens_per_s": median(speeds),
            "tokens": median(tokens),
            "floor": floor.of_work(
                f"{slots} rows × (2 observations of {width} int32, {budget} int32 actions, "
                f"{budget} bool and {budget} float32 of the batch), verifier left out",
                moved_bytes=slots * (2 * 4 * width + (4 + 1 + 4) * budget),
            ),
        },
    )
    engine.close()
    envs.close()


if __name__ == "__main__":
    main()
