"""The prompts of a question set, rendered and tokenised, and the order in which they are asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmrl_env.errors import PromptTooLongError
from lmrl_env.questions import Part, QuestionSet
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
        context_length: most tokens that the model can attend to.
    """

    def __init__(
        self, questions: QuestionSet, template: Template, tokenizer: Tokenizer, max_new_tokens: int
    ):
        self.context_length = tokenizer.context_length
        room = self.context_length - max_new_tokens
        token_ids = tokenizer.encode_prompts([template.render(q.question) for q in questions])
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        fits = np.flatnonzero(lengths <= room)
        if not len(fits):
            raise PromptTooLongError(
                f"none of the {len(questions)} prompts of {questions.name!r} fits: the shortest "
                f"has {min(lengths, default=0)} tokens, and max_new_tokens={max_new_tokens} leaves "
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
    """The endless order in which a set's questions are asked, a function of a seed alone.

    The parts of a mixture take turns in a fixed pattern of a thousand draws, as evenly as their
    shares allow, so that every batch has nearly its share of each. A part is asked epoch after
    epoch, each in a new shuffle, or each in the part's own order.

    >>> stream = QuestionStream([Part(np.array([0, 1]), 0.5), Part(np.array([2]), 0.5)])
    >>> [stream.question_id(0, position) for position in range(1, 8, 2)]
    [2, 2, 2, 2]

    Args:
        parts: of the set, ``QuestionSet.parts``, or the size of a set of one part.
    """

    PATTERN = 1000

    def __init__(self, parts: Sequence[Part] | int):
        self.parts = [Part(np.arange(parts))] if isinstance(parts, int) else list(parts)
        self._counts = _apportion([part.share for part in self.parts], self.PATTERN)
        turns = [
            ((draw + 0.5) / count, part, draw)
            for part, count in enumerate(self._counts)
            for draw in range(count)
        ]
        self._pattern = [(part, draw) for _, part, draw in sorted(turns)]
        self._shuffles: dict[tuple[int, int], tuple[int, npt.NDArray[np.int64]]] = {}

    def question_id(self, seed: int, position: int) -> int:
        """Return the question at a position, counted over epochs, of the stream of a seed."""
        block, offset = divmod(position, self.PATTERN)
        part, draw = self._pattern[offset]
        indices = self.parts[part].indices
        epoch, index = divmod(block * self._counts[part] + draw, len(indices))
        if self.parts[part].ordered:
            return int(indices[index])
        if self._shuffles.get((seed, part), (None,))[0] != epoch:
            shuffle = np.random.default_rng((seed, epoch, part)).permutation(len(indices))
            self._shuffles[seed, part] = epoch, shuffle
        return int(indices[self._shuffles[seed, part][1][index]])


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Return whole numbers that sum to a total, in proportion to shares, each at least 1.

    >>> _apportion([0.7, 0.3], 1000), _apportion([1 / 3, 1 / 3, 1 / 3], 1000)
    ([700, 300], [334, 333, 333])
    """
    counts = [max(1, int(share * total)) for share in shares]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        candidates = [part for part, count in enumerate(counts) if step == 1 or count > 1]
        counts[max(candidates, key=lambda part: step * (shares[part] * total - counts[part]))] += (
            step
        )
    return counts
