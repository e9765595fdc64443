"""Verifiers of mathematical answers, by where the response gives its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmrl_env.math_equality import math_equal
from lmrl_env.types import Question
from lmrl_env.verifiers.extraction import (
    after_thinking,
    last_box,
    last_number_in,
    last_tag,
    marked_answer,
)
from lmrl_env.verifiers.verdict import Verdict, all_golds, compared


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

    What follows ``</think>`` is the answer; where it holds neither, the thinking is searched too.

    >>> math_answer(r"It is \boxed{4}.", ("4", "four")).score
    1.0
    """
    return _judge(*_find_tag_or_box(response), answer)


def last_number(
    response: str, answer: str | Sequence[str], *, question: Question | None = None
) -> Verdict:
    r"""Judge the last number of the response, or the one after the last ``####`` of a line.

    The convention of GSM8K (Cobbe et al. 2021, arXiv:2110.14168). Words and units around the
    number do not count: a response is right that says ``18 dollars`` where 18 is asked for.

    >>> last_number("She earns 9 * 2 = $18 a day.", "18").status
    'correct'
    >>> last_number("20 in all, 2 left.\n#### 1,080", "1080").extracted
    '1,080'
    """
    return _judge(*_find_last_number(response), answer)


def warm_up() -> None:
    """Load what the verifiers need, so that a worker's first answer is as fast as its others."""
    math_equal("x + 1", "y")


def verdict_at_once(verifier: str, response: str, answer: str | Sequence[str]) -> Verdict | None:
    """Return the verdict where a look is enough, so that it needs no worker process.

    That is where a response holds no answer, or where answer and gold are whole numbers. It takes
    time in proportion to the response, and gives what the verifier itself would.

    Args:
        verifier: path, such as ``"lmrl_env.verifiers:boxed_math"``; of the others nothing is
            known.
        response: see ``Verifier``.
        answer: see ``Verifier``.
    """
    module, _, name = verifier.partition(":")
    find = _FIND.get(name) if module == "lmrl_env.verifiers" else None
    return None if find is None else _settle(*find(response), answer)


def _judge(content: str | None, missing: str, answer: str | Sequence[str]) -> Verdict:
    """Compare what was found in a response with each gold answer."""
    verdict = _settle(content, missing, answer)
    if verdict is not None:
        return verdict
    extracted, golds = _extract(content or ""), all_golds(answer)
    return compared(extracted, golds, any(math_equal(extracted, gold) for gold in golds))


def _settle(content: str | None, missing: str, answer: str | Sequence[str]) -> Verdict | None:
    """Return the verdict if there is no answer, or only whole numbers are to be compared."""
    if content is None:
        return Verdict(0.0, "unparseable", detail=missing)
    extracted, golds = _extract(content), all_golds(answer)
    if not extracted:
        return Verdict(0.0, "unparseable", extracted, "the answer is empty")
    if not all(_WHOLE_NUMBER.fullmatch(text) for text in (extracted, *golds)):
        return None
    return compared(extracted, golds, any(int(extracted) == int(gold) for gold in golds))


_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


def _extract(content: str) -> str:
    """Return an answer without the box that it may stand in."""
    box = last_box(content)
    return (content if box is None else box).strip()


def _find_box(response: str) -> tuple[str | None, str]:
    return last_box(response), r"no complete \boxed{...}"


def _find_tag_after_thinking(response: str) -> tuple[str | None, str]:
    _, closed, rest = response.partition("</think>")
    if not closed:
        return None, "no </think>"
    return last_tag(rest), "no <answer>...</answer> after </think>"


def _find_tag_or_box(response: str) -> tuple[str | None, str]:
    content = marked_answer(response)
    if content is None:
        content = last_tag(response)
    if content is None:
        content = last_box(response)
    return content, r"neither <answer>...</answer> nor a complete \boxed{}"


def _find_last_number(response: str) -> tuple[str | None, str]:
    text = after_thinking(response)
    _, mark, rest = text.rpartition("####")
    return last_number_in(rest.strip().split("\n")[0] if mark else text), "no number"


_FIND = {
    "boxed_math": _find_box,
    "answer_tag_math": _find_tag_after_thinking,
    "math_answer": _find_tag_or_box,
    "last_number": _find_last_number,
}
