"""Records that cross module boundaries, and the letters of their shapes.

=====  ==========================================================
N      slots of the vector env; responses of a rollout batch
G      responses to one question, the group size; adjacent rows
P      prompt tokens, the widest prompt of the batch or the set
K      response tokens, at most ``max_new_tokens``
V      vocabulary: the ids that the tokenizer can emit
=====  ==========================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length"]
"""``stop``: the policy ended (EOS or a stop string). ``length``: the token budget did."""


class Question(NamedTuple):
    """One row of a question set.

    Attributes:
        id: stable name within its source, such as ``gsm8k/test/0``.
        question: the text that a template wraps.
        answer: the gold answer; several where any one of them counts as right.
        extra: the other columns of the row, such as ``level``.
    """

    id: str
    question: str
    answer: str | tuple[str, ...]
    extra: Mapping[str, Any] = MappingProxyType({})


class Sampling(NamedTuple):
    """How an engine draws tokens.

    Attributes:
        max_new_tokens: the budget K, at least 1.
        temperature: divides the logits; 0 is greedy.
        top_p: nucleus mass; below 1 the support is cut and importance ratios are biased.
        top_k: number of tokens kept; -1 keeps all.
        stop: strings that end a response; the token that completes one is kept.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()


class Completion(NamedTuple):
    """One sampled response.

    Attributes:
        token_ids: shape (k,), int32, 1 <= k <= K; a final EOS or stop token is included.
        logprobs: shape (k,), float32, nats: log-probability of each token under the
            distribution that was really sampled, temperature and truncation included.
        finish_reason: why it ended.
        version: of the weights that produced it.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    finish_reason: FinishReason
    version: int


class BatchTotals(NamedTuple):
    """Counts over one whole optimiser step: all micro-batches of all ranks.

    Losses divide by these, never by the shape of the tensor at hand, so that a micro-batch's
    loss is its share of the full objective however the batch is cut.

    Attributes:
        responses: number of responses.
        tokens: number of tokens that are actions.
        max_new_tokens: the budget K of one response.
    """

    responses: int
    tokens: int
    max_new_tokens: int
