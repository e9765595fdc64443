"""Attention of one new token a row to prompts that stand once for all their rows.

What all prompts begin with, such as the template's instructions, stands once for all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lmrl_env.engines.kv_cache import BudgetCache

FEWEST_SHARED = 24
"""Tokens of the longest prompt, common ones left out, below which a copy for each row is faster."""


class SharedPromptCache(BudgetCache):
    """Keys and values of a batch that only shrinks, a prompt's once for all its rows.

    It is the ``layout`` of ``packed_attention`` too. Rows stand in a grid, one line a prompt, so
    that a line's queries meet their prompt in one matrix product; and all of them in one line,
    to meet what is common to the prompts. Of short prompts, and of those that no two rows share,
    each row has its own copy.

    Args:
        beginning: keys and values of each layer of what all prompts begin with, (1, heads, C, d).
        prompts: of what follows in each prompt, (prompts, heads, P, d), left-aligned.
        is_token: shape (prompts, P), bool: which places of the prompts are tokens; None if all.
        index: shape (r,), int64: the prompt that each row continues.
        budget: tokens to make room for.
    """

    def __init__(
        self,
        beginning: Sequence[tuple[Tensor, Tensor]],
        prompts: Sequence[tuple[Tensor, Tensor]],
        is_token: Tensor | None,
        index: Tensor,
        budget: int,
    ):
        self._beginning = [
            (keys.transpose(2, 3).contiguous(), values) for keys, values in beginning
        ]
        self._common = beginning[0][0].shape[2]
        self._device = index.device
        number, _, width, _ = prompts[0][0].shape
        self._in_rows = width < FEWEST_SHARED or number == len(index)
        self._padding = None if is_token is None else ~is_token[:, None, None]
        if self._in_rows:
            super().__init__([(keys[index], values[index]) for keys, values in prompts], budget)
            self._padding = None if self._padding is None else self._padding[index]
            return
        nothing = index.new_zeros(len(index)), slice(None), slice(0)
        super().__init__([(keys[nothing], values[nothing]) for keys, values in prompts], budget)
        self._prompts = [(keys.transpose(2, 3).contiguous(), values) for keys, values in prompts]
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
        places = torch.from_numpy(kept).to(self._device)
        if self._in_rows:
            self._padding = None if self._padding is None else self._padding[places]
        else:
            self._index = self._index[places]
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
        r, heads, _, d = query.shape
        query = query.reshape(r, key.shape[1], -1, d) * (d**-0.5 if scaling is None else scaling)
        attended = self.attend_in_layer(int(module.layer_idx), query, key, value)  # type: ignore[arg-type]
        return attended.reshape(r, 1, heads, d)

    def attend_in_layer(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what ``attend`` does, of scaled queries that are laid out by the keys' heads.

        Args:
            layer: its index.
            query: shape (r, key-value heads, heads of each, d).
            key: shape (r, key-value heads, t, d), of the responses so far.
            value: as ``key``.

        Returns:
            Shape (r, key-value heads, heads of each, d).
        """
        r = len(query)
        scores = [query @ key.transpose(2, 3)]
        if not self._in_rows:
            own_keys, own_values = self._prompts[layer]
            scores.insert(0, self._to_grid(query) @ own_keys)
        if self._padding is not None:
            scores[0][..., : self._padding.shape[3]].masked_fill_(self._padding, -torch.inf)
        if not self._in_rows:
            scores[0] = self._to_rows(scores[0])
        if self._common:
            first_keys, first_values = self._beginning[layer]
            scores.insert(0, _rows_of(_lines(query, 1) @ first_keys, r))
        weights = (torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]).softmax(-1)
        weights = weights.to(value.dtype)
        output = weights[..., -key.shape[2] :] @ value
        if not self._in_rows:
            own = weights[..., self._common : -key.shape[2]]
            output += self._to_rows(self._to_grid(own) @ own_values)
        if self._common:
            output += _rows_of(_lines(weights[..., : self._common], 1) @ first_values, r)
        return output

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
