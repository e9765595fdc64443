"""Question sets: which rows are kept, which are dropped and why, and which are held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from lmrl_env.errors import ConfigurationError, QuestionError
from lmrl_env.types import Question

Split = Literal["train", "heldout", "all"]
"""``heldout``: a tenth that training never sees. ``train``: the rest. ``all``: both."""


class Part(NamedTuple):
    """Questions of a set that training draws from one stream.

    Attributes:
        indices: shape (n,), int64: where they stand in the set.
        share: of all draws; those of a set sum to 1.
        ordered: whether every epoch asks them in this order instead of shuffling them.
    """

    indices: npt.NDArray[np.int64]
    share: float = 1.0
    ordered: bool = False


class QuestionSet(Sequence[Question]):
    """An immutable sequence of questions.

    Args:
        name: the name that it was loaded by.
        questions: its rows.
        report: what was read, kept and dropped, in words.
        parts: how training draws them; by default they are one part, shuffled.

    Attributes:
        name: see above.
        report: see above.
        parts: see above; empty parts are left out.
    """

    def __init__(
        self,
        name: str,
        questions: Iterable[Question],
        report: str,
        parts: Iterable[Part] | None = None,
    ):
        self.name = name
        self.report = report
        self._questions = tuple(questions)
        parts = (Part(np.arange(len(self))),) if parts is None else tuple(parts)
        total = sum(part.share for part in parts if len(part.indices))
        self.parts = tuple(
            part._replace(share=part.share / total) for part in parts if len(part.indices)
        )

    def __len__(self) -> int:
        return len(self._questions)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> QuestionSet: ...
    def __getitem__(self, index: int | slice) -> Question | QuestionSet:
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        return self._questions[index]

    def __repr__(self) -> str:
        return f"QuestionSet({self.name!r}, {len(self)} questions)"

    def subset(self, indices: Iterable[int]) -> QuestionSet:
        """Return the questions at some indices, under the same name."""
        chosen = np.fromiter(indices, dtype=np.int64)
        part_of = np.empty(len(self), dtype=np.int64)
        for number, part in enumerate(self.parts):
            part_of[part.indices] = number
        parts = [
            part._replace(indices=np.flatnonzero(part_of[chosen] == number))
            for number, part in enumerate(self.parts)
        ]
        return QuestionSet(self.name, [self._questions[i] for i in chosen], self.report, parts)


def mix(name: str, sets: Sequence[tuple[QuestionSet, float]]) -> QuestionSet:
    """Return the questions of several sets, each drawn by its share.

    Args:
        name: of the mixture.
        sets: of one part each, with their shares of all draws.
    """
    questions: list[Question] = []
    parts, reports = [], []
    for question_set, share in sets:
        (part,) = question_set.parts
        parts.append(part._replace(indices=part.indices + len(questions), share=share))
        questions.extend(question_set)
        reports.append(f"{share:.1%} {question_set.name}: {question_set.report}")
    return QuestionSet(name, questions, " | ".join(reports), parts)


class Columns(NamedTuple):
    """Names of the columns that hold a row's question, answer and id.

    A dot leads into a nested column: ``1.value`` is the key ``value`` of the column ``1``.
    """

    question: str = "question"
    answer: str = "answer"
    id: str = "id"


class Drops:
    """Rows that are not kept, by reason."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}

    def add(self, reason: str, row: str) -> None:
        """Note that a row is dropped."""
        self._rows.setdefault(reason, []).append(row)

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def __str__(self) -> str:
        return ", ".join(
            f"{len(rows):,} {reason} ({', '.join(rows[:3])}{', ...' * (len(rows) > 3)})"
            for reason, rows in self._rows.items()
        )


def normalised(question: str) -> str:
    r"""Return a question with every run of white space as one space.

    >>> normalised("  What is\n1 +  1? ")
    'What is 1 + 1?'
    """
    return " ".join(question.split())


