"""Parts of a question set: by difficulty level, and by measured pass rate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lmrl_env.errors import ConfigurationError, QuestionError
from lmrl_env.questions.grammar import SetName
from lmrl_env.questions.question_set import Drops
from lmrl_env.questions.sources import read_file
from lmrl_env.types import Question

ORDERS = ("easy-first", "hard-first")


def at_level(name: SetName, questions: Sequence[Question]) -> tuple[list[Question], str]:
    """Return the questions of a range of levels, and what to report.

    A level is the first number in a row's column ``level``: ``Level 5`` is 5.

    Args:
        name: with the option ``level``, such as ``3-5``.
        questions: of the set.

    Raises:
        QuestionError: if no row has a level.
    """
    low, high = name.number_range("level")
    levels = [_level(question) for question in questions]
    unknown = levels.count(None)
    if unknown == len(questions):
        raise QuestionError(
            f"level={name.options['level']} in the question set {name.text!r}: none of its rows "
            "has a number in a column 'level'; leave the option out"
        )
    kept = [
        question
        for question, level in zip(questions, levels, strict=True)
        if level is not None and low <= level <= high
    ]
    report = f"{len(kept):,} at level {name.options['level']}"
    return kept, report + f" ({unknown} without a level)" * (unknown > 0)


def _level(question: Question) -> float | None:
    found = re.search(r"\d+(\.\d+)?", str(question.extra.get("level")))
    return float(found[0]) if found else None


def by_pass_rate(name: SetName, questions: Sequence[Question]) -> tuple[list[Question], str]:
    """Return the questions whose measured pass rate is in a band, and what to report.

    Each gets its rate as ``extra["pass_rate"]``; a question without one is left out. With an order
    they are sorted by it, equal ones as they stood.

    Args:
        name: with the option ``pass_rates``, a file of rows with ``id`` and ``pass_rate``, or the
            ``samples.jsonl`` of an evaluation of one model, where the rate is the share of correct
            responses; and optionally ``band``, such as ``0.2-0.8``, and ``order``, one of
            ``ORDERS``.
        questions: of the set.

    Raises:
        ConfigurationError: for another order, or a band or an order without pass rates.
        QuestionError: if the file cannot be used, or has the rate of none of the questions.
    """
    options = name.options
    if "pass_rates" not in options:
        raise ConfigurationError(
            f"the question set {name.text!r} has a band or an order: expected pass_rates=FILE too, "
            "a .jsonl file with the columns id and pass_rate"
        )
    if "order" in options and options["order"] not in ORDERS:
        raise ConfigurationError(
            f"order={options['order']} in the question set {name.text!r}: expected one of {ORDERS}"
        )
    low, high = name.number_range("band") if "band" in options else (0.0, 1.0)
    rates = _read_pass_rates(Path(options["pass_rates"]).expanduser())
    measured = [_with_rate(question, rates) for question in questions if question.id in rates]
    if not measured:
        raise QuestionError(
            f"{options['pass_rates']!r} has no pass rate of any question of {name.text!r}: its ids "
            f"are like {next(iter(rates), None)!r}, expected ids like {questions[0].id!r}"
        )
    kept = [question for question in measured if low <= question.extra["pass_rate"] <= high]
    if "order" in options:
        sign = -1 if options["order"] == "easy-first" else 1
        kept.sort(key=lambda question: sign * question.extra["pass_rate"])
    report = f"{len(kept):,} with a pass rate of {low:g} to {high:g}"
    if "order" in options:
        report += f", {options['order'].replace('-', ' ')}"
    unknown = len(questions) - len(measured)
    return kept, report + f" ({unknown:,} without a pass rate)" * (unknown > 0)


def _with_rate(question: Question, rates: Mapping[str, float]) -> Question:
    extra = {**question.extra, "pass_rate": rates[question.id]}
    return question._replace(extra=MappingProxyType(extra))


def _read_pass_rates(path: Path) -> dict[str, float]:
    drops = Drops()
    rows = list(read_file(path, drops))
    if drops:
        raise QuestionError(f"{str(path)!r} has {drops}: expected one JSON object a line")
    if rows and {"question_id", "status"} <= rows[0].keys():
        return _rates_of_samples(path, rows)
    rates: dict[str, float] = {}
    for row in rows:
        question_id, rate = row.get("id"), row.get("pass_rate")
        in_range = isinstance(rate, int | float) and 0 <= rate <= 1
        if question_id is None or rate is None or not in_range or str(question_id) in rates:
            raise QuestionError(
                f"the row {dict(row)} of {str(path)!r}: expected 'id', another in every row, and "
                "'pass_rate', a number from 0 to 1; or the samples.jsonl of an evaluation"
            )
        rates[str(question_id)] = float(rate)
    return rates


def _rates_of_samples(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of each question's responses that an evaluation called correct."""
    asked: dict[str, tuple[Any, Any]] = {}
    correct: dict[str, list[bool]] = {}
    for row in rows:
        question_id, of = str(row.get("question_id")), (row.get("model"), row.get("set"))
        if asked.setdefault(question_id, of) != of:
            raise QuestionError(
                f"{str(path)!r} has responses to {question_id!r} of {asked[question_id]} and {of}: "
                "expected one model and one set; evaluate them into folders of their own"
            )
        correct.setdefault(question_id, []).append(row.get("status") == "correct")
    return {question_id: sum(known) / len(known) for question_id, known in correct.items()}
