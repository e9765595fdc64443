"""The table that a run prints of its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lmrl_env.manifest import in_gib
from lmrl_env.normaliser import WORDS, in_numbers


def print_manifest(manifest: Mapping[str, Any], console: Console) -> None:
    """Print what a run will do as a table that fits 80 columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, content in _sections(manifest).items():
        lines: Sequence[str | Table] = content if isinstance(content, list) else [content]
        for index, line in enumerate(lines):
            cell: RenderableType = Text(line) if isinstance(line, str) else line
            table.add_row("" if index else heading, cell)
    console.print(table)


def _sections(manifest: Mapping[str, Any]) -> dict[str, list[str] | Table]:
    step, update, run = (manifest[key] for key in ("step", "optimizer_step", "run"))
    model, ranks = manifest["model"], manifest["ranks"]
    return {
        "step": [
            f"{step['questions']:,} questions × {step['group_size']} responses × "
            f"{step['max_new_tokens']:,} tokens = at most {step['response_tokens_at_most']:,}",
            f"{ranks} {_plural('rank', ranks)} with {step['questions_per_rank']:,} "
            f"{_plural('question', step['questions_per_rank'])} each, "
            f"{step['optimizer_steps']} {_plural('optimiser step', step['optimizer_steps'])}",
        ],
        "optimiser step": [
            f"{update['responses']:,} responses to {update['questions']:,} questions, at most "
            f"{update['response_tokens_at_most']:,} tokens",
            f"micro-batches of up to {update['micro_batch_tokens']:,} tokens, at most "
            f"{update['micro_batches_of_a_rank_at_most']:,} a rank",
            *_normaliser_lines(update, step["max_new_tokens"]),
        ],
        "run": [
            f"{run['steps']:,} steps: {run['responses']:,} responses, "
            f"{run['epochs_over_the_questions']:.2f} epochs over the questions",
            f"{run['evaluations']:,} evaluations: {run['evaluation_responses']:,} responses",
        ],
        "train": _question_lines(manifest["train_questions"]),
        "held-out": _question_lines(manifest["eval_questions"]),
        "model": [
            f"{model['name']}: {model['architecture']}, {model['parameters']:,} parameters",
            f"weights {(model['weights'] or 'not read')[:12]}, context {model['context']:,} tokens",
        ],
        "memory of a rank": _memory_table(manifest["memory_of_a_rank"]),
        "made with": _software_lines(manifest),
        **({"notes": [f"- {note}" for note in manifest["notes"]]} if manifest["notes"] else {}),
    }


def _normaliser_lines(update: Mapping[str, Any], max_new_tokens: int) -> list[str]:
    names = update["normaliser"]
    if names is None:
        return ["loss: unknown, since the program has no policy_loss as algos/ do"]
    words = " × ".join(WORDS[name] for name in names)
    numbers = in_numbers(names, responses=update["responses"], max_new_tokens=max_new_tokens)
    return [f"loss: sum over tokens / ({words})", f"      {numbers}"]


def _question_lines(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{record['name']}: {record['report']}",
        f"{record['questions']:,} questions of at most {record['longest_prompt']:,} tokens, sha256 "
        f"{record['sha256'][:12]}",
    ]


def _memory_table(memory: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for item in memory["items"]:
        table.add_row(in_gib(item["bytes"]), item["name"], item["formula"])
    table.add_row(in_gib(memory["bytes"]), "estimate", f"of {in_gib(memory['device_bytes'])}")
    return table


def _software_lines(manifest: Mapping[str, Any]) -> list[str]:
    packages = ["torch", "transformers", *(["vllm"] if manifest["engine"] == "vllm" else [])]
    versions = [f"{name} {manifest['versions'][name]}" for name in packages]
    return [
        f"engine {manifest['engine']} on {manifest['device']} in {manifest['dtype']}",
        ", ".join([f"Python {manifest['python']}", *versions]),
        f"commit {manifest['commit']}" if manifest["commit"] else "no git checkout",
    ]


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
