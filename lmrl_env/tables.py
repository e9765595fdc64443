"""Tables of an evaluation, for the screen and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

AVERAGES = {
    "mean_over_sets": "mean over sets (each set counts alike)",
    "mean_over_questions": "mean over questions (each question counts alike)",
}
"""Key of a summary, and what it is."""


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        title: over it.
        headings: of the columns, the first of which is left-aligned.
        rows: one text a column.
        notes: under it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def summary_table(title: str, summary: Mapping[str, Any]) -> Table:
    """Return the table of one model's summary.

    Args:
        title: over it, such as the model's name.
        summary: as ``summary.summarise`` returns it.
    """
    sets = summary["sets"]
    ns = {row["samples_per_question"] for row in sets.values()}
    n = ns.pop() if len(ns) == 1 else None
    ks = [] if n in (1, None) else [f"pass@{n}", f"majority@{n}"]
    headings = ["set", "questions", "accuracy" if n is None else f"avg@{n}", "95% interval", *ks]
    headings += ["formatted", "truncated", "right", "wrong", "timeout", "crash"]
    rows = []
    for label, row in sets.items():
        status, samples = row["status"], sum(row["status"].values())
        rows.append(
            [
                label,
                f"{row['questions']:,}",
                *_accuracy_cells(row["accuracy"]),
                *(_percent(row[k]["value"]) if k in row else "–" for k in ks),
                _percent(row["formatted"]),
                _percent(status["truncated"] / samples),
                *(
                    "–" if (t := row["tokens"][k]) is None else f"{t:.0f}"
                    for k in ("right", "wrong")
                ),
                *(f"{status[k]:,}" for k in ("timeout", "crash")),
            ]
        )
    if len(sets) > 1:
        for key, name in AVERAGES.items():
            cells = [name, "", *_accuracy_cells(summary[key])]
            rows.append(cells + [""] * (len(headings) - len(cells)))
    notes = [
        "right, wrong: mean tokens of responses that ended by themselves; truncated ones are "
        "counted apart and earn 0. Intervals: bootstrap over questions."
    ]
    return Table(title, headings, rows, notes)


def comparison_table(title: str, differences: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the table of ``summary.compare``, in percentage points.

    Args:
        title: over it, such as the names of the two models.
        differences: as ``summary.compare`` returns them.
    """
    rows = [
        [
            AVERAGES.get(label, label),
            f"{row['questions']:,}",
            f"{100 * row['difference']:+z.1f}",
            f"{100 * row['low']:+z.1f} to {100 * row['high']:+z.1f}",
        ]
        for label, row in differences.items()
    ]
    return Table(title, ["set", "common questions", "difference", "95% interval"], rows)


def settings_line(config: Mapping[str, Any]) -> str:
    """Return in one line what a reader needs to repeat an evaluation.

    Args:
        config: the record of the evaluation, ``config.json``.
    """
    versions = config["versions"]
    packages = [f"{name} {versions[name]}" for name in _CITED if versions.get(name)]
    parts = [f"Verifier {config['verifier'].removeprefix('lmrl_env.verifiers:')}"]
    if "temperature" in config:
        templates = {template["name"] for template in config["templates"].values()}
        parts += [
            f"template {', '.join(sorted(templates))}",
            f"temperature {config['temperature']:g}",
            f"samples per question {config['n']}",
            f"at most {config['max_new_tokens']:,} tokens",
            f"seed {config['seed']}",
            f"engine {config['engine_used']} in {config['dtype']}",
        ]
    if config.get("limit"):
        parts.append(f"at most {config['limit']} questions of a set")
    if config["commit"]:
        packages.append(f"commit {config['commit']}")
    return f"{', '.join(parts)}. {', '.join(packages)}.\n"


_CITED = ("lmrl_env", "math-verify", "transformers", "torch", "vllm")


def markdown(tables: Sequence[Table]) -> str:
    r"""Return tables as Markdown.

    >>> print(markdown([Table("Tiny", ["set", "avg@1"], [["a|b", "50.0%"]])]))
    ## Tiny
    <BLANKLINE>
    | set | avg@1 |
    | :-- | --: |
    | a\|b | 50.0% |
    <BLANKLINE>
    """
    blocks = []
    for table in tables:
        lines = [table.headings, [":--", *["--:"] * (len(table.headings) - 1)], *table.rows]
        body = "\n".join(_line(cells) for cells in lines)
        blocks.append("\n\n".join([f"## {table.title}", body, *table.notes]) + "\n")
    return "\n".join(blocks)


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _accuracy_cells(score: Mapping[str, float]) -> list[str]:
    return [_percent(score["value"]), f"{_percent(score['low'])} to {_percent(score['high'])}"]


def _percent(share: float) -> str:
    return f"{share:.1%}"
