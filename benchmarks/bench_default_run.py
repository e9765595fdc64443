"""The first command of the README, over several seeds: accuracy, time, and what it repeats.

    python benchmarks/bench_default_run.py --seeds 0,1,2

Writes `results/default_run_ENGINE.json`, and `results/default_run.png` for the local engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import record

ALGORITHM = Path(__file__).parents[1] / "algos" / "dr_grpo.py"


def train(engine: str, seed: int, folder: Path, options: list[str]) -> dict[str, object]:
    """Train from the command line, and return what the run says of itself."""
    started = time.perf_counter()
    flags = ["--env", "MathR1-v0", f"--seed={seed}", f"--engine={engine}", f"--run-dir={folder}"]
    subprocess.run([sys.executable, str(ALGORITHM), *flags, *options], check=True)
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
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(seeds: str, engine: str, options: tuple[str, ...]) -> None:
    """Run the default training once a seed; OPTIONS go to the algorithm."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            train(engine, int(seed), Path(folder) / seed, list(options))
            for seed in seeds.split(",")
        ]
        if engine == "local":
            picture = Path(folder) / seeds.split(",")[0] / "curves.png"
            (record.RESULTS / "default_run.png").write_bytes(picture.read_bytes())
    record.write(f"default_run_{engine}", {"options": list(options), "runs": runs})


if __name__ == "__main__":
    main()
