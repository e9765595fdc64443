"""Gradings per second against Math-Verify in one process, and the overhead on a training step.

    python benchmarks/bench_verifier.py

Both judge the same responses in interleaved rounds: a solution of some hundred words that ends in
a box, whose answer is right, wrong or a near miss (the mathematical cases of
`tests/verifier_cases.jsonl`, and whole numbers, which are the larger part of the usual sets), and
some without an answer. Math-Verify is called as its documentation says, with its own time limits.

Where other jobs share the machine, two workers get more of it than one process: the processor time
that each needs for a response tells how much of the ratio that is.

The overhead is the share of a training step of the default job, the grading apart, that the run
waits for verdicts: graded after the sampling, and with `--rollout-parts 4` beside it. It is a ratio
within a step, so that it moves little with the machine's load. The verifier is the usual one, or
one that takes 20 ms of processor time for every response.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import record
from math_verify import parse, verify
from rich.progress import track

from lmrl_env.grading import Grader
from lmrl_env.verifiers import math_equal

CASES = Path(__file__).parents[1] / "tests" / "verifier_cases.jsonl"
STEPS = (
    "Let us call the number of apples $x$ and the number of pears $y$. ",
    "We are told that $x + y = 17$, and that twice the pears are three more than the apples. ",
    r"So $2y = x + 3$, which gives $y = \frac{x + 3}{2}$ when both sides are divided by 2. ",
    "Let me check that again: the sum on the left must be equal to the sum on the right. ",
    r"Substituting, \[x + \frac{x + 3}{2} = 17,\] hence $3x = 31$ and $x = \frac{31}{3}$. ",
    "That is not a whole number, so there must be a mistake somewhere above. ",
    r"The area is $\pi r^2 = 9\pi$ square units, and the circumference is $6\pi$ units. ",
    "Wait, the second condition says at least, not exactly, so we have an inequality. ",
    r"By the quadratic formula, $n = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}$ with $a = 1$. ",
)


def mathematical_cases() -> list[dict[str, str]]:
    """Return the labelled cases of two answers, without the known disagreements."""
    cases = map(json.loads, CASES.read_text().splitlines())
    return [case for case in cases if "verifier" not in case and "disagrees" not in case]


def realistic_responses(count: int, seed: int) -> list[tuple[str, str]]:
    """Return responses with the gold answers that they are judged by."""
    draw = random.Random(seed)
    cases = [case for case in mathematical_cases() if case["prediction"]]
    pairs = []
    for _ in range(count):
        solution = "".join(draw.choices(STEPS, k=draw.randint(4, 14)))
        kind = draw.random()
        if kind < 0.1:
            pairs.append((solution, str(draw.randint(1, 999))))
            continue
        if kind < 0.6:
            gold = str(draw.randint(1, 999))
            answer = draw.choice([gold, str(draw.randint(1, 999))])
        else:
            case = draw.choice(cases)
            answer, gold = case["prediction"], case["gold"]
        pairs.append((rf"{solution}Therefore the answer is $\boxed{{{answer}}}$.", gold))
    return pairs


def math_verify_says(response: str, gold: str) -> bool:
    return verify(parse(f"${gold}$"), parse(response))


def worker_seconds(grader: Grader) -> float:
    """Return the processor time of a grader's workers so far."""
    stats = (Path(f"/proc/{worker._process.pid}/stat").read_text() for worker in grader._pool)
    fields = [stat.rpartition(")")[2].split() for stat in stats]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def overhead_on_a_step(env: str, parts: int, steps: int) -> dict[str, float]:
    """Train for some steps, and return how long they wait for verdicts, as a share of the rest."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, here.parent / "algos" / "dr_grpo.py", "--env", env),
                *("--rollout-parts", str(parts), "--steps", str(steps + 1), "--eval-every", "0"),
                *("--eval-questions", "2"),
                *("--run-dir", f"{folder}/run"),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(here), *sys.path))},
            check=True,
            capture_output=True,
        )
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] > 1]  # the first one warms up
    shares = [
        row["time/verify"] / (row["throughput/step_seconds"] - row["time/verify"]) for row in rows
    ]
    return {"median": median(shares), "max": max(shares)}


@click.command()
@click.option("--responses", default=600, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--steps", default=5, show_default=True, help="of training, of each kind")
def main(responses: int, rounds: int, workers: int, steps: int) -> None:
    """Compare the speed and the agreement with the labels."""
    times: dict[str, list[float]] = {"grader": [], "math_verify": []}
    processor: dict[str, list[float]] = {"grader": [], "math_verify": []}
    with Grader("boxed_math", workers=workers) as grader:
        warm_up = realistic_responses(50, seed=1)
        grader.grade(*zip(*warm_up, strict=True))
        for pair in warm_up:
            math_verify_says(*pair)
        for i in track(range(rounds), description="rounds"):
            pairs = realistic_responses(responses, seed=2 + i)  # no cache knows them yet
            started, used = time.perf_counter(), time.process_time()
            for pair in pairs:
                math_verify_says(*pair)
            times["math_verify"].append(time.perf_counter() - started)
            processor["math_verify"].append(time.process_time() - used)
            started, used = time.perf_counter(), time.process_time() + worker_seconds(grader)
            grader.grade(*zip(*pairs, strict=True))
            times["grader"].append(time.perf_counter() - started)
            processor["grader"].append(time.process_time() + worker_seconds(grader) - used)
    cases = mathematical_cases()
    labels = [case["label"] == "correct" for case in cases]
    wrong: dict[str, dict[str, int]] = {}
    for name, says in (
        ("grader", lambda p, g: math_equal(p, g)),
        ("math_verify", lambda p, g: math_verify_says(rf"$\boxed{{{p}}}$", g)),
    ):
        said = [says(case["prediction"], case["gold"]) for case in cases]
        wrong[name] = {
            "false_correct": sum(s and not t for s, t in zip(said, labels, strict=True)),
            "false_wrong": sum(t and not s for s, t in zip(said, labels, strict=True)),
        }
    overheads = {
        f"{name}, {how}": overhead_on_a_step(env, parts, steps)
        for name, env in (("usual verifier", "MathR1-v0"), ("20 ms", "slow_verifier:SlowMath-v0"))
        for how, parts in (("after sampling", 1), ("beside sampling", 4))
    }
    ratios = [m / g for m, g in zip(times["math_verify"], times["grader"], strict=True)]
    record.write(
        "verifier",
        {
            "responses": responses,
            "rounds": rounds,
            "workers": workers,
            "grader_per_s": responses / median(times["grader"]),
            "math_verify_per_s": responses / median(times["math_verify"]),
            "ratio": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "processor_ms_each": {k: 1000 * median(v) / responses for k, v in processor.items()},
            "load": os.getloadavg()[1],
            "overhead_on_a_training_step": overheads,
            "labelled_cases": len(cases),
            "right_labels": sum(labels),
            "disagreements": wrong,
        },
    )


if __name__ == "__main__":
    main()
