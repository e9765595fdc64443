"""From logits and uniform random numbers to tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmrl_env.types import Sampling


def row_uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """Return uniforms in [0, 1) of a counter-based generator; a longer draw starts the same."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: shape (r, V), floating.
        uniforms: shape (r,), float64, in [0, 1).
        sampling: temperature, top_k and top_p, applied in this order.

    Returns:
        Tokens, (r,), int64, and their log-probabilities under what is left of the distribution,
        renormalised, (r,), float32.

    >>> halves = torch.tensor([[0.0, 0.0, -torch.inf]])
    >>> draw_tokens(halves, torch.tensor([0.6], dtype=torch.float64), Sampling(1))
    (tensor([1]), tensor([-0.6931]))
    """
    logits = logits.float()
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    all_logprobs = logits.log_softmax(-1)
    cumulative = all_logprobs.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # beyond it only where logits are not finite
    return tokens[:, 0], all_logprobs.gather(-1, tokens)[:, 0]
