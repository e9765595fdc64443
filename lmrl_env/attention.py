"""Attention over a packed row: prompts once, then their responses, and no padding between.

All token-wise layers of a Transformers model run on one row of real tokens. Only here, where
tokens meet, are they laid out in rows again: a prompt's keys and values serve all its responses,
and gradients flow back through them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available

from lmrl_env.errors import ConfigurationError, ModelError

PACKED_ATTENTION = "lmrl_packed"
"""The name by which Transformers knows ``packed_attention``."""

ROWS_AT_ONCE = 16
"""Responses that attend together: sorted by length, few of them waste little on padding."""


class Layout(Protocol):
    """How tokens meet that do not stand in plain rows."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Return softmax(query · keyᵀ) · value, shape (rows, tokens, heads, d)."""


class _Rows(NamedTuple):
    """Rows that attend together, padded to the longest of them.

    Attributes:
        tokens: shape (r, k), int64: places of the tokens in the packed row; 0 at padding.
        real: shape (t,), int64: which of the r·k cells hold a token.
        prompts: shape (r,), int64: the prompt that each row continues; None for the prompts.
        mask: shape (r, 1, k, P + k), bool: what is attended to; None if causality says it all.
    """

    tokens: Tensor
    real: Tensor
    prompts: Tensor | None
    mask: Tensor | None


class PackedLayout:
    """Places of tokens in one row without padding: the prompts, then the responses.

    Args:
        prompt_lengths: shape (q,), int64, at least 1.
        prompt_index: shape (n,), int64: the prompt that each response continues.
        response_lengths: shape (n,), int64, may be 0.

    Attributes:
        prompt_starts: shape (q,), int64: place of each prompt's first token.
        response_starts: shape (n,), int64: place of each response's first token.
        attended: how many layers have attended by this layout so far.
    """

    def __init__(self, prompt_lengths: Tensor, prompt_index: Tensor, response_lengths: Tensor):
        self.attended = 0
        self.prompt_starts = prompt_lengths.cumsum(0) - prompt_lengths
        prompt_tokens, self._prompt_mask = _places(self.prompt_starts, prompt_lengths)
        self.prompts = _Rows(prompt_tokens, _cells(self._prompt_mask), None, None)

        self._order = response_lengths.argsort(descending=True, stable=True)
        lengths = response_lengths[self._order]
        starts = prompt_lengths.sum() + lengths.cumsum(0) - lengths
        self.response_starts = torch.empty_like(starts).scatter(0, self._order, starts)
        _, self._response_mask = _places(starts, lengths)

        self.responses: list[_Rows] = []
        for rows in torch.arange(len(lengths), device=lengths.device).split(ROWS_AT_ONCE):
            tokens, is_token = _places(starts[rows], lengths[rows])
            r, k = tokens.shape
            if k == 0:  # these responses and all after them are empty
                break
            prompts = prompt_index[self._order[rows]]
            prefix = self._prompt_mask[prompts][:, None, None].expand(r, 1, k, -1)
            causal = torch.ones(k, k, dtype=torch.bool, device=lengths.device).tril()
            mask = torch.cat([prefix, causal.expand(r, 1, k, k)], dim=-1)
            self.responses.append(_Rows(tokens, _cells(is_token), prompts, mask))

    def pack(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Return the packed row of what belongs to the tokens.

        Args:
            prompts: shape (q, at least P), left-aligned.
            responses: shape (n, at least K), left-aligned.

        >>> layout = PackedLayout(torch.tensor([2, 1]), torch.tensor([0, 1]), torch.tensor([1, 2]))
        >>> layout.pack(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[4, 0], [5, 6]])).tolist()
        [1, 2, 3, 5, 6, 4]
        >>> layout.response_starts.tolist()
        [5, 3]
        """
        width, length = self._prompt_mask.shape[1], self._response_mask.shape[1]
        return torch.cat(
            [
                prompts[:, :width][self._prompt_mask],
                responses[self._order, :length][self._response_mask],
            ]
        )

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
        prompts = self.prompts
        prompt_keys, prompt_values = (_lay_out(x, prompts.tokens) for x in (keys, values))
        outputs = []
        for rows in (prompts, *self.responses):
            if rows.prompts is None:
                row_keys, row_values = prompt_keys, prompt_values
            else:
                row_keys, row_values = (
                    torch.cat(
                        [prefix.index_select(0, rows.prompts), _lay_out(x, rows.tokens)], dim=2
                    )
                    for prefix, x in ((prompt_keys, keys), (prompt_values, values))
                )
            row_queries = _lay_out(queries, rows.tokens)
            output = _attend(
                module,
                row_queries,
                row_keys,
                row_values,
                rows.mask,
                scaling,
                0.0,
                rows.mask is None,
            )
            outputs.append(output.flatten(0, 1).index_select(0, rows.real))
        return torch.cat(outputs)[None]


def _places(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's places, 0 at padding, and which cells hold a token; both (r, k)."""
    column = torch.arange(int(lengths.max()), device=lengths.device)
    mask = column < lengths[:, None]
    return (starts[:, None] + column).masked_fill(~mask, 0), mask


