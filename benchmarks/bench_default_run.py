"""The first command of the README, over several seeds: accuracy, time, and what it repeats.

    python benchmarks/bench_default_run.py --seeds 0,1,2
    python benchmarks/bench_default_run.py --seeds 0 --beside 6f10d7d

With ``--beside`` an earlier commit of this repository does the same in turn, so that the ratio of
times does not depend on the day: 6f10d7d is the last one before the work on speed.

Writes `results/default_run_ENGINE.json`, and `results/default_run.png` for the local engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import record

ROOT = Path(__file__).parents[1]


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Yield a folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def train(
    engine: str, seed: int, folder: Path, options: list[str], root: Path = ROOT
) -> dict[str, Any]:
    """Train from the command line by the code in a root; return what the run says of itself."""
    started = time.perf_counter()
    flags = ["--env", "MathR1-v0", f"--seed={seed}", f"--engine={engine}", f"--run-dir={folder}"]
    program = [sys.executable, str(root / "algos" / "dr_grpo.py")]
    paths = [str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([*program, *flags, *options], check=True, env=environment)
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    return {
        "seed": seed,
        "seconds": seconds,
        "steps": last["step"],
        "accuracy_before": first["eval/accuracy"],
        "accuracy_after": last["eval/accuracy"],
        "eval_questions": json.loads((folder / "config.json").read_text())["eval_questions"],
        "length_correct": [first["eval/length/correct"], last["eval/length/correct"]],
        "length_incorrect": [first["eval/length/incorrect"], last["eval/length/incorrect"]],
        "truncated": [row["eval/length/truncated_fraction"] for row in (first, last)],
        "max_mismatch": max(row["mismatch/logprob_abs_mean"] for row in rows[1:]),
        "accuracy_curve": {
            row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row
        },
    }


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--engine", default="local", show_default=True)
@click.option("--beside", metavar="COMMIT", help="that trains in turn, to compare times with")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(seeds: str, engine: str, beside: str | None, options: tuple[str, ...]) -> None:
    """Run the default training once a seed; OPTIONS go to the algorithm."""
    numbers = [int(seed) for seed in seeds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        runs, others = [], []
        for seed in numbers:
            if beside is not None:
                with checked_out(beside) as root:
                    before = Path(folder) / f"{seed}-before"
                    others.append(train(engine, seed, before, [*options], root))
            runs.append(train(engine, seed, Path(folder) / str(seed), [*options]))
        if engine == "local":
            picture = Path(folder) / str(numbers[0]) / "curves.png"
            (record.RESULTS / "default_run.png").write_bytes(picture.read_bytes())
    figures: dict[str, Any] = {"options": list(options), "runs": runs}
    if beside is not None:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(others, runs, strict=True)]
        figures["beside"] = {"commit": beside, "runs": others, "ratio": median(ratios)}
    record.write(f"default_run_{engine}", figures)


if __name__ == "__main__":
    main()
