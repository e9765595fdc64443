"""A packed row: prompts once, then their responses, no padding between, and how they attend.

All token-wise layers of a Transformers model run on one row of real tokens. Only here, where
tokens meet, are they laid out in rows again: a prompt's keys and values serve all its responses,
and gradients flow back through them.

Which token stands where is worked out on the CPU: a GPU is told, and never waited for.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmrl_env.attention import attend_by_sdpa
from lmrl_env.prefix_attention import PrefixPlan, prefix_attention

ROWS_AT_ONCE = 16
"""Responses that attend together: sorted by length, few of them waste little on padding."""


class _Rows(NamedTuple):
    """Rows that attend together, padded to the longest of them.

    Attributes:
        tokens: shape (r, k), int64: places of the tokens in the packed row; 0 at padding.
        real: shape (t,), int64: which of the r·k cells hold a token.
        padding: shape (r, k), bool: which cells hold none.
        prompts: shape (r,), int64: the prompt that each row continues; none for the prompts.
    """

    tokens: Tensor
    real: Tensor
    padding: Tensor
    prompts: Tensor

    def to(self, device: torch.device) -> _Rows:
        return _Rows(*(to_device(tensor, device) for tensor in self))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, which is not waited for."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class PackedLayout:
    """Places of tokens in one row without padding: the prompts, then the responses to each.

    Args:
        prompt_lengths: shape (q,), int64, at least 1, on the CPU like all of these.
        prompt_index: shape (n,), int64: the prompt that each response continues.
        response_lengths: shape (n,), int64, may be 0.
        device: of the tokens; of all attributes but the starts, which are on the CPU.

    Attributes:
        prompt_starts: shape (q,), int64: place of each prompt's first token.
        response_starts: shape (n,), int64: place of each response's first token.
        attended: how many layers have attended by this layout so far.
    """

    def __init__(
        self,
        prompt_lengths: Tensor,
        prompt_index: Tensor,
        response_lengths: Tensor,
        device: torch.device | str = "cpu",
    ):
        self.attended = 0
        self.device = torch.device(device)
        order = prompt_index.argsort(stable=True)
        lengths = response_lengths[order]
        self.prompt_starts = prompt_lengths.cumsum(0) - prompt_lengths
        starts = prompt_lengths.sum() + lengths.cumsum(0) - lengths
        self.response_starts = torch.empty_like(starts).scatter(0, order, starts)
        rows, columns = cells(lengths)
        self._cells = [
            to_device(x, self.device) for x in (*cells(prompt_lengths), order[rows], columns)
        ]

        ends = torch.cat([prompt_lengths, _sums(lengths, prompt_index[order], prompt_lengths)])
        bounds = [0, *ends.cumsum(0).tolist()]
        slices = [slice(a, b) for a, b in pairwise(bounds)]
        q = len(prompt_lengths)
        self._groups = list(zip(slices[:q], slices[q:], strict=True))

        self._prompts = _rows(self.prompt_starts, prompt_lengths, torch.arange(q)[:0])
        longest_first = response_lengths.argsort(descending=True, stable=True)
        self._responses = [
            _rows(self.response_starts[rows], response_lengths[rows], prompt_index[rows])
            for rows in longest_first.split(ROWS_AT_ONCE)
            if response_lengths[rows[0]] > 0
        ]

    @cached_property
    def _plan(self) -> PrefixPlan:
        tokens = [rows.tokens.flatten() for rows in self._responses]
        padding = [rows.padding.flatten() for rows in self._responses]
        cells = torch.cat(tokens or [torch.zeros(0, dtype=torch.int64)])
        is_padding = torch.cat(padding or [torch.zeros(0, dtype=torch.bool)])
        (taken,) = (~is_padding).nonzero(as_tuple=True)
        return PrefixPlan(
            groups=self._groups,
            responses=slice(len(self._prompts.real), len(self._prompts.real) + len(taken)),
            blocks=[(len(rows.tokens), rows.tokens.shape[1]) for rows in self._responses],
            cells=cells,
            padding=is_padding,
            real=taken[cells[taken].argsort()],
        )

    @cached_property
    def _masked(self) -> tuple[_Rows, list[tuple[_Rows, Tensor]], Tensor]:
        """Prompts, responses with what they attend to, and the order of their tokens."""
        responses, places = [], [torch.arange(len(self._prompts.real))]
        for rows in self._responses:
            r, k = rows.tokens.shape
            prefix = ~self._prompts.padding[rows.prompts][:, None, None].expand(r, 1, k, -1)
            causal = torch.ones(k, k, dtype=torch.bool).tril().expand(r, 1, k, k)
            mask = to_device(torch.cat([prefix, causal], dim=-1), self.device)
            responses.append((rows.to(self.device), mask))
            places.append(rows.tokens.flatten()[rows.real])
        order = torch.cat(places).argsort()
        return self._prompts.to(self.device), responses, to_device(order, self.device)

    def pack(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Return the packed row of what belongs to the tokens.

        Args:
            prompts: shape (q, at least P), left-aligned.
            responses: shape (n, at least K), left-aligned.

        >>> layout = PackedLayout(torch.tensor([2, 1]), torch.tensor([1, 0]), torch.tensor([1, 2]))
        >>> layout.pack(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[4, 0], [5, 6]])).tolist()
        [1, 2, 3, 5, 6, 4]
        >>> layout.response_starts.tolist()
        [5, 3]
        """
        prompt_rows, prompt_columns, rows, columns = self._cells
        return torch.cat([prompts[prompt_rows, prompt_columns], responses[rows, columns]])

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Return softmax(query · keyᵀ) · value, prompts and responses each within their row.

        Args:
            module: the model's attention layer.
            query: shape (1, heads, tokens, d).
            key: as ``query``, with the model's number of key-value heads.
            value: as ``key``.
            scaling: multiplies the scores; 1 / √d by default.

        Returns:
            Shape (1, tokens, heads, d).
        """
        self.attended += 1
        queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
        if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
            return prefix_attention(queries, keys, values, self._plan, scaling)[None]
        return self._attend_by_copies(module, queries, keys, values, scaling)[None]

    def _attend_by_copies(
        self, module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor,
        scaling: float | None,
    ) -> Tensor:  # fmt: skip
        prompts, responses, order = self._masked
        prompt_keys, prompt_values = (_lay_out(x, prompts.tokens) for x in (keys, values))
        output = attend_by_sdpa(
            module, _lay_out(queries, prompts.tokens), prompt_keys, prompt_values, None, scaling,
            is_causal=True,
        )  # fmt: skip
        outputs = [output.flatten(0, 1).index_select(0, prompts.real)]
        for rows, mask in responses:
            row_keys, row_values = (
                torch.cat([prefix.index_select(0, rows.prompts), _lay_out(x, rows.tokens)], dim=2)
                for prefix, x in ((prompt_keys, keys), (prompt_values, values))
            )
            row_queries = _lay_out(queries, rows.tokens)
            output = attend_by_sdpa(module, row_queries, row_keys, row_values, mask, scaling)
            outputs.append(output.flatten(0, 1).index_select(0, rows.real))
        return torch.cat(outputs).index_select(0, order)


def cells(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of each token of left-aligned rows, both of shape (sum of lengths,).

    >>> cells(torch.tensor([2, 0, 1]))
    (tensor([0, 0, 2]), tensor([0, 1, 0]))
    """
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows)) - starts[rows]


def _sums(lengths: Tensor, prompt_index: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Return how many response tokens each prompt has, shape (q,)."""
    return torch.zeros_like(prompt_lengths).index_add(0, prompt_index, lengths)


def _rows(starts: Tensor, lengths: Tensor, prompts: Tensor) -> _Rows:
    columns = torch.arange(int(lengths.max()))
    padding = columns >= lengths[:, None]
    tokens = (starts[:, None] + columns).masked_fill(padding, 0)
    return _Rows(tokens, (~padding).flatten().nonzero()[:, 0], padding, prompts)


def _lay_out(packed: Tensor, places: Tensor) -> Tensor:
    """Return (r, heads, k, d) of a packed (T, heads, d)."""
    rows = packed.index_select(0, places.flatten())
    return rows.view(*places.shape, *packed.shape[1:]).transpose(1, 2)
