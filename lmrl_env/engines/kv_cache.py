"""Keys and values of a batch that only shrinks, in memory taken once for the whole budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class _BudgetLayer(CacheLayerMixin):
    """Keys and values of one layer, with room for the whole budget.

    Args:
        keys: shape (r, heads, P, d).
        values: as ``keys``.
        budget: tokens to make room for.
    """

    def __init__(self, keys: Tensor, values: Tensor, budget: int):
        super().__init__()
        self.is_initialized = True
        self.length = keys.shape[2]
        self.key_buffer, self.value_buffer = (_with_room(x, budget) for x in (keys, values))

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


def _with_room(x: Tensor, budget: int) -> Tensor:
    r, heads, length, d = x.shape
    buffer = x.new_empty(r, heads, length + budget, d)
    buffer[:, :, :length] = x
    return buffer


class BudgetCache(Cache):
    """Keys and values of a batch that only shrinks.

    Args:
        layers: keys and values to begin with of each layer, both of shape (r, heads, P, d).
        budget: tokens to make room for.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], budget: int):
        self._budget_layers = [_BudgetLayer(keys, values, budget) for keys, values in layers]
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
