"""``lmrl regrade``: old outputs under another verifier."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmrl_env.cli.completion import complete_verifier
from lmrl_env.cli.eval import finish
from lmrl_env.cli.screen import print_table

if TYPE_CHECKING:
    from lmrl_env.samples import Sample

SHOWN = 10
"""Disagreements on the screen; the file has all of them."""


@click.command("regrade")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--verifier",
    shell_complete=complete_verifier,
    required=True,
    help="name, or module:function; lmrl verify --help",
)
@click.option("--seed", default=0, show_default=True, help="of the bootstrap")
@click.option("--json", "as_json", is_flag=True, help="print the new summary.json alone")
def regrade_command(source: Path, verifier: str, seed: int, as_json: bool) -> None:
    """Grade the responses of an evaluation anew, without sampling.

    \b
      lmrl regrade evals/20260101-120000 --verifier boxed_math
      lmrl regrade old.jsonl --verifier 'numeric(tolerance=0.01)'

    SOURCE is the folder of an evaluation, or a JSONL file with at least question_id, question,
    answer, response and finish_reason in a row. The folder regraded-VERIFIER beside the samples
    gets the same files as an evaluation, and disagreements.jsonl: each response that now scores
    otherwise, with both verdicts. What an earlier call left there is replaced. Responses that the
    budget cut off stay ungraded.
    """
    from lmrl_env.grading import Grader
    from lmrl_env.provenance import provenance
    from lmrl_env.samples import grade, read_samples, to_line

    path = source / "samples.jsonl" if source.is_dir() else source
    old = read_samples(path)
    with Grader(verifier) as grader:
        new = grade(old, grader)
        verifier = grader.verifier
    name = re.sub(r"[^\w.=-]+", "-", verifier.removeprefix("lmrl_env.verifiers:")).strip("-")
    folder = path.parent / f"regraded-{name}"
    folder.mkdir(exist_ok=True)
    sampled = _record_of_samples(path.parent / "config.json")
    config = {"samples": str(path), "verifier": verifier, **provenance(), "evaluation": sampled}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(map(to_line, new))
    differing = [(a, b) for a, b in zip(old, new, strict=True) if a.status and a.score != b.score]
    with (folder / "disagreements.jsonl").open("w", encoding="utf-8") as file:
        for before, after in differing:
            row = json.loads(to_line(after))
            row["before"] = {key: getattr(before, key) for key in _VERDICT}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    by_model: dict[str, list[Sample]] = {}
    for sample in new:
        by_model.setdefault(sample.model, []).append(sample)
    finish(folder, by_model, {**(sampled or config), "verifier": verifier}, seed, as_json)
    if not as_json:
        _print_changes(old, new, differing)


def _record_of_samples(path: Path) -> dict[str, Any] | None:
    """Return the record of the evaluation that drew the samples, or None if there is none."""
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    record = record.get("evaluation") or record  # of an evaluation that was graded anew itself
    return record if "engine_used" in record else None


_VERDICT = ("status", "score", "extracted", "detail")


def _print_changes(
    old: list[Sample], new: list[Sample], differing: list[tuple[Sample, Sample]]
) -> None:
    """Print how statuses moved, and the first responses that score otherwise."""
    from lmrl_env.tables import Table

    graded = [(a, b) for a, b in zip(old, new, strict=True) if a.status]
    if not graded:
        click.echo("the old samples hold no verdicts to compare with")
        return
    moved = Counter((a.status, b.status) for a, b in graded if a.status != b.status)
    rows = [[f"{before} → {after}", f"{n:,}"] for (before, after), n in moved.most_common()]
    print_table(Table("Changed statuses", ["status", "responses"], rows or [["none", "0"]]))
    headings = ["question", "sample", "before", "now", "extracted before", "now", "gold"]
    rows = [
        [f"{b.set} {b.question_id}", str(b.sample), f"{a.status} {a.score:g}",
         f"{b.status} {b.score:g}", str(a.extracted), str(b.extracted), str(b.answer)]
        for a, b in differing[:SHOWN]
    ]  # fmt: skip
    if rows:
        title = f"{len(differing):,} of {len(graded):,} responses score otherwise; the first are"
        print_table(Table(title, headings, rows))
    else:
        click.echo(f"all {len(graded):,} responses score as before")
