"""Evaluation questions that a training set holds too: an accuracy on them measures memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

from lmrl_env.questions.question_set import QuestionSet, normalised
from lmrl_env.types import Question

logger = logging.getLogger(__name__)

_SHOWN = 5


def overlap(train: Iterable[Question], evaluation: Iterable[Question]) -> list[tuple[str, str]]:
    r"""Return the ids of the questions that two sets share.

    Two questions are the same if their texts are, up to white space and case; or if their texts
    and one of their answers consist of the same letters and digits, however they are typeset, as
    ``$\frac{1}{2}$`` and ``\frac 12``. A question that is reworded is not found.

    >>> asked = Question("test/0", "What is $1 + 1$?", "2")
    >>> overlap([Question("train/7", "what is  $1 + 1$?", "two")], [asked])
    [('test/0', 'train/7')]

    Args:
        train: questions to learn from.
        evaluation: questions to evaluate on.

    Returns:
        For each evaluation question that is in the training set its id, and the id of the first
        training question that it is.
    """
    known: dict[object, str] = {}
    for question in train:
        for key in _keys(question):
            known.setdefault(key, question.id)
    return [
        (question.id, known[found[0]])
        for question in evaluation
        if (found := [key for key in _keys(question) if key in known])
    ]


def warn_of_overlap(train: QuestionSet, evaluation: QuestionSet) -> str:
    """Warn if a training set holds questions of an evaluation set.

    Returns:
        The warning, or an empty text if they share none.
    """
    shared = overlap(train, evaluation)
    if not shared:
        return ""
    pairs = [f"{theirs} is {ours}" for theirs, ours in shared[:_SHOWN]]
    warning = (
        f"{len(shared):,} of the {len(evaluation):,} questions of {evaluation.name!r} are in the "
        f"training set {train.name!r}, so an accuracy there measures memory: "
        f"{', '.join(pairs)}{', ...' * (len(shared) > _SHOWN)}"
    )
    logger.warning(warning)
    return warning


def _keys(question: Question) -> Iterator[object]:
    """Yield what is equal for two questions that are the same."""
    yield normalised(question.question).casefold()
    characters = re.sub(r"[\W_]", "", question.question.casefold())
    answers = question.answer if isinstance(question.answer, tuple) else (question.answer,)
    if characters:
        yield from ((characters, re.sub(r"[^\w.-]", "", answer.casefold())) for answer in answers)
