r"""Whether two mathematical answers are the same answer.

Plain numbers, with or without a unit, are compared exactly and without symbolic work. Everything
else goes to Math-Verify (Kydlíček 2025), whose known false positives are ruled out first.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import Any

from lmrl_env.plain_formulas import to_latex
from lmrl_env.quantities import PERCENT, TEXT, Unit, plain_number, split_unit

_LONGEST_FORMULA = 2000
"""Characters beyond which two answers are equal only if they are the same text."""

_NAMED = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?\s*="
    r"(?![^=]*(?:[;=]|,(?![0-9]{3}(?![0-9]))))\s*(.+)"
)
_PROSE = re.compile(
    r"(?!\([^()]*,[^()]*\)$)(?=.*[A-Za-z]{3}|\(?[A-Za-z]\)?(?:\s*,|\s*$))[A-Za-z()][A-Za-z()\s.,;'-]*"
)


def math_equal(prediction: str, gold: str) -> bool:
    r"""Return whether a predicted answer is the gold answer.

    Two plain numbers (integers, decimals, thousands commas, fractions, mixed numbers, powers of
    ten) must be exactly equal. A unit may be missing on one side, but two units must agree; 12%
    equals both 12 and 0.12. An irrational number may be given by six decimals. An empty gold
    answer, or the word None that exporters leave for a missing one, equals nothing.

    A hostile formula may take for ever: run this behind a ``Grader``.

    >>> math_equal(r"\frac{1}{2}", "0.5"), math_equal("1,080 apples", "1080")
    (True, True)
    >>> math_equal("(1, 2)", "(2, 1)"), math_equal("15 cm", "15 m"), math_equal("", "")
    (False, False, False)

    Args:
        prediction: what the response answers, LaTeX or plain text, without its box or tag.
        gold: the right answer.
    """
    predicted_number, gold_number = plain_number(prediction), plain_number(gold)
    if predicted_number is not None and gold_number is not None:  # nearly always, in arithmetic
        return predicted_number == gold_number
    if max(len(prediction), len(gold)) > _LONGEST_FORMULA:
        return prediction.strip() == gold.strip()
    prediction, gold = _normalise(prediction), _normalise(gold)
    if not prediction or not gold or gold == "None":
        return False
    if _same_text(prediction, gold):
        return True
    if _PROSE.fullmatch(prediction) and _PROSE.fullmatch(gold):
        return _listed_words(prediction) == _listed_words(gold)
    if ("=" in prediction) != ("=" in gold):
        prediction, gold = _without_name(prediction), _without_name(gold)
    prediction, predicted_unit = split_unit(prediction, letters=True)
    gold, gold_unit = split_unit(gold, letters=bool(predicted_unit))
    if predicted_unit and gold_unit and predicted_unit != gold_unit:
        return False
    predicted_number, gold_number = plain_number(prediction), plain_number(gold)
    if predicted_number is not None and gold_number is not None:
        if predicted_unit == PERCENT and not gold_unit:
            return gold_number in (predicted_number, predicted_number / 100)
        if gold_unit == PERCENT and not predicted_unit:
            return predicted_number in (gold_number, gold_number / 100)
        return predicted_number == gold_number
    return _same_text(prediction, gold) or _symbolically_equal(prediction, gold)


def quantity(text: str) -> tuple[Fraction, Unit] | None:
    r"""Return the value and the unit of an answer, or None if it has no real value.

    >>> quantity(r"x = 2.5 \text{ cm}") == (Fraction(5, 2), {("cm", 1)})
    True

    Args:
        text: an answer, LaTeX or plain text; a formula is evaluated to float precision.
    """
    if len(text) > _LONGEST_FORMULA:
        return None
    number, unit = split_unit(_without_name(_normalise(text)), letters=True)
    value = plain_number(number)
    if value is None:
        try:
            value = Fraction(float(_parse(number)))
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            return None
    return value, unit


def _normalise(text: str) -> str:
    """Return the text without what introduces or typesets an answer but does not change it."""
    text = text.strip().replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    text = re.sub(r"(?<![\w)}])\*\*([^*]+)\*\*", r"\1", text)  # bold, and no power
    text = to_latex(text.removeprefix("**").removesuffix("**"))
    text = re.sub(r"^(?:the\s+)?(?:final\s+)?answer(?:\s+is\b\s*:?|\s*:)", "", text, flags=re.I)
    text = re.sub(r"(?<=[0-9])(?:\\,|,\\!\s*)(?=[0-9]{3})", ",", text)
    text = re.sub(r"\\(?:boldsymbol|bm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\varnothing(?![A-Za-z])", r"\\emptyset", text)
    text = re.sub(r"(?<!\\)\\(?:[!()\[\]]|(?:left|right|displaystyle)(?![A-Za-z]))", "", text)
    text = re.sub(r"(?<!\\)\\(?:[,;:\s]|q?quad(?![A-Za-z]))|[~\s]+", " ", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\[lr]angle(?![A-Za-z])", lambda side: "()"[side[0] == r"\rangle"], text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2:  # a price, not mathematics between dollars
        text = re.sub(r"(?<!\\)\$(?=\s*[0-9.])", r"\\$", text, count=1)
    text = re.sub(r"(?<!\\)\$", "", text).strip()
    text = re.sub(r"^\\approx(?![A-Za-z])", "", text).strip().rstrip(".,;: ")
    if re.fullmatch(rf"(?:[A-Za-z\s.,;()'-]|{TEXT}\{{[^{{}}]*\}})+", text):
        text = re.sub(rf"{TEXT}\{{([^{{}}]*)\}}", r"\1", text).strip()
    return text.rstrip(".,;: ")


def _same_text(a: str, b: str) -> bool:
    """Return whether two texts differ in insignificant spaces at most."""
    spaces = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
    return spaces.sub("", a) == spaces.sub("", b)


def _without_name(text: str) -> str:
    """Return the right-hand side of a single ``x = ...``, and any other text as it is."""
    named = _NAMED.fullmatch(text)
    return named[1] if named else text


def _listed_words(text: str) -> Counter[str]:
    """Return the items of an answer in words, such as ``east`` or ``A, C and D``."""
    items = (item.strip(" ().") for item in re.split(r"[,;]|\band\b|\bor\b", text))
    return Counter(item.casefold() if len(item) > 1 else item for item in items if item)


def _symbolically_equal(prediction: str, gold: str) -> bool:
    """Ask Math-Verify, and check its consent where it is known to consent too easily."""
    predicted_value, gold_value = _parse(prediction), _parse(gold)
    if predicted_value is None or gold_value is None:
        return False
    from math_verify import verify

    predicted_value, gold_value = _with_imaginary_unit([predicted_value, gold_value])
    return (
        verify(gold_value, predicted_value, allow_set_relation_comp=True, timeout_seconds=None)
        and _no_false_equation(predicted_value)
        and _same_number_of_items(predicted_value, gold_value)
        and _numerically_close(predicted_value, gold_value)
    )


@lru_cache(maxsize=512)
def _parse(latex: str) -> Any:
    """Return the SymPy value of a formula, or None if it has none."""
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    # They warn that their own time limits are off, which work by signals in the main thread only.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
        ),
    )
    # The first match alone: where the whole does not parse, a part of it is not the answer.
    values = parse(
        f"\\boxed{{{latex}}}",
        [config],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return values[0] if values else None


def _with_imaginary_unit(values: list[Any]) -> list[Any]:
    """Return the values with the letter i as the imaginary unit, where one of them means it.

    It does in an exponential, and where the parser makes a letter of it that is no real number.
    """
    from sympy import Basic, I, exp

    if not all(isinstance(value, Basic) for value in values):
        return values
    letters = {s for value in values for s in value.free_symbols if s.name == "i"}
    powers = (power for value in values for power in value.atoms(exp))
    is_meant = any(s.is_real is False for s in letters) or any(
        letters & power.free_symbols for power in powers
    )
    return [value.subs(dict.fromkeys(letters, I)) for value in values] if is_meant else values


def _no_false_equation(value: Any) -> bool:
    """Return whether every equation between constants holds: ``4 = 5`` must not pay for 5."""
    from sympy import Eq

    equations = value.atoms(Eq)
    return all(e.free_symbols or _numerically_close(e.lhs, e.rhs) for e in equations)


def _same_number_of_items(a: Any, b: Any) -> bool:
    """Return whether two lists are equally long: as sets, 2, 2, 3 and 2, 3 would be the same."""
    from sympy import Expr, FiniteSet

    counts = [
        len(getattr(value, "_unsorted_args", value.args)) if isinstance(value, FiniteSet) else 1
        for value in (a, b)
        if isinstance(value, FiniteSet | Expr)
    ]
    return len(counts) < 2 or counts[0] == counts[1]


def _numerically_close(a: Any, b: Any) -> bool:
    """Return whether two expressions agree in relative terms: tiny constants are not all zero.

    The variables stand for arbitrary numbers. What has no numeric value is left to Math-Verify.
    """
    from sympy import Expr

    if not isinstance(a, Expr) or not isinstance(b, Expr):
        return True
    names = sorted({symbol.name for symbol in a.free_symbols | b.free_symbols})
    numbers = {name: 1.1 + 0.37 * i for i, name in enumerate(names)}
    try:
        x, y = (v.doit().subs({s: numbers[s.name] for s in v.free_symbols}).evalf() for v in (a, b))
        # Divided as SymPy's numbers, which do not underflow: 1/2008! is not 1/2004!.
        return bool(x == y or y == 0 or abs(complex(x / y) - 1) <= 1e-6)
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return True
