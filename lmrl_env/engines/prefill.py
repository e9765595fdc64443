"""Forwarding of prompts before sampling: each different one once, and what all begin with once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lmrl_env.attention import PACKED_ATTENTION
from lmrl_env.engines.kv_cache import BudgetCache
from lmrl_env.engines.shared_prompts import SharedPromptCache
from lmrl_env.packed_row import common_beginning

TOKENS_AT_ONCE = 2**14
"""Most prompt tokens, padding included, that are forwarded at once, unless one prompt has more."""


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

    A row has the tokens that all prompts begin with, then padding, then its own.

    Args:
        model: a causal language model.
        prompts: token ids, each at least one.
        budget: tokens to make room for.
    """
    device = model.device
    unique = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: i for i, prompt in enumerate(unique)}
    index = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in unique])
    common, width = common_beginning(unique), int(lengths.max())
    ids = torch.tensor([(width - len(prompt)) * [0] + [*prompt[common:]] for prompt in unique])
    column = torch.arange(width + budget)
    position = column - (width - lengths[:, None])  # of the tokens that are not common
    is_token = None
    if bool((lengths < width).any()):
        is_token = ((column < common) | (position >= common)).to(device)

    beginning = _forward(model, unique[0][:common])
    logits, caches = [], []
    for part in torch.arange(len(unique)).split(max(1, TOKENS_AT_ONCE // (width - common))):
        caches.append(DynamicCache())
        for i, (keys, values) in enumerate(beginning):
            caches[-1].update(
                keys.expand(len(part), -1, -1, -1), values.expand(len(part), -1, -1, -1), i
            )
        output = model(
            input_ids=ids[part].to(device),
            attention_mask=None if is_token is None else is_token[part, :width],
            position_ids=position[part, common:width].clamp(min=0).to(device),
            past_key_values=caches[-1],
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
    first_logits, positions = torch.cat(logits)[index], lengths.to(device)[index]
    if model.config.get_text_config()._attn_implementation == PACKED_ATTENTION:
        real = None if is_token is None else is_token[:, :width]
        cache: BudgetCache = SharedPromptCache(caches, index, budget, real, common)
        return Prefilled(first_logits, cache, None, positions)
    mask = None if is_token is None else is_token[index]
    return Prefilled(first_logits, BudgetCache(caches, index, budget), mask, positions)


def _forward(model: PreTrainedModel, tokens: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of each layer, (1, heads, tokens, d); none without tokens."""
    if not tokens:
        return []
    cache = DynamicCache()
    ids = torch.tensor([tokens], device=model.device)
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]
