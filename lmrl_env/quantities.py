r"""Plain numbers and their units, read exactly and without symbolic work."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

Unit = frozenset[tuple[str, int]]
"""Names of units and their powers: ``m/s^2`` is meter to the 1 and second to the -2."""

PERCENT: Unit = frozenset({("percent", 1)})

_UNIT_NAMES = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimetre",
        "cm centimeter centimetre",
        "meter m metre",
        "km kilometer kilometre",
        "inch inche in",
        "foot feet ft",
        "yard yd",
        "mile mi",
        "gram g",
        "mg milligram",
        "kg kilogram",
        "pound lb",
        "ounce oz",
        "second s sec",
        "ms millisecond",
        "minute min",
        "hour h hr",
        "year yr",
        "liter L l litre",
        "mL ml milliliter millilitre",
        "newton N",
        "joule J",
        "watt W",
        "kW kilowatt",
        "volt V",
        "ampere A amp",
        "kelvin K",
        "celsius C",
        "fahrenheit F",
        "Hz hertz",
        "pascal Pa",
        "mole mol",
        "radian rad",
        "ohm Ω",
        "cent ¢",
        "dollar usd $",
        "euro €",
        "percent %",
        "degree deg circ °",
        "am AM",
        "pm PM",
    )
    for alias in names.split()
}
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_COMPOUND_WORDS = {"mph": {"mile": 1, "hour": -1}, "kmh": {"km": 1, "hour": -1}}
_NOT_UNITS = frozenset(
    re.findall(
        r"\w+",
        "and or to of not is plus minus times over by mod pi point half halve quarter third choose "
        "dozen hundred thousand million billion trillion factorial squared cubed root for if where "
        "sin cos tan log exp sqrt max gcd lcm infinity",
    )
)

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_PLAIN_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*(?:
        (?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[+-]?[0-9]{{1,3}}))?
      | (?P<start>[0-9]*\.[0-9]*)\\(?:overline|bar)\s*\{{(?P<period>[0-9]+)\}}
      | (?:(?P<whole>[0-9]+)\s+)?(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})
      | (?P<frac_whole>[0-9]*)\s*\\frac\s*(?:
            \{{\s*(?P<frac_top>[+-]?{_DECIMAL})\s*\}}\s*\{{\s*(?P<frac_bottom>{_DECIMAL})\s*\}}
          | (?P<digit_top>[0-9])\s*(?P<digit_bottom>[0-9])
        )
      | (?:(?P<mantissa>{_DECIMAL})\s*(?:\\times|\\cdot|[×·*])\s*)?
        10\s*\^\s*(?:\{{\s*(?P<power>[+-]?[0-9]{{1,3}})\s*\}}|(?P<digit_power>[0-9]{{1,3}}))
    )""",
    re.VERBOSE,
)

TEXT = r"\\(?:text|textbf|textrm|textit|textnormal|mbox|mathrm|mathbf)\s*"
"""Commands that typeset their argument as text."""

_POWER = r"(?:\s*\^\s*\{?-?[0-9]\}?)?"
_WORD = (
    "(?:[A-Za-z]{3,}|"
    + "|".join(sorted(n for n in _UNIT_NAMES if n.isalpha() and len(n) == 2))
    + r"|sq|cu)\.?"
)
_UNIT = re.compile(
    rf"""(?<=[0-9A-Za-z}})\s])(?:
        (?:{TEXT}\{{[^{{}}]*\}}{_POWER}\s*)+
      | (?<=\s){_WORD}(?:\s+{_WORD})*{_POWER}
      | (?<=[0-9])(?:cm|mm|km|kg|am|pm|%|¢|°|€)
      | \s(?:[ap]\.m|[AP]\.M|[AP]M|€)
      | \s*\\% | \s*(?:\^\s*\{{?\s*\\circ\s*\}}?|°|\\degree)\s*[CF]?
    )$""",
    re.VERBOSE,
)
_SYMBOL = rf"(?:{'|'.join(sorted((n for n in _UNIT_NAMES if 0 < len(n) < 4), key=len)[::-1])})"
_SYMBOLS = re.compile(
    rf"(?<=[0-9}}])(\s*)({_SYMBOL}{_POWER}(?:\s?(?:/|\*|·|\\cdot)?\s?{_SYMBOL}{_POWER})*)$"
)
_NUMERAL_IN_BASE = re.compile(r"(-?[0-9A-Z]+(?:\.[0-9A-Z]+)?)\s*_\s*\{?\s*([0-9]+)\s*\}?")


