"""Keys and values of a batch that only shrinks, in memory taken once for the whole budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class _BudgetLayer(CacheLayerMixin):
    """Keys and values of one layer, with room for the whole budget.

    Args:
        keys: shape (r, heads, P, d); kept in the type of the values, in which products are taken.
        values: as ``keys``.
        budget: tokens to make room for.
    """

    def __init__(self, keys: Tensor, values: Tensor, budget: int):
        super().__init__()
        self.is_initialized = True
        self.length = keys.shape[2]
        self.key_buffer, self.value_buffer = (
            torch.cat([x, x.new_empty(*x.shape[:2], budget, x.shape[3])], dim=2)
            for x in (keys.to(values.dtype), values)
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the memory is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token, (r, heads, 1, d), to the first r rows, and return those rows."""
        r = len(key_states)
        self.key_buffer[:r, :, self.length] = key_states[:, :, 0]
        self.value_buffer[:r, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return self.key_buffer[:r, :, : self.length], self.value_buffer[:r, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many places are attended to, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many places are filled."""
        return self.length

    def get_max_length(self) -> int:
        """Return how many places there are."""
        return self.key_buffer.shape[2]


class BudgetCache(Cache):
    """Keys and values of a batch that only shrinks.

    Args:
        prefilled: caches of different prompts, all of the same width.
        index: shape (r,), int64: the prompt, counted over all caches, that each row continues.
        budget: tokens to make room for.
        with_prompts: whether to begin with the prompts, or empty.
    """

    def __init__(
        self, prefilled: Sequence[Cache], index: Tensor, budget: int, *, with_prompts: bool = True
    ):
        width = None if with_prompts else 0
        self._budget_layers = [
            _BudgetLayer(
                torch.cat([part.keys[:, :, :width] for part in parts]).index_select(0, index),
                torch.cat([part.values[:, :, :width] for part in parts]).index_select(0, index),
                budget,
            )
            for parts in zip(*(cache.layers for cache in prefilled), strict=True)
        ]
        super().__init__(layers=list(self._budget_layers))

    def drop(self, ended: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Move rows from the end into the places of those that ended.

        Args:
            ended: shape (r,), over the rows that there were.

        Returns:
            Which of those rows now stands in each place, shape (rows left,).
        """
        left = len(ended) - int(ended.sum())
        kept = np.arange(left)
        holes = np.flatnonzero(ended[:left])
        kept[holes] = left + np.flatnonzero(~ended[left:])
        if len(holes):
            for layer in self._budget_layers:
                for buffer in (layer.key_buffer, layer.value_buffer):
                    buffer[holes, :, : layer.length] = buffer[kept[holes], :, : layer.length]
        return kept
