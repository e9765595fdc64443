"""What a verifier is, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from lmrl_env.types import Question

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
    """Judges one response.

    Any function of this signature is a verifier; further keyword arguments need a default, and
    ``functools.partial`` or a path such as ``"my_module:mine(strict=True)"`` sets them.
    """

    def __call__(
        self, response: str, answer: str | Sequence[str], *, question: Question | None = None
    ) -> Verdict:
        """Return the verdict.

        Args:
            response: the text that followed the prompt.
            answer: the gold answer; several where any one of them counts as right.
            question: the whole row, for verifiers that need more than the answer.
        """


def all_golds(answer: str | Sequence[str]) -> tuple[str, ...]:
    """Return the gold answers, of which any one suffices."""
    return (answer,) if isinstance(answer, str) else tuple(answer)


def compared(extracted: str, golds: Sequence[str], is_right: bool) -> Verdict:
    """Return the verdict on an answer that was found and compared with each gold answer."""
    if is_right:
        return Verdict(1.0, "correct", extracted)
    return Verdict(0.0, "wrong", extracted, f"expected {' or '.join(golds)}")
