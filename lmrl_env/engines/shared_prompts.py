"""Attention of one new token a row to prompts that stand once for all their rows."""

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
    that a line's queries meet their prompt in one matrix product.

    Args:
        prefilled: caches of different prompts, all of the same width P.
        index: shape (r,), int64: the prompt, counted over all caches, that each row continues.
        budget: tokens to make room for.
        is_token: shape (prompts, P), bool: which places of the prompts are tokens; None if all.

    Attributes:
        attended: how many layers have attended to this cache so far.
    """

    def __init__(
        self, prefilled: Sequence[Cache], index: Tensor, budget: int, is_token: Tensor | None
    ):
        super().__init__(prefilled, index, budget, with_prompts=False)
        layers = zip(*(cache.layers for cache in prefilled), strict=True)
        self.attended = 0
        self._prompts = [
            (
                torch.cat([part.keys for part in parts]).to(parts[0].values.dtype),
                torch.cat([part.values for part in parts]),
            )
            for parts in layers
        ]
        self._padding: Tensor | None = None
        if is_token is not None:
            zeros = self._prompts[0][1].new_zeros(is_token.shape)
            self._padding = zeros.masked_fill(~is_token, -torch.inf)[:, None, None]
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

        Each is attended to by itself; their shares of the whole are a sigmoid of the difference
        of their log-sum-exps.

        Args:
            module: the model's attention layer.
            query: shape (r, heads, 1, d).
            key: shape (r, key-value heads, t, d), of the responses so far.
            value: as ``key``.
            scaling: multiplies the scores; 1 / √d by default.

        Returns:
            Shape (r, 1, heads, d).
        """
        self.attended += 1
        prompt_keys, prompt_values = self._prompts[int(module.layer_idx)]  # type: ignore[arg-type]
        r, heads, _, d = query.shape
        scaling = d**-0.5 if scaling is None else scaling
        query = query.reshape(r, key.shape[1], -1, d).to(value.dtype)
        of_prompts, prompt_sums = _attend(
            self._to_grid(query), prompt_keys, prompt_values, self._padding, scaling
        )
        of_rows, row_sums = _attend(query, key, value, None, scaling)
        share = (row_sums[..., None] - self._to_rows(prompt_sums[..., None])).sigmoid()
        attended = torch.lerp(self._to_rows(of_prompts), of_rows, share.to(value.dtype))
        return attended.reshape(r, 1, heads, d)

    def _to_grid(self, rows: Tensor) -> Tensor:
        """Lay (r, h, q, x) out as (lines, h, cells of a line · q, x)."""
        cells = rows if self._is_grid else rows[self._row]
        return cells.unflatten(0, self._shape).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, grid: Tensor) -> Tensor:
        """Return the rows of a grid."""
        cells = grid.unflatten(2, (self._shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return cells if self._is_grid else cells[self._cell]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return softmax(query · keyᵀ + mask) · value, and the log-sum-exp of the scores.

    Args:
        query: shape (n, heads, q, d).
        key: shape (n, heads, k, d).
        value: as ``key``.
        mask: shape (n, 1, 1, k), 0 or -∞; None is 0.
        scaling: multiplies the products of query and key.

    Returns:
        Shapes (n, heads, q, d) and (n, heads, q).
    """
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scaling
        )
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if mask is not None:
        scores = scores + mask
    sums = scores.logsumexp(-1)
    return (scores - sums[..., None]).exp().to(value.dtype) @ value, sums
