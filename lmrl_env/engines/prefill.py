"""Forwarding of prompts before sampling: each different one once, and what all begin with once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lmrl_env.attention import PACKED_ATTENTION
from lmrl_env.engines.kv_cache import BudgetCache
from lmrl_env.engines.shared_prompts import SharedPromptCache
from lmrl_env.packed_row import Integers, PackedLayout, common_beginning, to_device

TOKENS_AT_ONCE = 2**14
"""Most prompt tokens that are forwarded at once, unless one prompt has more.

Each prompt counts as the longest: attention pads some of them, and on a GPU all.
"""


class Prefilled(NamedTuple):
    """A batch whose prompts have been forwarded.

    Attributes:
        logits: shape (r, at least V): of the first token.
        cache: keys and values, with room for the budget.
        mask: shape (r, P + K), bool: which cached places are tokens; None if all are, or if the
            cache knows.
        positions: shape (r,), int64: of the first token.
    """

    logits: Tensor
    cache: BudgetCache
    mask: Tensor | None
    positions: Tensor


def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]], budget: int) -> Prefilled:
    """Forward prompts up to the first token of their responses.

    Args:
        model: a causal language model.
        prompts: token ids, each at least one.
        budget: tokens to make room for.

    Raises:
        ModelError: if the model does not hand the layout of a packed row to its attention.
    """
    unique = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: i for i, prompt in enumerate(unique)}
    index = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=model.device)
    lengths = np.array([len(prompt) for prompt in unique])
    packed = model.config.get_text_config()._attn_implementation == PACKED_ATTENTION
    logits, cache, mask = (_packed if packed else _padded)(model, unique, lengths, index, budget)
    return Prefilled(logits[index], cache, mask, to_device(lengths, model.device)[index])


def _packed(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], lengths: Integers, index: Tensor,
    budget: int,
) -> tuple[Tensor, BudgetCache, None]:  # fmt: skip
    """Return the first logits and the cache, which knows what is a token.

    Prompts stand one behind the other, without padding, and what all begin with stands once.
    """
    device, common = model.device, common_beginning(prompts)
    own_lengths, width = lengths - common, int(lengths.max())
    ids = torch.tensor([[*prompt, *(width - len(prompt)) * [0]] for prompt in prompts])
    ids, columns = ids.to(device), torch.arange(width, device=device)
    own_columns = np.arange(width - common)
    logits, own = [], []
    beginning: list[tuple[Tensor, Tensor]] = []
    for part in _parts(own_lengths if device.type == "cpu" else lengths):
        layout = PackedLayout(lengths[part], lengths[:0], lengths[:0], device, common)
        cache = DynamicCache()
        output = layout.forward(
            model,
            layout.pack(ids[part], ids[:0]),
            layout.pack(columns.expand_as(ids[part]), ids[:0]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=to_device(layout.prompt_ends, device),
        )
        logits.append(output.logits[0])
        places = (layout.prompt_ends + 1 - own_lengths[part])[:, None] + own_columns
        places = to_device(places.clip(max=layout.prompt_ends.max()), device)
        layers = _layers(cache)
        own.append([(_rows(keys, places), _rows(values, places)) for keys, values in layers])
        if not beginning:  # copies, for which the rest need not be kept
            beginning = [(k[:, :, :common].clone(), v[:, :, :common].clone()) for k, v in layers]
    is_token = None
    if (lengths < width).any():
        is_token = to_device(own_columns < own_lengths[:, None], device)
    shared = SharedPromptCache(beginning, _joined(own), is_token, index, budget)
    return torch.cat(logits), shared, None


def _padded(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], lengths: Integers, index: Tensor,
    budget: int,
) -> tuple[Tensor, BudgetCache, Tensor | None]:  # fmt: skip
    """Return the first logits, the cache and its mask; a row is padding, then tokens."""
    device, width = model.device, int(lengths.max())
    position = np.arange(width + budget) - (width - lengths[:, None])
    is_token = None
    if (lengths < width).any():
        is_token = to_device(position >= 0, device)
    logits, layers = [], []
    for part in _parts(np.full_like(lengths, width)):
        cache = DynamicCache()
        ids = [(width - len(prompt)) * [0] + [*prompt] for prompt in prompts[part]]
        output = model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=None if is_token is None else is_token[part, :width],
            position_ids=to_device(position[part, :width].clip(min=0), device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
        layers.append(_layers(cache))
    rows = [(keys[index], values[index]) for keys, values in _joined(layers)]
    mask = None if is_token is None else is_token[index]
    return torch.cat(logits), BudgetCache(rows, budget), mask


def _parts(lengths: Integers) -> Iterator[slice]:
    """Yield the prompts that are forwarded together."""
    start = 0
    while start < len(lengths):
        longest = np.maximum.accumulate(lengths[start:])
        fitting = int((longest * np.arange(1, 1 + len(longest)) <= TOKENS_AT_ONCE).sum())
        yield slice(start, start := start + max(1, fitting))


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _rows(packed: Tensor, places: Tensor) -> Tensor:
    """Lay a packed (1, heads, T, d) out as (r, heads, k, d), given places (r, k)."""
    return packed[0].index_select(1, places.flatten()).unflatten(1, places.shape).transpose(0, 1)


def _joined(parts: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of each layer, given those of each part of the prompts."""
    joined = []
    for layer in zip(*parts, strict=True):
        keys, values = zip(*layer, strict=True)
        joined.append((torch.cat(keys), torch.cat(values)))
    return joined