def usable_questions(
    source: str, rows: Iterable[Mapping[str, Any]], columns: Columns, drops: Drops
) -> list[Question]:
    """Make questions of rows; those without a usable question or answer go to ``drops``.

    An answer is stripped of white space, and of all that stands before a last ``####``, where
    GSM8K writes its worked solution. A list of answers, in the answer's column or in a column
    ``answers``, means that any one of them counts as right; where the row's
    ``is_multiple_answer`` is true, all of them are wanted, and are joined by commas. Of several
    rows with the same question, up to white space, the first is kept.

    Args:
        source: begins the id of a row that has none: ``source/0`` is the first row.
        rows: one mapping a row.
        columns: where question, answer and id stand.
        drops: gets the rows that are not kept.
    """
    kept: dict[str, Question] = {}
    heads = {column.partition(".")[0] for column in columns}.union(columns)
    for index, row in enumerate(rows):
        row_id = _value(row, columns.id)
        row_id = f"{source}/{index}" if row_id is None else str(row_id)
        question = _value(row, columns.question)
        if not isinstance(question, str) or not question.strip():
            drops.add("empty questions", row_id)
            continue
        golds, fault = _golds(row, columns)
        if fault:
            drops.add(fault, row_id)
            continue
        answer = golds[0] if len(golds) == 1 else golds
        first = kept.get(normalised(question))
        if first is not None:
            same = first.answer == answer
            drops.add("duplicates" if same else "duplicates with another answer", row_id)
            continue
        extra = {key: row[key] for key in row if key not in heads}
        kept[normalised(question)] = Question(row_id, question, answer, MappingProxyType(extra))
    return list(kept.values())


def _value(row: Mapping[str, Any], column: str) -> Any:
    """Return what a row has in a column, which may be nested, or None."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _golds(row: Mapping[str, Any], columns: Columns) -> tuple[tuple[str, ...], str | None]:
    """Return the gold answers of a row, or why it has none."""
    value = _value(row, columns.answer)
    if columns.answer == Columns().answer and row.get("answers"):
        value = row["answers"]
    values = value if isinstance(value, list | tuple) else [value]
    golds: list[str] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            return (), f"answers of type {type(value).__name__}"
        golds.append(_answer_text(value))
    usable = tuple(dict.fromkeys(gold for gold in golds if gold not in ("", "None")))
    if usable and row.get("is_multiple_answer") is True:
        return (", ".join(usable),), None
    if usable:
        return usable, None
    return (), "answers 'None'" if "None" in golds else "empty answers"


def _answer_text(value: str | int | float | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).rpartition("####")[2].strip()


def in_split(questions: Sequence[Question], split: Split) -> list[Question]:
    """Return the questions of one split.

    A question is held out if the SHA-256 of its text, up to white space, says so: whatever the
    order, the duplicates or the file, it is always on the same side. Of a set too small for that
    to hold out any, the question with the smallest hash is held out.

    Raises:
        ConfigurationError: for an unknown split.
        QuestionError: if the split is empty.
    """
    if split not in ("train", "heldout", "all"):
        raise ConfigurationError(
            f"unknown split {split!r}: expected 'train', 'heldout' (a tenth that 'train' lacks) or "
            "'all'"
        )
    if split == "all":
        return list(questions)
    hashes = [_hash(question.question) for question in questions]
    held_out = {h for h in hashes if h % 10 == 0}
    if not held_out and len(hashes) > 1:
        held_out = {min(hashes)}
    chosen = [
        question
        for question, h in zip(questions, hashes, strict=True)
        if (h in held_out) == (split == "heldout")
    ]
    if not chosen:
        raise QuestionError(
            f"the split {split!r} of {len(questions)} questions is empty: take split='all', or a "
            "larger set"
        )
    return chosen


def _hash(question: str) -> int:
    return int.from_bytes(hashlib.sha256(normalised(question).encode()).digest()[:8], "big")
