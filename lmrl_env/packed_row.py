"""A packed row: prompts once, then their responses, no padding between, and how they attend.

All token-wise layers of a Transformers model run on one row of real tokens. Only here, where
tokens meet, are they laid out in rows again: a prompt's keys and values serve all its responses,
those of the tokens that all prompts begin with serve all prompts, and gradients flow back through
them.

Which token stands where is worked out on the CPU: a GPU is told, and never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmrl_env.attention import attend_by_sdpa
from lmrl_env.errors import ModelError
from lmrl_env.prefix_attention import Block, PrefixPlan, prefix_attention

ROWS_AT_ONCE = 64
"""Rows that attend together, at most."""

LEAST_FULL = 7 / 8
"""Length of a row beside the longest of those that it attends together with, at least."""

TOKENS_AT_ONCE, FEWEST_ROUNDED = 64, 2048
"""On the CPU a row of many tokens gets some more, up to a multiple, that nothing attends to: every
length costs oneDNN a preparation of its own."""

LONGEST_IN_FRONT, LONGEST_DENSE = 24, 128
"""Tokens of prompts, common ones left out, and of responses, up to which plain products of these
behind those are faster than to attend to prompts where they stand."""

FEWEST_COMMON = 16
"""Tokens of a common beginning below which to treat it apart costs more than it saves."""

Integers = npt.NDArray[np.int64]


class _Rows(NamedTuple):
    """Rows that attend together, padded to the longest of them.

    Attributes:
        tokens: shape (r, k), int64: places of the tokens in the packed row; 0 at padding.
        real: shape (r, k), bool: which cells hold a token.
    """

    tokens: Integers
    real: npt.NDArray[np.bool_]


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, which is not waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class PackedLayout:
    """Places of tokens in one row without padding: the prompts, then the responses to each.

    Args:
        prompt_lengths: shape (q,), int64, at least 1.
        prompt_index: shape (n,), int64: the prompt that each response continues.
        response_lengths: shape (n,), int64, may be 0.
        device: of the tokens.
        common: tokens that all prompts begin with, fewer than the shortest has: they stand once,
            at the start of the row.

    Attributes:
        prompt_ends: shape (q,), int64: place of each prompt's last token.
        response_starts: shape (n,), int64: place of each response's first token.
        attended: how many layers have attended by this layout so far.
    """

    def __init__(
        self,
        prompt_lengths: Integers,
        prompt_index: Integers,
        response_lengths: Integers,
        device: torch.device | str = "cpu",
        common: int = 0,
    ):
        self.attended = 0
        self.device = torch.device(device)
        self._common = common
        own_lengths = prompt_lengths - common
        order = prompt_index.argsort(kind="stable")
        bounds = np.concatenate([[0, common], own_lengths, response_lengths[order]]).cumsum()
        self._tokens = int(bounds[-1])
        self._padding = 0
        if self.device.type == "cpu" and self._tokens >= FEWEST_ROUNDED:
            self._padding = -self._tokens % TOKENS_AT_ONCE
        self._row_starts = bounds  # the padding is the last row
        self._row_lengths = np.append(np.diff(bounds), self._padding)
        starts, q = bounds[1:-1], len(prompt_lengths)
        self.prompt_ends = bounds[2 : q + 2] - 1
        self.response_starts = np.empty_like(response_lengths)
        self.response_starts[order] = starts[q:]
        prompt_rows, prompt_columns = cells(own_lengths)
        rows, columns = cells(response_lengths[order])
        self._cells = [
            to_device(x, self.device)
            for x in (prompt_rows, common + prompt_columns, order[rows], columns)
        ]

        of_prompt = np.zeros_like(prompt_lengths)  # response tokens
        np.add.at(of_prompt, prompt_index, response_lengths)
        bounds = np.concatenate([[common], own_lengths, of_prompt]).cumsum().tolist()
        slices = [slice(a, b) for a, b in pairwise(bounds)]
        self._continued = list(zip(slices[q:], slices[:q], strict=True))

        self._continues = prompt_index[order]
        self._are_short = bool(
            own_lengths.max() <= LONGEST_IN_FRONT
            and response_lengths.max(initial=0) <= LONGEST_DENSE
        )
        self._prompts = _rows(starts[:q] - common, prompt_lengths)
        self._prompts.tokens[:, :common] = np.arange(common)
        self._responses = response_lengths, prompt_index

    @cached_property
    def _plan(self) -> PrefixPlan:
        """What attends to what, by the normalisers."""
        starts, lengths, q = self._row_starts, self._row_lengths, len(self.prompt_ends)
        is_behind = np.zeros(len(lengths), dtype=np.bool_)
        is_behind[1 + q : -1] = self._are_short  # the responses, in the order of their prompts
        alone, behind = _alike(lengths * ~is_behind), _alike(lengths * is_behind)
        together = [_rows(starts[rows], lengths[rows]) for rows in (*alone, *behind)]
        prompts = [None] * len(alone) + [self._continues[rows - 1 - q] for rows in behind]
        cells = np.concatenate([rows.tokens.ravel() for rows in together])
        real = np.concatenate([rows.real.ravel() for rows in together])
        (taken,) = real.nonzero()
        beginning = slice(self._common, self._tokens), slice(0, self._common)
        prefixes = [beginning, *([] if self._are_short else self._continued)]
        return PrefixPlan(
            blocks=[self._block(*each) for each in zip(together, prompts, strict=True)],
            cells=to_device(cells, self.device),
            padding=to_device(~real, self.device),
            real=to_device(taken[cells[taken].argsort()], self.device),
            prefixes=[pair for pair in prefixes if all(x.start < x.stop for x in pair)],
        )

    def _block(self, rows: _Rows, prompts: Integers | None) -> Block:
        """Return rows for ``prefix_attention``, behind their prompts if these are given."""
        shape = rows.tokens.shape[0], rows.tokens.shape[1]
        if prompts is None:
            return Block(shape)
        tokens, real = (x[prompts, self._common :] for x in self._prompts)
        return Block(shape, (to_device(tokens, self.device), to_device(~real, self.device)))

    @cached_property
    def _copies(self) -> tuple[list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]], Tensor]:
        """What attends to what, by copies of the prompts' keys.

        For the prompts, then for each block of responses, tokens (r, k), cells that hold one,
        prompts and mask; and the order of their tokens in the packed row.
        """
        blocks: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        places = []
        lengths, prompt_index = self._responses
        together = [
            (_rows(self.response_starts[chosen], lengths[chosen]), prompt_index[chosen])
            for chosen in _alike(lengths)
        ]
        for rows, continued in ((self._prompts, None), *together):
            r, k = rows.tokens.shape
            computed = rows.real.copy()
            if continued is None:
                computed[1:, : self._common] = False  # these tokens stand once
            (taken,) = computed.ravel().nonzero()
            places.append(rows.tokens.ravel()[taken])
            prompts = mask = None
            if continued is not None:
                prefix = np.repeat(self._prompts.real[continued][:, None], k, axis=1)
                causal = np.broadcast_to(np.tri(k, dtype=bool), (r, k, k))
                mask = to_device(np.concatenate([prefix, causal], axis=-1)[:, None], self.device)
                prompts = to_device(continued, self.device)
            tokens, real = (to_device(x, self.device) for x in (rows.tokens, taken))
            blocks.append((tokens, real, prompts, mask))
        return blocks, to_device(np.concatenate(places).argsort(), self.device)

    def pack(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Return the packed row of what belongs to the tokens.

        Args:
            prompts: shape (q, at least P), left-aligned.
            responses: shape (n, at least K), left-aligned.

        >>> layout = PackedLayout(np.array([2, 1]), np.array([1, 0]), np.array([1, 2]))
        >>> layout.pack(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[4, 0], [5, 6]])).tolist()
        [1, 2, 3, 5, 6, 4]
        >>> layout.response_starts.tolist()
        [5, 3]
        """
        prompt_rows, prompt_columns, rows, columns = self._cells
        return torch.cat(
            [
                prompts[0, : self._common],
                prompts[prompt_rows, prompt_columns],
                responses[rows, columns],
            ]
        )

    def forward(
        self, model: PreTrainedModel, ids: Tensor, positions: Tensor, **options: Any
    ) -> Any:
        """Return what a model, or its base model, returns of the packed row.

        Args:
            model: which attends by ``packed_attention``.
            ids: shape (T,), int64.
            positions: shape (T,), int64.
            options: of the model's forward pass.

        Raises:
            ModelError: if the model does not hand the layout to its attention.
        """
        output = model(
            input_ids=F.pad(ids, (0, self._padding))[None],
            position_ids=F.pad(positions, (0, self._padding))[None],
            # A mask of four dimensions keeps Transformers from building one of T × T.
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device),
            layout=self,
            **options,
        )
        layers = model.config.get_text_config().num_hidden_layers
        if self.attended != layers:
            raise ModelError(
                f"{type(model).__name__} attended by the packed layout in {self.attended} "
                f"of {layers} layers: expected all; call model.set_attn_implementation('sdpa')"
            )
        return output

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
        exact = query.dtype == key.dtype == value.dtype and query.dtype.itemsize >= 4
        if query.device.type == "cpu" and exact and query.shape[-1] == value.shape[-1]:
            return prefix_attention(queries, keys, values, self._plan, scaling)[None]
        return self._attend_by_copies(module, queries, keys, values, scaling)[None]

    def _attend_by_copies(
        self, module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor,
        scaling: float | None,
    ) -> Tensor:  # fmt: skip
        blocks, order = self._copies
        tokens = blocks[0][0]
        prompt_keys, prompt_values = (_lay_out(x, tokens) for x in (keys, values))
        outputs = []
        for tokens, real, prompts, mask in blocks:
            row_queries, row_keys, row_values = (
                _lay_out(x, tokens) for x in (queries, keys, values)
            )
            if prompts is not None:
                row_keys = torch.cat([prompt_keys.index_select(0, prompts), row_keys], dim=2)
                row_values = torch.cat([prompt_values.index_select(0, prompts), row_values], dim=2)
            output = attend_by_sdpa(
                module, row_queries, row_keys, row_values, mask, scaling, is_causal=mask is None
            )
            outputs.append(output.flatten(0, 1).index_select(0, real))
        output = torch.cat(outputs).index_select(0, order)
        return F.pad(output, (0, 0, 0, 0, 0, self._padding))


