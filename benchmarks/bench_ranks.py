"""Nine algorithms on 1, 2 and 4 ranks: how far gradients and metrics are from those of one rank.

    python benchmarks/bench_ranks.py

Ranks are processes on the CPU, over gloo. A metric's difference is relative where the metric is
above 1; a gradient's is that of the first update, by norm. `sharded` are modules that Accelerate
shards by FSDP2, on two ranks. Writes `results/ranks.json`.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rank_program import compare, launch, read

NAMES = ("ppo", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "lite_ppo", "reinforce_pp")
KINDS = {"float32,3": (1e-6, 1e-4), "float64,10": (1e-6, 1e-5)}
"""Number format and steps, and the differences of gradients and metrics that are accepted."""
SHARDED = [f"{name},float32,3,sharded" for name in NAMES]


def differences(alone: Path, folder: Path, ranks: int, kind: str, suffix: str) -> dict[str, Any]:
    """Return by algorithm how far a number of ranks is from one."""
    found = {}
    for name in NAMES:
        job = f"{name},{kind}"
        world_sizes = read(folder, job + suffix)["world_sizes"]
        assert world_sizes == [ranks], f"{job} ran on {world_sizes} ranks, expected {ranks}"
        gap = compare((alone, job), (folder, job + suffix))
        found[name] = {"gradient": gap.gradient, "metric": gap.metric, "of": gap.of}
    return found


def train(folder: Path, ranks: int, jobs: list[str]) -> None:
    """Train on a number of ranks what does not stand in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not (folder / f"{job}.safetensors").exists()]
    for job in missing:
        shutil.rmtree(folder / f"run-{job}", ignore_errors=True)  # cut off
    if missing:
        launch(ranks, str(folder), *missing, timeout=3600)


@click.command(help=__doc__)
@click.option("--ranks", default="2,4", show_default=True, help="numbers to compare with one")
@click.option("--runs-dir", default="runs/ranks", show_default=True, help="what stands is kept")
def main(ranks: str, runs_dir: str) -> None:
    jobs = [f"{name},{kind}" for kind in KINDS for name in NAMES]
    numbers = [int(number) for number in ranks.split(",")]
    folders = {number: Path(runs_dir, str(number)).resolve() for number in (1, *numbers)}
    with ThreadPoolExecutor() as pool:
        for begun in [
            pool.submit(train, folder, number, jobs + (SHARDED if number == 2 else []))
            for number, folder in folders.items()
        ]:
            begun.result()
    figures: dict[str, Any] = {}
    for number in numbers:
        for kind, suffix in [*((kind, "") for kind in KINDS), ("float32,3", ",sharded")]:
            if not suffix or number == 2:
                key = f"{number} ranks, {kind}{suffix}"
                figures[key] = differences(folders[1], folders[number], number, kind, suffix)
                for name, row in figures[key].items():
                    for what, limit in zip(("gradient", "metric"), KINDS[kind], strict=True):
                        assert row[what] <= limit, f"{key}: {what} of {name}: {row}"
    largest = {
        key: {what: max(row[what] for row in rows.values()) for what in ("gradient", "metric")}
        for key, rows in figures.items()
    }
    record.write("ranks", {"accepted": KINDS, "largest": largest, "all": figures})


if __name__ == "__main__":
    main()
