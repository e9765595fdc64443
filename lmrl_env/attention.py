"""Attention by a layout of the tokens, where they do not stand in plain rows."""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available

from lmrl_env.errors import ConfigurationError, ModelError

PACKED_ATTENTION = "lmrl_packed"
"""The name by which Transformers knows ``packed_attention``."""


class Layout(Protocol):
    """How tokens meet that do not stand in plain rows."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Return softmax(query · keyᵀ) · value, shape (rows, tokens, heads, d)."""


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
        return attend_by_sdpa(
            module, query, key, value, attention_mask, scaling, dropout, is_causal=causal
        ), None
    return layout.attend(module, query, key, value, scaling), None


def attend_by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Return softmax(query · keyᵀ) · value, shape (rows, tokens, heads, d).

    Args:
        module: the model's attention layer.
        query: shape (rows, heads, tokens, d).
        key: as ``query``, with the model's number of key-value heads.
        value: as ``key``.
        mask: shape (rows, 1, tokens, keys), what is attended to; None for all.
        scaling: multiplies the scores; 1 / √d by default.
        dropout: probability of dropping a weight.
        is_causal: whether tokens attend to no later ones.
    """
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
