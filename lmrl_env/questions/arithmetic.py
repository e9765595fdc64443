"""The built-in question set: grade-school word problems over + − × ÷ in one to three steps.

Every problem is a chain: a first number, then one to three operations, each applied to the result
so far. Every number that occurs lies between 2 and 99. A checksum of the expression (numbers and
operators, not the wording) puts it in the training or the held-out split, so that no held-out
expression is ever seen in training, however it is worded; a single operation of a longer held-out
chain may well be.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from types import MappingProxyType
from typing import Literal, NamedTuple

from lmrl_env.errors import ConfigurationError
from lmrl_env.questions.stories import NAMES, SITUATIONS, THINGS
from lmrl_env.types import Question

Split = Literal["train", "heldout"]

LEVELS = (1, 2, 3)
"""Difficulty levels: the number of operations of a problem."""

SMALLEST, LARGEST = 2, 99
"""Every number of every problem lies between them, both included."""

_HELDOUT_SHARE = 5  # one expression in so many is held out
_LARGEST_SUMMAND = 20
_LARGEST_FACTOR = 9
_MAX_TRIES = 1000  # in a row without a new question: then the set is exhausted


class Step(NamedTuple):
    """One operation.

    Attributes:
        left: the number it starts from.
        operator: one of ``+ - * /``.
        right: the number it applies.
        result: what comes out.
    """

    left: int
    operator: str
    right: int
    result: int


class Problem(NamedTuple):
    """A word problem and its solution.

    Attributes:
        question: the text.
        steps: one to three operations, each starting from the result of the one before.
    """

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        """The result of the last step."""
        return self.steps[-1].result


def _possible_steps() -> dict[str, dict[int, list[Step]]]:
    """Return every step that may occur, by operator and left number."""
    steps: dict[str, dict[int, list[Step]]] = {operator: {} for operator in "+-*/"}
    for left in range(SMALLEST, LARGEST + 1):
        candidates = [
            *(
                Step(left, "+", right, left + right)
                for right in range(SMALLEST, _LARGEST_SUMMAND + 1)
            ),
            *(
                Step(left, "-", right, left - right)
                for right in range(SMALLEST, _LARGEST_SUMMAND + 1)
            ),
            *(
                Step(left, "*", right, left * right)
                for right in range(SMALLEST, _LARGEST_FACTOR + 1)
            ),
            *(
                Step(left, "/", right, left // right)
                for right in range(SMALLEST, _LARGEST_FACTOR + 1)
                if left % right == 0
            ),
        ]
        for step in candidates:
            if SMALLEST <= step.result <= LARGEST:
                steps[step.operator].setdefault(left, []).append(step)
    return steps


_STEPS = _possible_steps()
_LEFTS = {operator: tuple(by_left) for operator, by_left in _STEPS.items()}


def split_of(steps: tuple[Step, ...]) -> Split:
    """Return the split to which an expression belongs.

    The expression is written as a text, the two numbers of a first sum or product in ascending
    order, so that 3 + 5 and 5 + 3 go together; one in five texts is held out by its CRC-32.

    >>> split_of((Step(3, "+", 5, 8),)) == split_of((Step(5, "+", 3, 8),))
    True
    """
    first = steps[0]
    left, right = first.left, first.right
    if first.operator in "+*":
        left, right = sorted((left, right))
    text = f"{left}{first.operator}{right}"
    text += "".join(f"{step.operator}{step.right}" for step in steps[1:])
    return "heldout" if zlib.crc32(text.encode()) % _HELDOUT_SHARE == 0 else "train"


def problems(split: Split, *, level: int | None = None, seed: int = 0) -> Iterator[Problem]:
    """Yield problems without end, with repetitions.

    Args:
        split: whose expressions; ``train`` or ``heldout``.
        level: 1, 2 or 3 steps; None draws the level of each problem.
        seed: of the draws; the two splits and the levels have streams of their own.

    Raises:
        ConfigurationError: if there is no such split or level.
    """
    if split not in ("train", "heldout"):
        raise ConfigurationError(
            f"unknown split {split!r} of the arithmetic questions: expected 'train' or 'heldout'"
        )
    if level is not None and level not in LEVELS:
        raise ConfigurationError(
            f"unknown level {level!r} of the arithmetic questions: expected one of {LEVELS}, the "
            "number of steps, or None for all of them"
        )
    rng = random.Random(f"{split} {level} {seed}")
    return _problems(split, LEVELS if level is None else (level,), rng)


def arithmetic_questions(
    split: Split, *, level: int | None = None, size: int = 10_000, seed: int = 0
) -> list[Question]:
    """Return distinct questions; a smaller set is the beginning of a larger one.

    >>> question = arithmetic_questions("train", level=1, size=1)[0]
    >>> question.id, question.extra["level"]
    ('arithmetic/train/0', 1)

    Args:
        split: whose expressions; ``train`` or ``heldout``. No expression is in both.
        level: 1, 2 or 3 steps; None mixes them evenly.
        size: number of questions, at least 1.
        seed: of the draws.

    Raises:
        ConfigurationError: if there is no such split or level, or not that many questions.
    """
    if size < 1:
        raise ConfigurationError(f"size={size} questions were asked for: expected at least 1")
    questions: dict[str, Question] = {}
    tries = 0
    for problem in problems(split, level=level, seed=seed):
        tries += 1
        if problem.question not in questions:
            questions[problem.question] = Question(
                id=f"arithmetic/{split}/{len(questions)}",
                question=problem.question,
                answer=str(problem.answer),
                extra=MappingProxyType({"level": len(problem.steps)}),
            )
            tries = 0
        if len(questions) == size:
            break
        if tries == _MAX_TRIES:
            raise ConfigurationError(
                f"size={size} questions of split {split!r} and level {level} were asked for, but "
                f"after {len(questions)} hardly any new one is left: lower size"
            )
    return list(questions.values())


def _problems(split: Split, levels: tuple[int, ...], rng: random.Random) -> Iterator[Problem]:
    while True:
        steps = _draw_steps(rng, rng.choice(levels))
        if split_of(steps) == split:
            yield Problem(_tell(rng, steps), steps)


def _draw_steps(rng: random.Random, level: int) -> tuple[Step, ...]:
    """Return a chain of steps, its operators drawn evenly from those that are possible."""
    operator = rng.choice("+-*/")
    steps = [rng.choice(_STEPS[operator][rng.choice(_LEFTS[operator])])]
    while len(steps) < level:
        value = steps[-1].result
        operator = rng.choice([operator for operator in "+-*/" if value in _STEPS[operator]])
        steps.append(rng.choice(_STEPS[operator][value]))
    return tuple(steps)


def _tell(rng: random.Random, steps: tuple[Step, ...]) -> str:
    """Return a story in which the steps happen."""
    situation = rng.choice(SITUATIONS)
    names = rng.sample(NAMES, len(steps) + 1)
    words = {"name": names[0], "things": rng.choice(THINGS), "a": steps[0].left}
    sentences = []
    remaining = list(enumerate(steps))
    if situation.start_and_change and rng.random() < 0.5:
        template = rng.choice(situation.start_and_change[steps[0].operator])
        sentences.append(template.format(b=steps[0].right, **words))
        remaining = remaining[1:]
    else:
        sentences.append(rng.choice(situation.start).format(**words))
    for i, step in remaining:
        template = rng.choice(situation.change[step.operator])
        sentences.append(template.format(b=step.right, last=names[i], friend=names[i + 1], **words))
    sentences.append(rng.choice(situation.ask).format(last=names[len(steps)], **words))
    return " ".join(sentences)
