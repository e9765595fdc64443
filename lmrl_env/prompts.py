"""The prompts of a question set, rendered and tokenised, and the order in which they are asked."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from lmrl_env.errors import PromptTooLongError
from lmrl_env.questions import QuestionSet
from lmrl_env.templates import Template
from lmrl_env.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class PromptTable:
    """The prompts of a question set, rendered and tokenised once.

    Questions whose prompt leaves no room for a response in the model's context are dropped, and
    counted in ``dropped``.

    Attributes:
        questions: the questions that fit; a question's id in the environment is its index here.
        width: P, tokens of the longest prompt.
        dropped: number of questions that do not fit.
    """

    def __init__(
        self, questions: QuestionSet, template: Template, tokenizer: Tokenizer, max_new_tokens: int
    ):
        room = tokenizer.context_length - max_new_tokens
        token_ids = tokenizer.encode_prompts([template.render(q.question) for q in questions])
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        fits = np.flatnonzero(lengths <= room)
        if not len(fits):
            raise PromptTooLongError(
                f"none of the {len(questions)} prompts of {questions.name!r} fits: the shortest "
                f"has {lengths.min(initial=0)} tokens, and max_new_tokens={max_new_tokens} leaves "
                f"{room} of the model's context of {tokenizer.context_length}; lower "
                "max_new_tokens or take a model with a longer context"
            )
        self.dropped = len(questions) - len(fits)
        if self.dropped:
            questions = questions.subset(fits)
            logger.warning(
                "%s: dropped %d of %d questions, whose prompts are longer than the %d tokens that "
                "max_new_tokens=%d leaves of the model's context",
                questions.name,
                self.dropped,
                len(lengths),
                room,
                max_new_tokens,
            )
        self.questions = questions
        self._lengths = lengths[fits]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        self._token_ids = np.concatenate([np.asarray(token_ids[i], np.int32) for i in fits])
        self.width = int(self._lengths.max())

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, question_id: int) -> npt.NDArray[np.int32]:
        """Return the prompt's token ids, shape (<= P,), int32."""
        return self._token_ids[self._starts[question_id] : self._starts[question_id + 1]]


class QuestionStream:
    """Shuffles of a question set, epoch after epoch, each a function of its seed alone.

    Args:
        size: number of questions.
    """

    def __init__(self, size: int):
        self.size = size
        self._shuffles: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def question_id(self, seed: int, position: int) -> int:
        """Return the question at a position, counted over epochs, of the stream of a seed."""
        epoch, index = divmod(position, self.size)
        if self._shuffles.get(seed, (None,))[0] != epoch:
            shuffle = np.random.default_rng((seed, epoch)).permutation(self.size)
            self._shuffles[seed] = epoch, shuffle
        return int(self._shuffles[seed][1][index])
