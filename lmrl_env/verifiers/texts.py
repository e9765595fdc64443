"""Verifiers of answers that are compared as text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmrl_env.types import Question
from lmrl_env.verifiers.extraction import after_thinking, marked_answer
from lmrl_env.verifiers.verdict import Verdict, all_golds, compared


def exact(
    response: str, answer: str | Sequence[str], *, question: Question | None = None
) -> Verdict:
    r"""Judge whether the answer is the gold answer character for character.

    The answer is the last ``<answer>...</answer>`` after the thinking, else the last
    ``\boxed{...}``, else all that follows the thinking. White space at the ends does not count,
    and a run of it counts as one space; case counts.

    >>> exact("<answer> New\n York </answer>", "New York").status
    'correct'
    >>> exact("new york", "New York").status
    'wrong'
    """
    marked = marked_answer(response)
    return _same_text(after_thinking(response) if marked is None else marked, answer)


def regex(
    response: str,
    answer: str | Sequence[str],
    *,
    question: Question | None = None,
    pattern: str = r"(?s)(.*)",
) -> Verdict:
    r"""Judge what a pattern finds last in the response, as ``exact`` compares it.

    >>> regex("Answer: 3\nAnswer: 4", "4", pattern=r"Answer: (\d+)").status
    'correct'

    Args:
        response: see ``Verifier``.
        answer: see ``Verifier``.
        question: see ``Verifier``.
        pattern: a regular expression of Python's ``re``; its first group is the answer, or all of
            it where it has no group.

    Raises:
        re.error: if the pattern is none.
    """
    found = None
    for match in re.finditer(pattern, response):
        found = match
    content = None if found is None else found[1 if found.re.groups else 0]
    if content is None:
        return Verdict(0.0, "unparseable", detail=f"nothing matches {pattern}")
    return _same_text(content, answer)


def _same_text(content: str, answer: str | Sequence[str]) -> Verdict:
    extracted, golds = " ".join(content.split()), all_golds(answer)
    if not extracted:
        return Verdict(0.0, "unparseable", extracted, "the answer is empty")
    return compared(extracted, golds, any(extracted == " ".join(gold.split()) for gold in golds))


_ITEM = re.compile(r" ?(?:[,;&]|and\b|or\b)? ?(\(?)([A-J])(?![A-Za-z0-9'])(\)?)")
_LABEL = re.compile(r"(?<![A-Za-z])[A-J] ?[.:)]")
_SAID = re.compile(r"(?i:\b(?:answer|choice|option)s?(?: (?:is|are))? ?:? ?)(?=[($*\\]*[A-Zt])")


def choice(
    response: str, answer: str | Sequence[str], *, question: Question | None = None
) -> Verdict:
    r"""Judge the letter of a multiple choice, A to J.

    It stands alone in the last ``<answer>...</answer>`` after the thinking, else in the last
    ``\boxed{...}``, else alone in the last line or after the last ``answer is``: ``B``, ``(B)``,
    ``B. 42`` or ``\text{B}``. Several letters must all be right, in any order.

    >>> choice("So the answer is (B).", "B").status
    'correct'
    >>> choice(r"\boxed{A, C}", "C, A").extracted
    'A, C'
    """
    content = marked_answer(response)
    letters = _letters(content) if content is not None else _said_letters(after_thinking(response))
    if not letters:
        return Verdict(0.0, "unparseable", content, "no letter of a choice")
    golds = all_golds(answer)
    return compared(", ".join(letters), golds, any(letters == _letters(gold) for gold in golds))


def _letters(text: str) -> list[str]:
    r"""Return the letters that an answer names, sorted; none if it is anything else."""
    letters, rest, closed = _leading_letters(text)
    is_label = not rest or rest[0] in ".:" or closed  # "B. 42" and "(B) 42", but not "A dog"
    return letters if is_label and not _LABEL.search(rest) else []


def _leading_letters(text: str) -> tuple[list[str], str, bool]:
    """Return the letters that a text begins with, the rest, and whether a bracket closes them."""
    bare = re.sub(r"\\(?:text|mathrm|textbf|mathbf|boxed)\b|[$*{}]", "", text)
    bare = " ".join(bare.split()).rstrip(".")
    if re.fullmatch("[A-J]{2,5}", bare):
        return sorted(set(bare)), "", False
    letters, end, closed = set(), 0, False
    while item := _ITEM.match(bare, end):
        letters.add(item[2])
        end, closed = item.end(), bool(item[3])
    return sorted(letters), bare[end:], closed


def _said_letters(text: str) -> list[str]:
    """Return the letters that a text without a mark answers."""
    lines = text.strip().splitlines()
    if lines and (letters := _letters(lines[-1])):
        return letters
    *before, said = _SAID.split(text)
    letters, rest, closed = _leading_letters(said.split("\n")[0])
    ends = not rest or closed or re.match(r"[,.;:]| (?:because|since|as)\b", rest)
    return letters if before and ends else []
