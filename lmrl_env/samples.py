"""Graded responses as rows of a file, with everything that is needed to grade them anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from lmrl_env.errors import QuestionError
from lmrl_env.grading import Grader
from lmrl_env.types import FinishReason, Question
from lmrl_env.verifiers import Status

SampleStatus = Literal[Status, "truncated"]
"""What a verifier said, or ``truncated``: cut off by the budget, and not graded."""


class Sample(NamedTuple):
    """One response to a question of an evaluation.

    Attributes:
        question_id: within its set.
        question: the text that the template wraps.
        answer: the gold answer, or several of which any one counts as right.
        response: the text that followed the prompt.
        finish_reason: why it ended.
        model: name or folder.
        set: label of the question set.
        template: name of the prompt template.
        sample: which one of the responses to the question, from 0.
        seed: that it was drawn with, or None where that is not known.
        tokens: of the response, or None where that is not known.
        extra: the other columns of the question's row.
        status: what became of it, or None before it is graded.
        score: of the verifier; 0 if truncated.
        extracted: the answer that was judged.
        detail: why, in the verifier's words.
    """

    question_id: str
    question: str
    answer: str | Sequence[str]
    response: str
    finish_reason: FinishReason
    model: str = ""
    set: str = ""
    template: str = ""
    sample: int = 0
    seed: int | None = None
    tokens: int | None = None
    extra: Mapping[str, Any] = MappingProxyType({})
    status: SampleStatus | None = None
    score: float = 0.0
    extracted: str | None = None
    detail: str = ""


def grade(samples: Sequence[Sample], grader: Grader) -> list[Sample]:
    """Return the samples with the grader's verdicts.

    As in training (Liu et al. 2025, arXiv:2503.20783), a response that the budget cut off earns 0
    and is not graded; its status is ``truncated``.

    Args:
        samples: whose earlier verdicts do not count.
        grader: of the verifier.
    """
    ended = [sample for sample in samples if sample.finish_reason == "stop"]
    verdicts = grader.grade(
        [sample.response for sample in ended],
        [sample.answer for sample in ended],
        [Question(s.question_id, s.question, _gold(s.answer), s.extra) for s in ended],
    )
    graded = iter(verdicts)
    return [
        sample._replace(**next(graded)._asdict())
        if sample.finish_reason == "stop"
        else sample._replace(status="truncated", score=0.0, extracted=None, detail="")
        for sample in samples
    ]


def _gold(answer: str | Sequence[str]) -> str | tuple[str, ...]:
    return answer if isinstance(answer, str) else tuple(answer)


def to_line(sample: Sample) -> str:
    """Return a sample as a line of JSON."""
    row = {**sample._asdict(), "extra": dict(sample.extra)}
    return json.dumps(row, default=str, ensure_ascii=False) + "\n"


def read_samples(path: Path) -> list[Sample]:
    """Read samples from a JSONL file, of ``lmrl eval`` or of your own.

    Args:
        path: of rows with the attributes of ``Sample``; those that have a default may be missing,
            and other columns do not count.

    Raises:
        QuestionError: if the file cannot be read, or a row is no sample.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionError(
            f"{str(path)!r} cannot be read ({error}): expected the folder or the samples.jsonl of "
            "an evaluation"
        ) from error
    samples = [_sample(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise QuestionError(f"{str(path)!r} is empty: expected one sample a line")
    return samples


def _sample(line: str, place: str) -> Sample:
    try:
        row = json.loads(line)
        sample = Sample(**{key: row[key] for key in Sample._fields if key in row})
    except (ValueError, TypeError) as error:
        raise QuestionError(
            f"{place} is no sample ({error}): expected a JSON object with at least "
            f"{', '.join(sorted(set(Sample._fields) - set(Sample._field_defaults)))}"
        ) from error
    if sample.finish_reason not in get_args(FinishReason):
        raise QuestionError(
            f"{place} has finish_reason {sample.finish_reason!r}: expected 'stop' where the "
            "response ended by itself, or 'length' where the budget cut it off"
        )
    for names, expected, fits in _COLUMNS:
        for name in names.split():
            if not fits(value := getattr(sample, name)):
                raise QuestionError(f"{place} has {name} {value!r}: expected {expected}")
    return sample


def _is_gold(value: Any) -> bool:
    golds = value if isinstance(value, list) else [value]
    return bool(golds) and all(isinstance(gold, str) for gold in golds)


_COLUMNS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("answer", "a text or a list of texts", _is_gold),
    ("question_id", "text or a whole number", lambda value: isinstance(value, str | int)),
    ("question response model set template detail", "text", lambda value: isinstance(value, str)),
    ("extracted", "text or null", lambda value: isinstance(value, str | None)),
    ("sample seed tokens", "a whole number", lambda value: isinstance(value, int | None)),
    ("score", "a number", lambda value: isinstance(value, int | float)),
    ("extra", "an object", lambda value: isinstance(value, Mapping)),
    ("status", f"one of {', '.join(get_args(SampleStatus))}, or null",
     lambda value: value is None or value in get_args(SampleStatus)),
)  # fmt: skip
"""Names of columns, what they must hold, and whether a value is that."""
