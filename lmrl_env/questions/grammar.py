"""The names of question sets: one set with its options, or a mixture of several."""

from __future__ import annotations

import re
from typing import NamedTuple

from lmrl_env.errors import ConfigurationError

_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_WEIGHT = re.compile(rf":({_NUMBER})(?:,|$)")
_RANGE = re.compile(rf"({_NUMBER})(?:-({_NUMBER}))?")


class SetName(NamedTuple):
    """The name of one question set, taken apart.

    Attributes:
        text: as it was written, without the weight.
        source: what stands before the options: a name, a file, a folder or a hub id.
        options: by key.
    """

    text: str
    source: str
    options: dict[str, str]

    def check_keys(self, known: tuple[str, ...]) -> None:
        """Refuse an option that is empty or not known.

        Raises:
            ConfigurationError: names it and the known keys.
        """
        for key, value in self.options.items():
            if key not in known or not value:
                raise ConfigurationError(
                    f"{key}={value} in the question set {self.text!r}: expected key=value with one "
                    f"of the keys {', '.join(known)}"
                )

    def number_range(self, key: str) -> tuple[float, float]:
        """Return the two ends of an option such as ``3-5``, or of a single number.

        Raises:
            ConfigurationError: if it is anything else.
        """
        match = _RANGE.fullmatch(self.options[key])
        low, high = (float(match[1]), float(match[2] or match[1])) if match else (1.0, 0.0)
        if low > high:
            raise ConfigurationError(
                f"{key}={self.options[key]} in the question set {self.text!r}: expected a number, "
                "or a range such as 3-5 or 0.2-0.8"
            )
        return low, high


def parse_set(text: str) -> SetName:
    """Split a set's name from its options, at the first colon that a key follows.

    >>> parse_set("openai/gsm8k:config=main,split=train").options
    {'config': 'main', 'split': 'train'}
    """
    match = re.fullmatch(r"(.+?):(\w+=.*)", text, re.DOTALL)
    if match is None:
        return SetName(text, text, {})
    pairs = [option.partition("=") for option in match[2].split(",")]
    return SetName(text, match[1], {key: value for key, _, value in pairs})


def parse_mixture(text: str) -> list[tuple[SetName, float]]:
    """Split a mixture into its sets and their shares; a weight ends a set's name.

    >>> [(part.text, share) for part, share in parse_mixture("math-12k:level=3-5:3,gsm8k:1")]
    [('math-12k:level=3-5', 0.75), ('gsm8k', 0.25)]

    Returns:
        The sets with their shares, which sum to 1; a single set without a weight has share 1.

    Raises:
        ConfigurationError: if some sets have a weight and some have none, if there is only one,
            or if a
            share is below a thousandth.
    """
    *parts, rest = _WEIGHT.split(text)
    if not parts:
        return [(parse_set(text), 1.0)]
    names, weights = parts[::2], [float(weight) for weight in parts[1::2]]
    shares = [weight / (sum(weights) or 1) for weight in weights]
    if rest or text.endswith(",") or len(names) < 2 or not all(names) or min(shares) < 0.001:
        raise ConfigurationError(
            f"the question set {text!r} has a weight but is no mixture: expected two sets or more, "
            "each with a weight, none below a thousandth of their sum, such as "
            "'gsm8k:0.7,asdiv:0.3'"
        )
    return [(parse_set(name), share) for name, share in zip(names, shares, strict=True)]
