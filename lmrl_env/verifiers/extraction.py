r"""Where a response gives its answer: tags, boxes, the last number, the last block of code.

Every function here takes time in proportion to the text, however hostile the text is.
"""

from __future__ import annotations

import re


def last_tag(text: str) -> str | None:
    """Return the content of the last ``<answer>...</answer>``."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end]


def last_box(text: str) -> str | None:
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


def after_thinking(text: str) -> str:
    """Return what follows the first ``</think>``, or the whole text where there is none."""
    before, closed, after = text.partition("</think>")
    return after if closed else before


def marked_answer(response: str) -> str | None:
    r"""Return the last ``<answer>...</answer>`` after the thinking, else the last box there.

    A box in the tag is opened.
    """
    text = after_thinking(response)
    tag = last_tag(text)
    box = last_box(text if tag is None else tag)
    content = tag if box is None else box
    return None if content is None else content.strip()


_AMOUNT = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?:[\^_]\{{?|\}}\{{|sqrt\{{)?  # part of a formula, which no number equals
    (?<![A-Za-z])(?:(?<![\w.)\]}}])[-\N{{MINUS SIGN}}])?(?:\\?\$)?(?:
        [0-9]*\\[dt]?frac\{{-?[0-9]+\}}\{{[0-9]+\}}
      | {_AMOUNT}\s?(?:\\times|\\cdot|×)\s?10\s?\^\s?(?:\{{-?[0-9]+\}}|[0-9]+)
      | {_AMOUNT}(?:\s?/\s?[0-9]+(?:\.[0-9]+)?)?(?:[eE][+-]?[0-9]+)?(?:\s?\\?%)?
    )
    (?:  # a power, a factor or a word that makes it another number
        \s?\^\s?\{{?-?[0-9]*\}}?
      | \s?\\(?:sqrt|pi|frac|times|cdot)(?![a-z])\s?\{{?[0-9]*\}}?
      | \s(?:hundred|thousand|million|billion|dozen)
    )?""",
    re.VERBOSE,
)


def last_number_in(text: str) -> str | None:
    r"""Return the last number of a text: an integer, decimal, fraction or percentage.

    What makes it a part of a larger number or formula comes with it: ``2^`` is not 2.

    >>> last_number_in("20 - 8 = 12, so 1,012.50 dollars.")
    '1,012.50'
    >>> last_number_in("a chance of 5/6"), last_number_in("none")
    ('5/6', None)
    """
    number = None
    for match in _NUMBER.finditer(text):
        number = match[0]
    return None if number is None else re.sub(r"\\?\$", "", number)


_PYTHON_FENCES = ("```", "```py", "```python", "```python3")


def last_code_block(text: str) -> str | None:
    r"""Return the content of the last complete fenced block of Python, or of no named language.

    >>> last_code_block("First\n```python\nx = 1\n```\nand that is it.")
    'x = 1\n'
    """
    block, start, fence = None, 0, ""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        mark = line.strip().lower()
        if not fence and mark.startswith("```"):
            start, fence = i + 1, mark
        elif fence and mark == "```":
            if fence in _PYTHON_FENCES:
                block = "".join(f"{line}\n" for line in lines[start:i])
            fence = ""
    return block
