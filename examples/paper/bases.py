"""Base models of different diets, and samples of them, for the scripts about base models."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import click
import numpy as np
from claim import ROOT, Interval, Options, alone

from lmrl_env.questions.arithmetic import arithmetic_questions
from lmrl_env.samples import Sample, read_samples
from lmrl_env.scores import bootstrap_means, interval
from lmrl_env.types import Question

PRETRAIN_STEPS = 2400
TINY_DIETS = ("qa", "text")
COLORS = {"qa": "C0", "text": "C1", "mixed": "C2"}
PAPER_MODELS = (
    "Qwen/Qwen2.5-Math-1.5B",
    "Qwen/Qwen2.5-Math-7B",
    "Qwen/Qwen2.5-7B",
    "meta-llama/Llama-3.1-8B",
    "deepseek-ai/deepseek-math-7b-base",
)
PAPER_SUITE = "aime24,amc,math500,minerva,olympiad-bench"
PAPER_RECIPE: Mapping[str, Any] = {
    "prompts_per_step": 128, "group_size": 8, "updates_per_step": 8, "lr": 1e-6,
    "max_new_tokens": 3000, "dtype": "bfloat16", "gradient_checkpointing": True, "eval_every": 16,
}  # fmt: skip
"""Flags of the paper's runs; see PAPER_SUITE for what they are evaluated on."""

Holds = Literal["holds", "partly", "does not hold"]


class Task(NamedTuple):
    """A program that is run once.

    Attributes:
        name: in a few words.
        command: without the interpreter.
        result: what it leaves; where that exists it is not run.
    """

    name: str
    command: Sequence[str]
    result: Path


def run_all(options: Options, tasks: Sequence[Task]) -> None:
    """Run what has not been run yet, several at one time, or print the commands.

    Raises:
        ClickException: if a program fails, with the end of its output.
    """
    if options.dry_run:
        for task in tasks:
            click.echo(shlex.join([sys.executable, *task.command]))
        return
    with ThreadPoolExecutor(options.jobs if options.is_tiny else 1) as pool:
        running = [pool.submit(_run, task, options) for task in tasks]
        for done in as_completed(running):
            done.result()


def _run(task: Task, options: Options) -> None:
    with alone(task.result.parent):
        if task.result.exists():
            return
        threads = {"OMP_NUM_THREADS": "1"} if options.is_tiny else {}
        done = subprocess.run(
            [sys.executable, *task.command],
            env={**os.environ, **threads},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise click.ClickException(
            f"{task.name} ended with {done.returncode}:\n{done.stdout[-2000:]}"
        )
    click.echo(f"done: {task.name}")


def example(name: str) -> ModuleType:
    """Return a program of ``examples/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def base_models(options: Options, diets: Sequence[str] = TINY_DIETS) -> dict[str, list[str]]:
    """Pretrain tiny base models that are not there yet.

    Returns:
        The models of each diet, one a seed.
    """
    folder = options.runs_dir / "models"
    seeds = range(1, options.seeds + 1)
    tasks = [
        Task(
            f"pretraining of {diet}-{seed}",
            [
                str(ROOT / "examples" / "pretrain_tiny.py"),
                *(f"--diet={diet}", f"--seed={seed}", f"--steps={PRETRAIN_STEPS}"),
                *("--eval-questions=64", f"--out={folder / f'{diet}-{seed}'}"),
            ],
            folder / f"{diet}-{seed}" / "README.md",
        )
        for seed in seeds
        for diet in diets
    ]
    run_all(options, tasks)
    return {diet: [str(folder / f"{diet}-{seed}") for seed in seeds] for diet in diets}


def write_heldout(options: Options, level: int | None) -> Path:
    """Write held-out questions of one level, or of all, and return the file."""
    path = options.runs_dir / "questions" / f"heldout-{level or 'all'}.jsonl"
    write_questions(path, arithmetic_questions("heldout", level=level, size=256, seed=7))
    return path


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write questions to a file that ``--questions`` and ``--eval-set`` take."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"question": q.question, "answer": q.answer}) + "\n" for q in questions)
    path.write_text("".join(rows), encoding="utf-8")


class Evaluation(NamedTuple):
    """Models on question sets, by ``lmrl eval``.

    Attributes:
        name: of its folder.
        models: that are asked.
        flags: of ``lmrl eval``, without dashes.
    """

    name: str
    models: Sequence[str]
    flags: Mapping[str, Any]


def evaluate(options: Options, evaluations: Sequence[Evaluation]) -> dict[str, list[Sample]]:
    """Sample what has not been sampled yet.

    Returns:
        The samples by the evaluation's name; none in a dry run.
    """
    folders = {e.name: options.runs_dir / "evals" / e.name for e in evaluations}
    engine = options.engine or ("local" if options.is_tiny else "vllm")
    tasks = [
        Task(
            f"evaluation {e.name}",
            [
                *("-m", "lmrl_env", "eval", f"--engine={engine}", f"--output={folders[e.name]}"),
                *(f"--model={model}" for model in e.models),
                *(f"--{key.replace('_', '-')}={value}" for key, value in e.flags.items()),
            ],
            folders[e.name] / "summary.json",
        )
        for e in evaluations
    ]
    run_all(options, tasks)
    if options.dry_run:
        return {}
    return {name: read_samples(folder / "samples.jsonl") for name, folder in folders.items()}


def question_means(
    samples: Sequence[Sample], models: Sequence[str], value: Callable[[Sequence[Sample]], float]
) -> Interval:
    """Return the mean over questions, and its 95% bootstrap interval over questions.

    Args:
        samples: of any models.
        models: that count, those of several seeds with equal weight.
        value: of one model's samples to one question.
    """
    answers: dict[tuple[str, str], dict[str, list[Sample]]] = {}
    for sample in samples:
        if sample.model in models:
            by_model = answers.setdefault((sample.set, sample.question_id), {})
            by_model.setdefault(sample.model, []).append(sample)
    rows = [float(np.mean([value(s) for s in by.values()])) for by in answers.values()]
    low, high = interval(bootstrap_means(rows))
    return Interval(float(np.mean(rows)), float(low), float(high))


def accuracy(samples: Sequence[Sample]) -> float:
    """Return the share of right samples."""
    return float(np.mean([sample.status == "correct" for sample in samples]))


def holds(checks: Sequence[bool]) -> Holds:
    """Return the verdict on a claim of several parts."""
    return "holds" if all(checks) else "partly" if any(checks) else "does not hold"


def percent(value: Interval) -> str:
    """Return an interval in percent, for a table."""
    return f"{value.mean:.1%} [{value.low:.1%}, {value.high:.1%}]"
