"""``lmrl questions``: question sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lmrl_env.cli.completion import complete_questions, complete_verifier
from lmrl_env.cli.screen import print_json, print_table

if TYPE_CHECKING:
    from lmrl_env.questions import QuestionSet
    from lmrl_env.types import Question
    from lmrl_env.verifiers import Verdict

SHOWN = 20
"""Answers that fail the check on the screen; --json has all of them."""


@click.group("questions")
def questions_group() -> None:
    """List, show and check question sets.

    \b
      lmrl questions list
      lmrl questions show gsm8k --limit 2
      lmrl questions check math500=copy.jsonl
    """


@questions_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of a table")
def list_command(as_json: bool) -> None:
    """List the sets that are known by name.

    \b
      lmrl questions list
      lmrl questions list --json | jq '."math500".hub'

    Each is loaded from the hub by its name, and from a copy by NAME=FILE_OR_FOLDER.
    """
    from lmrl_env.questions import NAMED_SETS
    from lmrl_env.tables import Table

    if as_json:
        print_json(
            {
                name: {
                    **known._asdict(),
                    "citation": known.citation._asdict(),
                    "columns": known.columns._asdict(),
                }
                for name, known in NAMED_SETS.items()
            }
        )
        return
    rows = [["arithmetic", "built in", "", "MIT", ""]]
    for name, known in NAMED_SETS.items():
        cited = known.citation
        source = f"{cited.authors.split(',')[0].removesuffix(' et al.')} {cited.year}"
        paper = f"{source}, arXiv:{cited.arxiv}" if cited.arxiv else source
        rows.append([name, known.hub, known.split, known.licence, paper])
    print_table(Table("", ["name", "hub id", "split", "licence", "cite"], rows))


@questions_group.command("show")
@click.argument("name", shell_complete=complete_questions)
@click.option("--limit", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--split", type=click.Choice(["train", "heldout", "all"]), default="all", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object a line")
def show_command(name: str, limit: int, split: Any, as_json: bool) -> None:
    """Print the first questions of a set with their gold answers.

    \b
      lmrl questions show arithmetic:level=3 --limit 5
      lmrl questions show math500=copy.jsonl --limit 1000 --json > questions.jsonl
    """
    import json

    from lmrl_env.questions import load_questions

    questions = load_questions(name, split=split)
    for question in questions[:limit]:
        if as_json:
            row = {**question._asdict(), "extra": dict(question.extra)}
            click.echo(json.dumps(row, ensure_ascii=False, default=str))
        else:
            click.secho(question.id, bold=True)
            click.echo(f"{question.question}\n→ {' or '.join(_golds(question))}\n")
    if not as_json:
        click.echo(f"{name}: {len(questions):,} questions in {split!r}; {questions.report}")


@questions_group.command("check")
@click.argument("name", shell_complete=complete_questions)
@click.option(
    "--verifier",
    shell_complete=complete_verifier,
    default="boxed_math",
    show_default=True,
    help="that must accept the answers",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of text")
@click.pass_context
def check_command(context: click.Context, name: str, verifier: str, as_json: bool) -> None:
    """Load a set and report what is dropped, and whether a verifier accepts its gold answers.

    \b
      lmrl questions check my_questions.jsonl
      lmrl questions check olympiad-bench=copy.jsonl --json

    Every gold answer is graded against itself as \\boxed{answer}, which must be correct. The exit
    code is 0 if all are, and 1 if one is not or the set cannot be loaded; dropped rows are
    reported only.
    """
    from lmrl_env.grading import Grader
    from lmrl_env.questions import load_questions

    questions = load_questions(name, split="all")
    golds = [(question, gold) for question in questions for gold in _golds(question)]
    with Grader(verifier) as grader:
        verdicts = grader.grade(
            [f"\\boxed{{{gold}}}" for _, gold in golds],
            [gold for _, gold in golds],
            [question for question, _ in golds],
        )
    failed = [
        (question, gold, verdict)
        for (question, gold), verdict in zip(golds, verdicts, strict=True)
        if verdict.status != "correct"
    ]
    _print_check(questions, len(golds), grader.verifier, failed, as_json)
    context.exit(1 if failed else 0)


def _print_check(
    questions: QuestionSet,
    golds: int,
    verifier: str,
    failed: list[tuple[Question, str, Verdict]],
    as_json: bool,
) -> None:
    several = sum(not isinstance(question.answer, str) for question in questions)
    if as_json:
        print_json(
            {
                "name": questions.name,
                "report": questions.report,
                "questions": len(questions),
                "answers": golds,
                "questions_with_several_answers": several,
                "verifier": verifier,
                "not_accepted": [
                    {"question_id": question.id, "answer": gold, **verdict._asdict()}
                    for question, gold, verdict in failed
                ],
            }
        )
        return
    click.echo(f"{questions.name}: {questions.report}")
    columns = sorted({key for question in questions for key in question.extra})
    click.echo(f"{several:,} questions have several gold answers; further columns: "
               f"{', '.join(columns) or 'none'}")  # fmt: skip
    click.echo(f"{golds - len(failed):,} of {golds:,} gold answers are correct to {verifier}")
    for question, gold, verdict in failed[:SHOWN]:
        click.echo(f"  {question.id}: {gold!r} is {verdict.status} ({verdict.detail})")
    if len(failed) > SHOWN:
        click.echo(f"  and {len(failed) - SHOWN:,} more")


def _golds(question: Question) -> tuple[str, ...]:
    return (question.answer,) if isinstance(question.answer, str) else question.answer
