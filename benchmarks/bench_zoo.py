"""Every algorithm on the tiny model: held-out accuracy and lengths after a short run.

    python benchmarks/bench_zoo.py --steps 50 --seeds 0,1,2 --jobs 2

Runs that stand whole in `--runs-dir` are not repeated. Writes `results/zoo_tiny.json` and
`results/zoo_tiny.png`, and prints the README's table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import record
from matplotlib.figure import Figure
from rich.progress import track

ALGOS = Path(__file__).parents[1] / "algos"
NAMES = ("ppo", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "lite_ppo", "reinforce_pp")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(name: str, seed: int, steps: int, folder: Path) -> None:
    """Train from the command line, with one thread, unless that was done before."""
    if any(row["step"] == steps for row in read_rows(folder)):
        return
    flags = [f"--seed={seed}", f"--steps={steps}", "--eval-every=0", "--checkpoint-every=0"]
    going_on = [f"--resume={folder}"] if folder.exists() else [f"--run-dir={folder}"]
    subprocess.run(
        [sys.executable, str(ALGOS / f"{name}.py"), *flags, *going_on],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def summary(folder: Path) -> dict[str, Any]:
    rows = read_rows(folder)
    config = json.loads((folder / "config.json").read_text())
    first, last = rows[0], rows[-1]
    return {
        "seed": config["seed"],
        "commit": config["commit"],
        "accuracy": [first["eval/accuracy"], last["eval/accuracy"]],
        "length_correct": [first["eval/length/correct"], last["eval/length/correct"]],
        "length_incorrect": [first["eval/length/incorrect"], last["eval/length/incorrect"]],
        "truncated": [row["eval/length/truncated_fraction"] for row in (first, last)],
        "zero_variance_groups": last["reward/zero_variance_groups"],
        "rollouts_per_step": float(np.mean([r.get("sampling/rollouts", 1) for r in rows[1:]])),
        "reward": [row["reward/accuracy"] for row in rows[1:]],
    }


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the share of right training responses, before any filter, mean and range of seeds."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle("Share of right responses while training the tiny model (mean of 5 steps)")
    panels = figure.subplots(3, 3, sharex=True, sharey=True).flat
    reference = np.mean([moving_mean(run["reward"]) for run in runs["dr_grpo"]], axis=0)
    for axes, (name, seeds) in zip(panels, runs.items(), strict=True):
        curves = np.array([moving_mean(run["reward"]) for run in seeds])
        steps = np.arange(5, 5 + curves.shape[1])
        axes.plot(steps, reference, color="0.6", linestyle="--", label="dr_grpo")
        axes.plot(steps, curves.mean(axis=0), color="C0", label=name)
        axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color="C0", alpha=0.25)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    figure.supxlabel("step (dashed: dr_grpo)")
    figure.savefig(path, dpi=120)


def moving_mean(values: list[float]) -> np.ndarray:
    return np.convolve(values, np.full(5, 0.2), mode="valid")


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the README's table: means over the seeds, with the range of the accuracy."""
    lines = ["| | held-out accuracy | right | wrong | truncated |", "|---|---|---|---|---|"]
    for name, seeds in runs.items():
        before, after = np.array([run["accuracy"] for run in seeds]).T
        cells = [
            f"{before.mean():.1%} → {after.mean():.1%} ({after.min():.1%} to {after.max():.1%})"
        ]
        for key in ("length_correct", "length_incorrect"):
            first, last = np.array([run[key] for run in seeds]).mean(axis=0)
            cells.append(f"{first:.1f} → {last:.1f}")
        cells.append(f"{np.mean([run['truncated'][1] for run in seeds]):.1%}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--steps", default=50, show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Runs at one time, a thread each.")
@click.option("--runs-dir", default="runs/zoo", show_default=True, type=Path)
def main(steps: int, seeds: str, jobs: int, runs_dir: Path) -> None:
    """Train all nine algorithms at their default settings."""
    work = [(name, int(seed)) for seed in seeds.split(",") for name in NAMES]
    folders = {job: runs_dir / f"{job[0]}-s{job[1]}" for job in work}
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda job: train(*job, steps, folders[job]), work)
        for _ in track(done, description="training", total=len(work)):
            pass
    runs = {
        name: [summary(folder) for (own, _), folder in folders.items() if own == name]
        for name in NAMES
    }
    plot(runs, record.RESULTS / "zoo_tiny.png")
    record.write("zoo_tiny", {"steps": steps, "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    main()
