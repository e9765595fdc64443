r"""Verifiers: pure functions from a response and a gold answer to a verdict.

A verifier is any function ``(response, answer, *, question=None) -> Verdict`` whose result depends
on its arguments only. It needs neither an environment nor a model, and may be slow or crash: a
``lmrl_env.grading.Grader`` contains it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from lmrl_env.errors import UnknownNameError
from lmrl_env.math_equality import math_equal
from lmrl_env.templates import AnswerFormat
from lmrl_env.types import Question

__all__ = [
    "VERIFIERS",
    "Verdict",
    "Verifier",
    "answer_tag_math",
    "boxed_math",
    "math_answer",
    "math_equal",
    "verifier_for",
]

Status = Literal["correct", "wrong", "unparseable", "timeout", "crash"]


class Verdict(NamedTuple):
    """What a verifier makes of one response.

    Attributes:
        score: the reward, 1.0 for a right answer and 0.0 otherwise unless the verifier says more.
        status: ``unparseable`` if the response gives no answer in the wanted form; ``timeout``
            and ``crash`` if the verifier itself did not finish.
        extracted: the answer that was found in the response.
        detail: why, for a reader.
    """

    score: float
    status: Status
    extracted: str | None = None
    detail: str = ""


class Verifier(Protocol):
    """Judges one response."""

    def __call__(
        self, response: str, answer: str | Sequence[str], *, question: Question | None = None
    ) -> Verdict:
        """Return the verdict.

        Args:
            response: the text that followed the prompt.
            answer: the gold answer; several where any one of them counts as right.
            question: the whole row, for verifiers that need more than the answer.
        """


def boxed_math(
    response: str, answer: str | Sequence[str], *, question: Question | None = None
) -> Verdict:
    r"""Judge the content of the last complete ``\boxed{...}`` or ``\fbox{...}``.

    >>> boxed_math(r"So it is \boxed{\frac{1}{2}}.", "0.5")
    Verdict(score=1.0, status='correct', extracted='\\frac{1}{2}', detail='')
    """
    return _judge(*_find_box(response), answer)


def answer_tag_math(
    response: str, answer: str | Sequence[str], *, question: Question | None = None
) -> Verdict:
    r"""Judge the content of the last ``<answer>...</answer>`` after the first ``</think>``.

    The R1 prompt ends in ``<think>``, so a response begins inside the reasoning: a tag before
    ``</think>`` is part of that and does not answer. The paper's code wants exactly one space
    between ``</think>`` and ``<answer>``; here anything may stand there. A box in the tag is
    opened.

    >>> answer_tag_math("2 + 2 = 4 </think> <answer>4</answer>", "4").status
    'correct'
    >>> answer_tag_math("<answer>4</answer>", "4").status
    'unparseable'
    """
    return _judge(*_find_tag_after_thinking(response), answer)


def math_answer(
    response: str, answer: str | Sequence[str], *, question: Question | None = None
) -> Verdict:
    r"""Judge the last ``<answer>...</answer>`` if there is one, else the last ``\boxed{...}``.

    >>> math_answer(r"It is \boxed{4}.", ("4", "four")).score
    1.0
    """
    return _judge(*_find_tag_or_box(response), answer)


VERIFIERS: dict[AnswerFormat, Verifier] = {
    "tag": answer_tag_math,
    "boxed": boxed_math,
    "either": math_answer,
}
"""The verifier of each answer format of a template."""


def verifier_for(answer_format: AnswerFormat) -> Verifier:
    """Return the verifier of mathematical answers in a template's format.

    Raises:
        UnknownNameError: if there is no such format.
    """
    if answer_format not in VERIFIERS:
        raise UnknownNameError(
            f"unknown answer format {answer_format!r}: expected one of {sorted(VERIFIERS)}, or "
            "name a verifier of your own as 'module:function'"
        )
    return VERIFIERS[answer_format]


def warm_up() -> None:
    """Load what the verifiers need, so that a worker's first answer is as fast as its others."""
    math_equal("x + 1", "y")


def verdict_at_once(verifier: str, response: str, answer: str | Sequence[str]) -> Verdict | None:
    """Return the verdict where a look is enough, so that it needs no worker process.

    That is where a response holds no answer, or where answer and gold are whole numbers. It takes
    time in proportion to the response, and gives what the verifier itself would.

    Args:
        verifier: path ``"module:function"``; of functions of other modules nothing is known.
        response: see ``Verifier``.
        answer: see ``Verifier``.
    """
    find = _FIND.get(verifier)
    return None if find is None else _settle(*find(response), answer)


def _judge(content: str | None, missing: str, answer: str | Sequence[str]) -> Verdict:
    """Compare what was found in a response with each gold answer."""
    verdict = _settle(content, missing, answer)
    if verdict is not None:
        return verdict
    extracted, golds = _extract(content or ""), _golds(answer)
    return _verdict(extracted, golds, any(math_equal(extracted, gold) for gold in golds))


def _settle(content: str | None, missing: str, answer: str | Sequence[str]) -> Verdict | None:
    """Return the verdict if there is no answer, or only whole numbers are to be compared."""
    if content is None:
        return Verdict(0.0, "unparseable", detail=missing)
    extracted, golds = _extract(content), _golds(answer)
    if not extracted:
        return Verdict(0.0, "unparseable", extracted, "the answer is empty")
    if not all(_WHOLE_NUMBER.fullmatch(text) for text in (extracted, *golds)):
        return None
    return _verdict(extracted, golds, any(int(extracted) == int(gold) for gold in golds))


def _verdict(extracted: str, golds: Sequence[str], is_right: bool) -> Verdict:
    if is_right:
        return Verdict(1.0, "correct", extracted)
    return Verdict(0.0, "wrong", extracted, f"expected {' or '.join(golds)}")


_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


def _golds(answer: str | Sequence[str]) -> tuple[str, ...]:
    return (answer,) if isinstance(answer, str) else tuple(answer)


def _extract(content: str) -> str:
    """Return an answer without the box that it may stand in."""
    box = _last_box(content)
    return (content if box is None else box).strip()


def _find_box(response: str) -> tuple[str | None, str]:
    return _last_box(response), r"no complete \boxed{...}"


def _find_tag_after_thinking(response: str) -> tuple[str | None, str]:
    _, closed, rest = response.partition("</think>")
    if not closed:
        return None, "no </think>"
    return _last_tag(rest), "no <answer>...</answer> after </think>"


def _find_tag_or_box(response: str) -> tuple[str | None, str]:
    content = _last_tag(response)
    if content is None:
        content = _last_box(response)
    return content, r"neither <answer>...</answer> nor a complete \boxed{}"


_FIND = {
    f"{__name__}:boxed_math": _find_box,
    f"{__name__}:answer_tag_math": _find_tag_after_thinking,
    f"{__name__}:math_answer": _find_tag_or_box,
}


def _last_tag(text: str) -> str | None:
    """Return the content of the last ``<answer>...</answer>``."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end]


def _last_box(text: str) -> str | None:
    r"""Return the content of the ``\boxed{...}`` that opens last, among those that close.

    One pass over the braces, so that a megabyte of open boxes takes no longer than other text.
    """
    open_braces: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for match in re.finditer(r"\\[{}]|(\\(?:boxed|fbox)\s*)?\{|\}", text):
        brace = match[0]
        if brace.startswith("\\") and match[1] is None:
            continue
        if brace.endswith("{"):
            open_braces.append((match.end(), match[1] is not None))
        elif open_braces:
            start, is_box = open_braces.pop()
            if is_box and (best is None or start > best[0]):
                best = start, match.start()
    return None if best is None else text[best[0] : best[1]]