def _cells(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero()[:, 0]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by a layout, or as Transformers' ``sdpa`` does where there is none.

    Args:
        module: the model's attention layer.
        query: shape (rows, heads, tokens, d); one row with a ``PackedLayout``.
        key: as ``query``, with the model's number of key-value heads.
        value: as ``key``.
        attention_mask: unused with a layout.
        scaling: multiplies the scores; 1 / √d by default.
        dropout: probability of dropping a weight.
        layout: attends in place of ``sdpa``.
        **kwargs: what else the model hands to attention functions.

    Returns:
        The attended values, shape (1 or rows, tokens, heads, d), and None for the weights.

    Raises:
        ModelError: if the model's attention has terms that are not implemented here.
    """
    foreign = [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]
    if foreign:
        raise ModelError(
            f"attention of {type(module).__name__} has the terms {foreign}, which packed attention "
            "does not know: call model.set_attn_implementation('eager') before using the model"
        )
    if layout is None:
        causal = attention_mask is None and query.shape[2] > 1
        return _attend(module, query, key, value, attention_mask, scaling, dropout, causal), None

    return layout.attend(module, query, key, value, scaling), None


def _lay_out(packed: Tensor, places: Tensor) -> Tensor:
    """Return (r, heads, k, d) of a packed (T, heads, d)."""
    rows = packed.index_select(0, places.flatten())
    return rows.view(*places.shape, *packed.shape[1:]).transpose(1, 2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool,
) -> Tensor:
    """Return softmax(query · keyᵀ) · value, shape (rows, tokens, heads, d)."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout, scaling, is_causal=is_causal
        )[0]
    # Unlike Transformers', this does not repeat the key-value heads in memory under a mask, which
    # no CPU kernel asks for.
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


def use_attention(model: PreTrainedModel, implementation: str) -> None:
    """Make a model attend by an implementation.

    Args:
        model: on its device.
        implementation: ``packed``, which is ours and stands aside for models that it does not
            fit, or one of Transformers': ``sdpa``, ``eager`` or ``flash_attention_2``.

    Raises:
        ConfigurationError: if the implementation is not available here or to this model.
    """
    if implementation == "packed":
        use_packed_attention(model)
        return
    if implementation == "flash_attention_2" and not (
        model.device.type == "cuda" and is_flash_attn_2_available()
    ):
        raise ConfigurationError(
            f"attention 'flash_attention_2' on the device {str(model.device)!r}: expected a CUDA "
            "device and the package flash-attn; install it, or use 'packed' or 'sdpa'"
        )
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:
        raise ConfigurationError(
            f"attention {implementation!r} does not fit {type(model).__name__} ({error}): use "
            "'packed' or 'sdpa'"
        ) from error


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make a model attend by ``packed_attention``, if all its layers attend to all tokens."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    has_windows = bool(getattr(config, "sliding_window", None))
    if (
        model._supports_attention_backend
        and set(layer_types) == {"full_attention"}
        and not has_windows
    ):
        model.set_attn_implementation(PACKED_ATTENTION)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
