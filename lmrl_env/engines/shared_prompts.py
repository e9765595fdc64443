"""Attention of one new token a row to prompts that stand once for all their rows.

What all prompts begin with, such as the template's instructions, stands once for all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import Cache

from lmrl_env.engines.kv_cache import BudgetCache


class SharedPromptCache(BudgetCache):
    """Keys and values of a batch that only shrinks, a prompt's once for all its rows.

    It is the ``layout`` of ``packed_attention`` too. Rows stand in a grid, one line a prompt, so
    that a line's queries meet their prompt in one matrix product; and all of them in one line,
    to meet what is common to the prompts.

    Args:
        prefilled: caches of different prompts, all of the same width P.
        index: shape (r,), int64: the prompt, counted over all caches, that each row continues.
        budget: tokens to make room for.
        is_token: shape (prompts, P), bool: which places of the prompts are tokens; None if all.
        common: tokens that all prompts begin with, in the first places.

    Attributes:
        attended: how many layers have attended to this cache so far.
    """

    def __init__(
        self,
        prefilled: Sequence[Cache],
        index: Tensor,
        budget: int,
        is_token: Tensor | None,
        common: int = 0,
    ):
        super().__init__(prefilled, index, budget, with_prompts=False)
        layers = list(zip(*(cache.layers for cache in prefilled), strict=True))
        self.attended = 0
        self._common = common
        self._beginning = [
            (
                parts[0].keys[:1, :, :common].transpose(2, 3).contiguous(),
                parts[0].values[:1, :, :common].contiguous(),
            )
            for parts in layers
        ]
        self._prompts = [
            (
                torch.cat([part.keys[:, :, common:] for part in parts])
                .transpose(2, 3)
                .contiguous(),
                torch.cat([part.values[:, :, common:] for part in parts]),
            )
            for parts in layers
        ]
        self._padding = None if is_token is None else ~is_token[:, None, None, common:]
        self._index = index
        self._arrange()

    def drop(self, ended: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Move rows from the end into the places of those that ended.

        Args:
            ended: shape (r,), over the rows that there were.

        Returns:
            Which of those rows now stands in each place, shape (rows left,).
        """
        kept = super().drop(ended)
        self._index = self._index[torch.from_numpy(kept).to(self._index.device)]
        if len(kept):
            self._arrange()
        return kept

    def _arrange(self) -> None:
        """Place the rows in the grid, and forget prompts that no row continues."""
        alive, line, counts = self._index.unique(return_inverse=True, return_counts=True)
        if len(alive) < len(self._prompts[0][0]):
            self._prompts = [(keys[alive], values[alive]) for keys, values in self._prompts]
            self._padding = None if self._padding is None else self._padding[alive]
            self._index = line
        order = line.argsort(stable=True)
        place = torch.empty_like(line)
        place[order] = torch.arange(len(line), device=line.device)
        self._shape = len(counts), int(counts.max())
        self._cell = line * self._shape[1] + place - (counts.cumsum(0) - counts)[line]
        rows = torch.arange(len(line), device=line.device)
        self._row = torch.zeros(len(counts) * self._shape[1], dtype=torch.int64, device=line.device)
        self._row[self._cell] = rows
        self._is_grid = torch.equal(self._row, rows)  # as long as no row has ended

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Return softmax(query · keyᵀ) · value over the prompts and what has been written since.

        Args:
            module: the model's attention layer.
            query: shape (r, heads, 1, d).
            key: shape (r, key-value heads, t, d), of the responses so far.
            value: as ``key``.
            scaling: multiplies the scores; 1 / √d by default.

        Returns:
            Shape (r, 1, heads, d).
        """
        return self.attend_in_layer(int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]

    def attend_in_layer(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Return what ``attend`` does in the layer of an index."""
        self.attended += 1
        (first_keys, first_values), (own_keys, own_values) = (
            self._beginning[layer], self._prompts[layer]
        )  # fmt: skip
        r, heads, _, d = query.shape
        query = query.reshape(r, key.shape[1], -1, d) * (d**-0.5 if scaling is None else scaling)
        own_scores = self._to_grid(query) @ own_keys
        if self._padding is not None:
            own_scores.masked_fill_(self._padding, -torch.inf)
        scores = [self._to_rows(own_scores), query @ key.transpose(2, 3)]
        if self._common:
            scores.insert(0, _rows_of(_lines(query, 1) @ first_keys, r))
        weights = torch.cat(scores, dim=-1).softmax(-1).to(value.dtype)
        own, since = self._common, self._common + own_keys.shape[3]
        output = weights[..., since:] @ value
        output += self._to_rows(self._to_grid(weights[..., own:since]) @ own_values)
        if self._common:
            output += _rows_of(_lines(weights[..., :own], 1) @ first_values, r)
        return output.reshape(r, 1, heads, d)

    def _to_grid(self, rows: Tensor) -> Tensor:
        """Lay (r, h, q, x) out as (lines, h, cells of a line · q, x)."""
        return _lines(rows if self._is_grid else rows[self._row], self._shape[0])

    def _to_rows(self, grid: Tensor) -> Tensor:
        """Return the rows of a grid."""
        cells = _rows_of(grid, self._shape[1])
        return cells if self._is_grid else cells[self._cell]


def _lines(cells: Tensor, lines: int) -> Tensor:
    """Lay (lines · n, h, q, x) out as (lines, h, n · q, x)."""
    return cells.unflatten(0, (lines, -1)).transpose(1, 2).flatten(2, 3)


def _rows_of(lines: Tensor, n: int) -> Tensor:
    """Lay (lines, h, n · q, x) out as (lines · n, h, q, x)."""
    return lines.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)
