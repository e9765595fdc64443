"""The verifier of numbers that need not be exact."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from lmrl_env.errors import ConfigurationError
from lmrl_env.math_equality import quantity
from lmrl_env.quantities import PERCENT, Unit
from lmrl_env.types import Question
from lmrl_env.verifiers.extraction import after_thinking, last_number_in, marked_answer
from lmrl_env.verifiers.verdict import Verdict, all_golds, compared


def numeric(
    response: str,
    answer: str | Sequence[str],
    *,
    question: Question | None = None,
    tolerance: float = 1e-6,
) -> Verdict:
    r"""Judge a number within a tolerance: |x - gold| <= tolerance * |gold|.

    A question whose row has an ``error`` column, as OlympiadBench's (He et al. 2024,
    arXiv:2402.14008), asks for |x - gold| <= error instead. The answer is the last
    ``<answer>...</answer>`` after the thinking, else the last ``\boxed{...}``, else the last
    number. Any formula with a real value is a number. A unit may be missing on one side, but two
    units must agree, as in ``math_equal``.

    >>> numeric(r"\boxed{\frac{\pi}{2}}", "1.57", tolerance=0.001).status
    'correct'
    >>> numeric("about 1.58", "1.57", tolerance=0.001).status
    'wrong'

    Args:
        response: see ``Verifier``.
        answer: see ``Verifier``.
        question: see ``Verifier``.
        tolerance: relative, at least 0.

    Raises:
        ConfigurationError: if the tolerance is negative, or no gold answer is a number.
    """
    if not tolerance >= 0:
        raise ConfigurationError(f"tolerance={tolerance}: expected a number that is at least 0")
    content = marked_answer(response)
    if content is None:
        content = last_number_in(after_thinking(response))
    if content is None:
        return Verdict(0.0, "unparseable", detail="no number")
    found = quantity(content)
    if found is None:
        return Verdict(0.0, "unparseable", content, "the answer is not a number")
    golds = all_golds(answer)
    wanted = [gold for gold in map(quantity, golds) if gold is not None]
    if not wanted:
        raise ConfigurationError(f"gold {answer!r}: expected a number for the verifier numeric")
    error = _absolute_error(question)
    is_right = any(
        abs(value - gold) <= (Fraction(tolerance) * abs(gold) if error is None else error)
        for value, gold in (pair for want in wanted for pair in _comparable(found, want))
    )
    return compared(content, golds, is_right)


def _comparable(
    found: tuple[Fraction, Unit], wanted: tuple[Fraction, Unit]
) -> list[tuple[Fraction, Fraction]]:
    """Return the pairs of values to compare: none where two units differ."""
    (value, unit), (gold, gold_unit) = found, wanted
    if unit and gold_unit and unit != gold_unit:
        return []
    if unit == PERCENT and not gold_unit:
        return [(value, gold), (value / 100, gold)]
    if gold_unit == PERCENT and not unit:
        return [(value, gold), (value, gold / 100)]
    return [(value, gold)]


def _absolute_error(question: Question | None) -> Fraction | None:
    """Return the tolerance of a question's row, if it states one."""
    stated = question and question.extra.get("error")
    if stated is None or stated == "":
        return None
    try:
        error = Fraction(str(stated).strip())
    except (ValueError, ZeroDivisionError):
        error = Fraction(-1)
    if error < 0:
        raise ConfigurationError(
            f"error={stated!r} in the row of question {question and question.id}: expected a "
            "number that is at least 0, such as '1e-1'"
        )
    return error
