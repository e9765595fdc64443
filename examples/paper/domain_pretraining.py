"""Domain pretraining and the ceiling of RL (section 3.4, Fig. 8).

Continued pretraining on mathematics, and more so on question-answer text, raises what
reinforcement learning reaches from a plain base; GRPO then shows a "double increase" of accuracy
and length that Dr. GRPO does not. The tiny plain base is the diet ``text``; it goes on with lists
of sums (``+ sums``) or with questions and their solutions (``+ QA``), then both algorithms train.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bases import (
    PAPER_RECIPE,
    Holds,
    Task,
    base_models,
    example,
    holds,
    percent,
    run_all,
    write_heldout,
)
from claim import (
    ROOT,
    Job,
    Options,
    Verdict,
    algorithm,
    claim_options,
    curves,
    draw,
    interval,
    train,
    write,
)
from matplotlib.figure import Figure

TEXTS = {"+ sums": "sums", "+ QA": "qa"}
DOCUMENTS = {"sums": 5000, "qa": 10000}
"""About as many tokens of each."""
TINY_TRAINING = (
    "--epochs=1", "--sequence-length=256", "--batch-size=8",
    "--micro-batch-size=8", "--lr=5e-4", "--schedule=cosine", "--warmup-steps=20",
    "--checkpoint-every=0",
)  # fmt: skip
PAPER_TRAINING = ("--epochs=2", "--lr=1e-5", "--dtype=bfloat16")
PAPER_TEXTS = {
    "Llama-3.2-3B": ("meta-llama/Llama-3.2-3B", None, ""),
    "+ FineMath": ("HuggingFaceTB/FineMath-Llama-3B", None, ""),
    "+ NuminaQA": (
        "HuggingFaceTB/FineMath-Llama-3B", "AI-MO/NuminaMath-1.5", "--columns=problem,solution"
    ),
}  # fmt: skip
"""Base model, text that its pretraining goes on with, and columns of that."""
TINY_RUN: Mapping[str, Any] = {
    "steps": 60, "prompts_per_step": 8, "group_size": 8, "eval_every": 20, "eval_questions": 256,
    "checkpoint_every": 0, "max_new_tokens": 96,
}  # fmt: skip
ALGORITHMS = {"dr_grpo": "C0", "grpo": "C3"}
NO_TEMPLATE = "dr_grpo, no template"
"""The tiny runs that tell a forgotten template from a lost ability."""
STYLES = ("C7", "C1", "C2", "C4")


def write_text(folder: Path, kind: str, seed: int) -> Path:
    """Write documents to go on with: lists of sums, or questions with their solutions."""
    path = folder / f"{kind}-{seed}.jsonl"
    if not path.exists():
        pretrain = example("pretrain_tiny")
        formats = {"sums": 1.0} if kind == "sums" else {"none": 1.0}
        diet = pretrain.Diet(formats, pretrain.NONE, 1)
        stream = pretrain.documents(1000 + seed, diet)
        few = itertools.islice(
            stream, pretrain.FIRST_DOCUMENTS, pretrain.FIRST_DOCUMENTS + DOCUMENTS[kind]
        )
        lines = [json.dumps({"text": d.prompt + d.completion}) + "\n" for d in few]
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    return path


def continued(options: Options) -> dict[str, list[str]]:
    """Return the base models by name, one a seed, after training those that are not there."""
    program = str(ROOT / "examples" / "continue_pretrain.py")
    models: dict[str, list[str]] = {}
    tasks: list[Task] = []
    folder = options.runs_dir / "models"
    if not options.is_tiny:
        for name, (base, text, columns) in PAPER_TEXTS.items():
            out = folder / "numina-qa"
            models[name] = [base if text is None else str(out)] * options.seeds
            if text is not None:
                flags = [f"--model={base}", f"--text={text}", columns, f"--out={out}"]
                tasks.append(Task(name, [program, *flags, *PAPER_TRAINING], out))
        run_all(options, tasks)
        return models
    models["plain"] = base_models(options, ["text"])["text"]
    for name, kind in TEXTS.items():
        models[name] = []
        for seed, base in enumerate(models["plain"], start=1):
            out = folder / f"text-{seed}-{kind}"
            documents = write_text(options.runs_dir / "texts", kind, seed)
            flags = [f"--model={base}", f"--text={documents}", f"--out={out}", f"--seed={seed}"]
            tasks.append(Task(out.name, [program, *flags, *TINY_TRAINING], out))
            models[name].append(str(out))
    run_all(options, tasks)
    return models


def jobs(options: Options, models: Mapping[str, Sequence[str]]) -> dict[tuple[str, str, int], Job]:
    """Return the training runs by base model, algorithm and seed."""
    flags: dict[str, Any] = {"env": "MathR1-v0"}
    if options.is_tiny:
        flags |= {
            **TINY_RUN,
            "questions": "arithmetic:level=1",
            "eval_set": str(write_heldout(options, 1)),
        }
    else:
        flags |= {**PAPER_RECIPE, "steps": 700, "questions": "math-12k", "eval_set": "math500"}
    if options.questions:
        flags["questions"] = options.questions
    kinds = {program: (program, flags) for program in ALGORITHMS}
    if options.is_tiny:
        kinds[NO_TEMPLATE] = ("dr_grpo", {**flags, "env": "MathPlain-v0"})
    return {
        (name, kind, seed): Job(
            f"domain-{options.scale}-{name}-{kind}-{seed}".replace("+ ", "")
            .replace(", ", "-")
            .replace(" ", "-"),
            algorithm(program),
            {**own, "model": model, "seed": seed},
        )
        for name, seeds in models.items()
        for kind, (program, own) in kinds.items()
        for seed, model in enumerate(seeds, start=1)
    }


def measure(folders: Mapping[tuple[str, str, int], Path]) -> dict[str, dict[str, Any]]:
    """Return accuracy and lengths by base model and algorithm, at start and end."""
    table: dict[str, dict[str, Any]] = {}
    keys = {"accuracy": "eval/accuracy", "length": "eval/length/mean"}
    for name, program in dict.fromkeys(key[:2] for key in folders):
        runs = [path for key, path in folders.items() if key[:2] == (name, program)]
        row: dict[str, Any] = {}
        for label, key in keys.items():
            steps, values = curves(runs, key)
            row |= {
                "steps": steps.tolist(),
                label: values.tolist(),
                f"{label}_start": interval(values[:, 0].tolist()),
                f"{label}_end": interval(values[:, -1].tolist()),
                f"{label}_gain": interval((values[:, -1] - values[:, 0]).tolist()),
            }
        table.setdefault(name, {})[program] = row
    return table


def conclude(table: Mapping[str, Mapping[str, Any]]) -> tuple[str, Holds, str]:
    """Return what was measured, the verdict and its reason."""
    first, *others = table
    ends = {name: of["dr_grpo"]["accuracy_end"].mean for name, of in table.items()}
    measured = "Dr. GRPO: " + ", ".join(
        f"{name} {of['dr_grpo']['accuracy_start'].mean:.1%} to {ends[name]:.1%}"
        for name, of in table.items()
    )
    measured += ". Mean length: " + ", ".join(
        f"{name} {of['dr_grpo']['length_start'].mean:.0f} to {of['dr_grpo']['length_end'].mean:.0f}"
        f" (Dr. GRPO), to {of['grpo']['length_end'].mean:.0f} (GRPO)"
        for name, of in table.items()
    )
    last = table[others[-1]]
    checks = [
        all(ends[name] > ends[first] for name in others),
        ends[others[-1]] == max(ends.values()),
        last["grpo"]["length_end"].mean > last["dr_grpo"]["length_end"].mean,
    ]
    words = ("no", "yes")
    reason = (
        "Every kind of further text raises the end: "
        f"{words[checks[0]]}. Question-answer text raises it most: {words[checks[1]]}. GRPO ends "
        f"longer than Dr. GRPO on that base: {words[checks[2]]}."
    )
    return measured, holds(checks), reason


def forgotten(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how the tiny runs without a template went, beside the starts with one."""
    starts = ", ".join(
        f"{name} {of['dr_grpo']['accuracy_start'].mean:.1%}" for name, of in table.items()
    )
    without = {name: of[NO_TEMPLATE] for name, of in table.items()}
    ways = ", ".join(
        f"{name} from {row['accuracy_start'].mean:.1%} to {row['accuracy_end'].mean:.1%}"
        for name, row in without.items()
    )
    return (
        f" A test of why: the starts under R1 ({starts}) say what the further text, which lacks "
        "that template, made the base forget; where nothing is right at first, nothing is "
        f"reinforced. Asked without a template, Dr. GRPO takes {ways}."
    )


