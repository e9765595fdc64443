r"""Verifiers: pure functions from a response and a gold answer to a verdict.

A verifier is any function ``(response, answer, *, question=None) -> Verdict`` whose result depends
on its arguments only. It needs neither an environment nor a model, and may be slow or crash: a
``lmrl_env.grading.Grader`` contains it. Any one of several gold answers suffices for each.

===================  ==============================================================================
``boxed_math``       the last ``\boxed{...}``, as mathematics
``answer_tag_math``  the last ``<answer>...</answer>`` after the thinking, as mathematics
``math_answer``      the tag, else the box, as mathematics
``last_number``      the last number, or the one after ``####``
``numeric``          a number, within a tolerance
``exact``            the same text, up to white space
``choice``           the letter, or letters, of a multiple choice
``regex``            what a pattern finds, as text
``code``             Python that passes the tests of the question's row, in a sandbox
``llm_judge``        what a language model behind an OpenAI-compatible endpoint thinks
===================  ==============================================================================

Where one takes arguments, ``functools.partial(numeric, tolerance=0.01)`` sets them, or the path
``"numeric(tolerance=0.01)"`` on a command line.
"""

from __future__ import annotations

from lmrl_env.errors import UnknownNameError
from lmrl_env.math_equality import math_equal
from lmrl_env.templates import AnswerFormat
from lmrl_env.verifiers.judges import llm_judge
from lmrl_env.verifiers.mathematics import (
    answer_tag_math,
    boxed_math,
    last_number,
    math_answer,
    verdict_at_once,
    warm_up,
)
from lmrl_env.verifiers.numbers import numeric
from lmrl_env.verifiers.programs import code
from lmrl_env.verifiers.texts import choice, exact, regex
from lmrl_env.verifiers.verdict import Status, Verdict, Verifier

__all__ = [
    "NAMES",
    "VERIFIERS",
    "Status",
    "Verdict",
    "Verifier",
    "answer_tag_math",
    "boxed_math",
    "choice",
    "code",
    "exact",
    "last_number",
    "llm_judge",
    "math_answer",
    "math_equal",
    "numeric",
    "regex",
    "verdict_at_once",
    "verifier_for",
    "warm_up",
]

NAMES = (
    "boxed_math",
    "answer_tag_math",
    "math_answer",
    "last_number",
    "numeric",
    "exact",
    "choice",
    "regex",
    "code",
    "llm_judge",
)
"""The verifiers of this library."""

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
