"""Where the wall time of a rollout goes: engine, or environment with wrappers and verifier.

    python benchmarks/bench_rollout.py

The share is measured within each rollout of the default job, so it does not move with the
machine's load.
"""

from __future__ import annotations

from statistics import median

import click
import gymnasium as gym
import record
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
    batches = [
        rollout(
            envs,
            engine,
            question_ids=range(i * prompts, (i + 1) * prompts),
            seeds=response_seeds(0, i, slots),
        )
        for i in track(range(rounds + 1), description="rollouts")
    ][1:]
    shares = [b.env_seconds / (b.env_seconds + b.sample_seconds) for b in batches]
    tokens = [int(b.mask.sum()) for b in batches]
    record.write(
        f"rollout_{engine_name}",
        {
            "responses": slots,
            "max_new_tokens": budget,
            "env_and_verifier_share": median(shares),
            "env_and_verifier_share_max": max(shares),
            "env_and_verifier_ms": 1000 * median(b.env_seconds for b in batches),
            "engine_tokens_per_s": median(
                n / b.sample_seconds for n, b in zip(tokens, batches, strict=True)
            ),
            "tokens": median(tokens),
        },
    )
    engine.close()
    envs.close()


if __name__ == "__main__":
    main()
