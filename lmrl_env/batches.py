"""Cutting the rows of a rollout into micro-batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmrl_env.kl import k3
from lmrl_env.packed_row import common_beginning
from lmrl_env.policy import Lengths, TokenBatch
from lmrl_env.rollout import Rollout
from lmrl_env.types import BatchTotals

Rows = npt.NDArray[np.int64]


class MicroBatch(NamedTuple):
    """Some rows of a rollout, as tensors.

    Attributes:
        rows: shape (n,), int64, indices into the rollout.
        tokens: what the policy reads.
        mask: shape (n, k), bool, True where a token was an action; k is the longest response.
        sampling_logprobs: shape (n, k), float32, nats, of the engine.
        last: whether it is the last one of its optimiser step.
    """

    rows: Tensor
    tokens: TokenBatch
    mask: Tensor
    sampling_logprobs: Tensor
    last: bool

    @property
    def width(self) -> int:
        """Return k, tokens of the longest response."""
        return self.mask.shape[1]

    def part(self, values: Tensor) -> Tensor:
        """Return these rows of values of the whole rollout: (N,) to (n,), (N, K) to (n, k)."""
        own = values[self.rows]
        return own if own.dim() == 1 else own[:, : self.width]


def micro_batch_rows(rollout: Rollout, rows: Rows, group_size: int, max_tokens: int) -> list[Rows]:
    """Cut rows into micro-batches of at most a number of tokens.

    A prompt counts once for all its responses in a micro-batch, as the policy reads it. A row
    that is longer than the budget stands alone.

    Args:
        rollout: the batch.
        rows: some of its rows, those of a group adjacent.
        group_size: G.
        max_tokens: prompt and response tokens of a micro-batch.
    """
    cuts: list[Rows] = []
    start, tokens = 0, 0
    for i, row in enumerate(rows):
        prompt, response = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        new_prompt = i == start or row // group_size != rows[i - 1] // group_size
        if i > start and tokens + prompt * new_prompt + response > max_tokens:
            cuts.append(rows[start:i])
            start, tokens, new_prompt = i, 0, True
        tokens += prompt * new_prompt + response
    if len(rows):
        cuts.append(rows[start:])
    return cuts


def micro_batches(
    rollout: Rollout, cuts: Sequence[Rows], group_size: int, device: torch.device | str
) -> Iterator[MicroBatch]:
    """Yield the micro-batches as tensors.

    An empty cut, which a rank gets that has fewer of them than another, becomes a row whose mask
    is False everywhere: it adds nothing to any sum.
    """
    for i, cut in enumerate(cuts):
        rows = cut if len(cut) else np.zeros(1, dtype=np.int64)
        groups, prompt_index = np.unique(rows // group_size, return_inverse=True)
        first = groups * group_size
        prompts = rollout.prompt_ids[first].tolist()
        prompt_lengths = rollout.prompt_lengths[first].astype(np.int64)
        lengths = Lengths(
            prompt_lengths,
            prompt_index,
            rollout.response_lengths[rows].astype(np.int64),
            common_beginning(
                [tuple(ids[:k]) for ids, k in zip(prompts, prompt_lengths, strict=True)]
            ),
        )
        width, prompt_width = int(lengths.responses.max()), int(lengths.prompts.max())
        tokens = TokenBatch(
            prompt_ids=_tensor(rollout.prompt_ids[first, :prompt_width], device).long(),
            prompt_lengths=_tensor(lengths.prompts, device),
            prompt_index=_tensor(prompt_index, device),
            response_ids=_tensor(rollout.response_ids[rows, :width], device).long(),
            response_lengths=_tensor(lengths.responses, device),
            lengths=lengths,
        )
        yield MicroBatch(
            rows=_tensor(rows, device),
            tokens=tokens,
            mask=_tensor(rollout.mask[rows, :width] & bool(len(cut)), device),
            sampling_logprobs=_tensor(rollout.sampling_logprobs[rows, :width], device),
            last=i == len(cuts) - 1,
        )


def _tensor(array: npt.NDArray[np.generic], device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def token_metrics(
    micro: MicroBatch,
    logprobs: Tensor,
    old_logprobs: Tensor,
    entropy: Tensor,
    totals: BatchTotals,
) -> dict[str, Tensor]:
    """Return a micro-batch's shares of what is measured of every algorithm.

    Both are means over all action tokens of the optimiser step, in nats: the policy's entropy,
    whose share keeps its gradient, and its divergence from the rollout's policy by k3.

    Args:
        micro: the micro-batch.
        logprobs: shape (n, k), of the policy.
        old_logprobs: shape (n, k), of the policy at rollout weights.
        entropy: shape (n, k), of the policy.
        totals: counts over the whole optimiser step.
    """
    divergence = k3(old_logprobs - logprobs.detach())
    return {
        "policy/entropy": (entropy * micro.mask).sum() / totals.tokens,
        "policy/approx_kl": (divergence * micro.mask).sum() / totals.tokens,
    }


@torch.no_grad()
def clip_fractions(ratio: Tensor, is_clipped: Tensor, totals: BatchTotals) -> dict[str, Tensor]:
    """Return a micro-batch's shares of the fractions of tokens whose ratio was clipped.

    Args:
        ratio: shape (n, k), or (n, 1) for one a response.
        is_clipped: shape (n, k), bool, at action tokens only.
        totals: counts over the whole optimiser step.
    """
    return {
        "policy/clip_fraction_low": (is_clipped & (ratio < 1)).sum() / totals.tokens,
        "policy/clip_fraction_high": (is_clipped & (ratio > 1)).sum() / totals.tokens,
    }