def common_beginning(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens to forward once for all prompts: those that all of them begin with.

    0 if there are few such tokens or one prompt; at most all but the last of the shortest prompt.

    >>> common_beginning([(*range(20), 7), (*range(20),)])
    19
    >>> common_beginning([(1, 2, 3), (1, 2)])
    0
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in dictionary order
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    common = min(sum(1 for _ in alike), min(map(len, prompts)) - 1)
    return common if common >= FEWEST_COMMON else 0


def cells(lengths: Integers) -> tuple[Integers, Integers]:
    """Return row and column of each token of left-aligned rows, both of shape (sum of lengths,).

    >>> rows, columns = cells(np.array([2, 0, 1]))
    >>> rows.tolist(), columns.tolist()
    ([0, 0, 2], [0, 1, 0])
    """
    rows = np.arange(len(lengths)).repeat(lengths)
    starts = lengths.cumsum() - lengths
    return rows, np.arange(len(rows)) - starts[rows]


def _alike(lengths: Integers) -> list[Integers]:
    """Return which rows attend together: those of like length, so that little is padding.

    Rows without tokens are in none of them.
    """
    together: list[list[int]] = []
    for row in (-lengths).argsort(kind="stable").tolist():
        if not lengths[row]:
            break
        longest = lengths[together[-1][0]] if together else np.inf
        if lengths[row] >= LEAST_FULL * longest and len(together[-1]) < ROWS_AT_ONCE:
            together[-1].append(row)
        else:
            together.append([row])
    return [np.array(rows) for rows in together]


def _rows(starts: Integers, lengths: Integers) -> _Rows:
    columns = np.arange(lengths.max())
    real = columns < lengths[:, None]
    return _Rows(np.where(real, starts[:, None] + columns, 0), real)


def _lay_out(packed: Tensor, places: Tensor) -> Tensor:
    """Return (r, heads, k, d) of a packed (T, heads, d)."""
    rows = packed.index_select(0, places.flatten())
    return rows.view(*places.shape, *packed.shape[1:]).transpose(1, 2)