CONSTRUCTED = (
    " By construction: what the plain base and the two texts contain (solutions in templates; sums "
    "alone; bare questions with solutions, 60% of them careful). Measured: what RL under the R1 "
    "template, which the further text does not have, makes of it."
)
"""What the texts of the tiny bases decide."""


def draw_table(table: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw accuracy by base model, and length on the last of them by algorithm."""
    kinds = [kind for kind in ("dr_grpo", NO_TEMPLATE) if kind in next(iter(table.values()))]
    figure = Figure(figsize=(5 * len(kinds) + 5, 4), layout="constrained")
    *left, right = figure.subplots(1, len(kinds) + 1)
    for axes, kind in zip(left, kinds, strict=True):
        for color, (name, of) in zip(STYLES, table.items(), strict=False):
            row = of[kind]
            draw(axes, np.array(row["steps"]), np.array(row["accuracy"]), name, color)
        axes.set(xlabel="training step", ylabel="accuracy on held-out questions", ylim=(0, None))
        axes.set_title(f"{kind} from each base")
        axes.legend(title="base model")
    name = list(table)[-1]
    for program, color in ALGORITHMS.items():
        row = table[name][program]
        draw(right, np.array(row["steps"]), np.array(row["length"]), program, color)
    right.set(xlabel="training step", ylabel="mean response length (tokens)", title=f"from {name}")
    right.legend()
    return figure


@claim_options(seeds=2)
def main(options: Options) -> None:
    """Train from a plain base and from two that read more of the domain."""
    models = continued(options)
    if options.model:
        models = {"own": [options.model] * options.seeds, **models}
    runs = jobs(options, models)
    folders = train(options, list(runs.values()))
    table = measure({key: folders[job.name] for key, job in runs.items()})
    measured, outcome, reason = conclude(table)
    if options.is_tiny:
        reason += forgotten(table) + CONSTRUCTED
    lines = ["| base | algorithm | accuracy, start | end | gain | length, start | end |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {program} | {percent(row['accuracy_start'])} | "
        f"{percent(row['accuracy_end'])} | {percent(row['accuracy_gain'])} | "
        f"{row['length_start']} | {row['length_end']} |"
        for name, of in table.items()
        for program, row in of.items()
    ]
    verdict = Verdict(
        "section 3.4, Fig. 8",
        "Domain pretraining raises the ceiling of RL, question-answer text most; under GRPO "
        "accuracy and length then increase together, under Dr. GRPO length does not.",
        measured, outcome, reason,
        f"{options.seeds} seeds of pretraining and training; intervals by Student's t",
    )  # fmt: skip
    write(options, "domain_pretraining", "Domain pretraining and the ceiling of RL", verdict,
          {"table": table}, draw_table(table), "\n".join(lines))  # fmt: skip


if __name__ == "__main__":
    main()