def split_unit(text: str, *, letters: bool) -> tuple[str, Unit]:
    """Return an answer without its unit, and the unit.

    Args:
        text: one answer.
        letters: whether a bare letter behind a number is a unit, as in ``6 m``, or a variable.
    """
    numeral = _NUMERAL_IN_BASE.fullmatch(text)
    if numeral:
        return numeral[1], frozenset({("base", int(numeral[2]))})
    currency = re.match(r"\\\$|€", text)
    if currency:
        return text[currency.end() :].strip(), frozenset({(_UNIT_NAMES[currency[0][-1]], 1)})
    symbols = _SYMBOLS.search(text)
    if symbols:
        number = text[: symbols.start()]
        is_letter = len(symbols[2]) == 1
        spaced = letters and (symbols[1] or not is_letter)
        if plain_number(number) is not None and (spaced or not re.match(r"\w(?!\w)", symbols[2])):
            return number.strip(), _unit(symbols[2]) or frozenset()
    found = _UNIT.search(text)
    if not found or re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s*$", text[: found.start()]):
        return text, frozenset()  # "3 or four" is not 3 of a unit
    unit = _unit(found[0])
    return (text, frozenset()) if unit is None else (text[: found.start()].strip(), unit)


def _unit(text: str) -> Unit | None:
    """Return the unit that words or symbols name, or None where they are no unit."""
    powers: Counter[str] = Counter()
    sign, power, last = 1, 1, ""
    text = re.sub(rf"{TEXT}|\\cdot|\.", " ", re.sub(r"([ap])\.m", r"\1m", text, flags=re.I))
    for word in re.findall(r"[A-Za-z]+|\^\s*\{?-?[0-9]|[%¢°€Ω/]", text):
        if word.startswith("^"):
            powers[last] += sign * (int(re.sub(r"[^-0-9]", "", word)) - 1)
        elif word in ("/", "per"):
            sign = -1
        elif word.lower() in _POWER_WORDS:
            power = _POWER_WORDS[word.lower()]
        elif word.lower() in _COMPOUND_WORDS:
            powers.update(_COMPOUND_WORDS[word.lower()])
        else:
            last = _unit_name(word)
            if last in _NOT_UNITS:
                return None
            powers[last] += sign * power
            power = 1
    return frozenset((name, n) for name, n in powers.items() if n)


def _unit_name(word: str) -> str:
    """Return the usual name of a unit: short symbols keep their case, mW is not MW."""
    if word in _UNIT_NAMES:
        return _UNIT_NAMES[word]
    lower = word.lower()
    singular = lower.removesuffix("s") if len(word) > 2 else lower
    if lower in _NOT_UNITS or singular in _NOT_UNITS:
        return lower if lower in _NOT_UNITS else singular
    known = _UNIT_NAMES.get(lower) or _UNIT_NAMES.get(singular)
    return (known if len(word) > 1 else None) or (singular if len(word) > 3 else word)


def plain_number(text: str) -> Fraction | None:
    r"""Return the exact value of a plain number, or None if the text is anything else.

    >>> plain_number("1,080"), plain_number(r"3\frac{1}{2}"), plain_number(r"0.\overline{3}")
    (Fraction(1080, 1), Fraction(7, 2), Fraction(1, 3))
    """
    if len(text) > 200:
        return None
    match = _PLAIN_NUMBER.fullmatch(text.strip())
    if not match:
        return None
    part = {name: value.replace(",", "") for name, value in match.groupdict("").items()}
    top = part["top"] or part["frac_top"] or part["digit_top"]
    bottom = part["bottom"] or part["frac_bottom"] or part["digit_bottom"]
    if bottom:
        if Fraction(bottom) == 0:
            return None
        value = Fraction(part["whole"] or part["frac_whole"] or 0)
        value += Fraction(top) / Fraction(bottom)
    elif part["period"]:
        places = len(part["start"].partition(".")[2])
        repeated = Fraction(int(part["period"]), 10 ** len(part["period"]) - 1)
        value = Fraction("0" + part["start"] + "0") + repeated / 10**places
    elif part["decimal"]:
        value = Fraction(part["decimal"]) * Fraction(10) ** int(part["exponent"] or 0)
    else:
        power = int(part["power"] or part["digit_power"])
        value = Fraction(part["mantissa"] or 1) * Fraction(10) ** power
    return -value if part["sign"] == "-" else value
