r"""Formulas in plain text and Unicode, as models write them outside of LaTeX."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
_FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SYMBOLS = str.maketrans({"∞": r"\infty ", "∈": r"\in ", "π": r"\pi ", "，": ",", "º": "°"})
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(ln|log|exp|sin|cos|tan)(?=\s*[({\\0-9]|\s+[A-Za-z](?![A-Za-z])|[xy](?!\w))"
)


def to_latex(text: str) -> str:
    r"""Return a text with its Unicode mathematics, and bare names of functions, as LaTeX.

    >>> to_latex("½"), to_latex("3√2"), to_latex("10⁻⁷")
    ('\\frac{1}{2}', '3\\sqrt{2}', '10^{-7}')
    >>> to_latex("2*pi + ln(2)")
    '2\\cdot \\pi  + \\ln (2)'

    Args:
        text: an answer. What is LaTeX already stays as it is.
    """
    text = re.sub(r"(?<=[\w)}])\s*\*\*\s*\(?([+-]?\w+)\)?", r"^{\1}", text)
    text = re.sub("[\uff01-\uff5e]+", lambda wide: _plain(wide[0]), text)
    text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda power: f"^{{{_plain(power[0])}}}", text)
    text = re.sub(f"[{_SUBSCRIPTS}]+", lambda index: f"_{{{_plain(index[0])}}}", text)
    text = re.sub(f"[{_FRACTIONS}]", _fraction, text)
    text = text.translate(_SYMBOLS)
    text = re.sub(r"√\s*(?=\{)", r"\\sqrt", text)
    text = re.sub(r"√\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z](?![A-Za-z])))", _root, text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"(?<=[0-9A-Za-z)}])\s*\*\s*(?=[0-9A-Za-z(\\])", r"\\cdot ", text)
    text = re.sub(r"(?<=[0-9)])\s*·\s*(?=[0-9(\\])", r"\\cdot ", text)
    return _FUNCTION.sub(r"\\\1 ", text)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")


def _fraction(match: re.Match[str]) -> str:
    top, bottom = _plain(match[0]).split("\N{FRACTION SLASH}")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _root(match: re.Match[str]) -> str:
    return rf"\sqrt{{{match[1] or match[2]}}}"
