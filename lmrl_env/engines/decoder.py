"""One decoding step of models of Llama's kind on the CPU, of fewer operations.

A step of few rows and a small model is made of small operations, whose cost is that of calling
them. Here queries, keys and values are one product, and products add the residual, gate and
multiply by themselves (oneDNN), with weights in the order in which oneDNN reads them: 250
operations instead of 323 for four layers, and 0.72 to 0.85 of the time at 64 to 256 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from lmrl_env import rms_norm
from lmrl_env.attention import PACKED_ATTENTION
from lmrl_env.engines.shared_prompts import SharedPromptCache
from lmrl_env.linear import OneDNNLinear, is_plain

KNOWN = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Models whose blocks are those of ``Decoder``, up to biases and norms of queries and keys."""

MOST_BYTES = 2**29
"""Weights of which a copy is made for a batch: a step of larger models is no small operation."""

FEWEST_TOKENS = 2**8
"""Of a batch, below which a copy of the weights costs more than it saves."""


class _Layer(NamedTuple):
    """A linear layer, or several of the same input as one, in oneDNN's order."""

    weight: Tensor
    bias: Tensor | None


class _Block(NamedTuple):
    """A block of the model; ``head_norm`` is that of queries and keys, (heads + key heads, d)."""

    first_norm: Tensor
    qkv: _Layer
    head_norm: Tensor | None
    output: _Layer
    second_norm: Tensor
    gate: _Layer
    up: _Layer
    down: _Layer


class Decoder:
    """The logits of one more token a row, by the weights that a model has when it is made.

    Args:
        model: for which it ``pays``.
    """

    def __init__(self, model: PreTrainedModel):
        base: Any = model.base_model
        attention = base.layers[0].self_attn
        self._head_dim = int(attention.head_dim)
        self._scaling = float(attention.scaling)
        self._heads = int(model.config.num_attention_heads)
        self._key_heads = int(model.config.num_key_value_heads)
        self._epsilon = float(model.config.rms_norm_eps)
        self._embedding = base.embed_tokens.weight
        self._rotary = base.rotary_emb
        self._blocks = [self._block(layer) for layer in base.layers]
        self._norm = base.norm.weight
        self._head = _in_onednn_order(model.get_output_embeddings())

    @staticmethod
    def pays(model: PreTrainedModel, tokens: int) -> bool:
        """Return whether to make one for a batch of so many tokens.

        That is, whether the model computes what this class does, as those of ``load_model`` may,
        and sooner.
        """
        weights = list(model.parameters())
        return (
            type(model) in KNOWN
            and tokens >= FEWEST_TOKENS
            and model.config._attn_implementation == PACKED_ATTENTION
            and model.config.hidden_act == "silu"
            and sum(weight.nbytes for weight in weights) <= MOST_BYTES
            and all(is_plain(weight) for weight in weights)
            and all(_is_known(module) for module in model.modules())
            and torch.backends.mkldnn.is_available()
            and not torch.is_autocast_enabled("cpu")
        )

    def step(self, tokens: Tensor, positions: Tensor, cache: SharedPromptCache) -> Tensor:
        """Return the logits after one more token a row, (r, at least V).

        Args:
            tokens: shape (r,), int64.
            positions: shape (r,), int64.
            cache: to which the tokens' keys and values are added.
        """
        x = self._embedding[tokens]  # (r, H)
        cos, sin = (angles.transpose(0, 1) for angles in self._rotary(x, positions[None]))
        half = self._head_dim // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # (r, 1, d)
        for i, block in enumerate(self._blocks):
            normed = self._normalise(x, block.first_norm)
            qkv = _apply(normed, block.qkv).unflatten(-1, (-1, self._head_dim))
            x = _apply_with(
                self._attend(i, qkv, block.head_norm, cos, sin, cache), block.output, "add", x
            )
            normed = self._normalise(x, block.second_norm)
            gate = _apply(normed, block.gate, "swish")
            x = _apply_with(_apply_with(normed, block.up, "mul", gate), block.down, "add", x)
        return _apply(self._normalise(x, self._norm), self._head)

    def _attend(
        self,
        i: int,
        qkv: Tensor,
        head_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: SharedPromptCache,
    ) -> Tensor:
        """Return what a block attends to, (r, heads · d), given (r, heads + 2 key heads, d)."""
        queries_and_keys, values = qkv.tensor_split([-self._key_heads], dim=1)
        if head_norm is not None:
            normed = F.rms_norm(queries_and_keys, (self._head_dim,), None, self._epsilon)
            queries_and_keys = normed * head_norm
        swapped = queries_and_keys.roll(self._head_dim // 2, -1)
        rotated = torch.addcmul(queries_and_keys * cos, swapped, sin)
        queries, keys = rotated.tensor_split([-self._key_heads], dim=1)
        seen = cache.update(keys[:, :, None], values[:, :, None], i)
        return cache.attend_in_layer(i, queries[:, :, None], *seen, self._scaling).flatten(1)

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self._epsilon)

    def _block(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = None
        if isinstance(getattr(attention, "q_norm", None), rms_norm.FusedRMSNorm):
            head_norm = torch.cat(
                [
                    attention.q_norm.weight.expand(self._heads, -1),
                    attention.k_norm.weight.expand(self._key_heads, -1),
                ]
            )
        return _Block(
            first_norm=layer.input_layernorm.weight,
            qkv=_in_onednn_order(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norm=head_norm,
            output=_in_onednn_order(attention.o_proj),
            second_norm=layer.post_attention_layernorm.weight,
            gate=_in_onednn_order(mlp.gate_proj),
            up=_in_onednn_order(mlp.up_proj),
            down=_in_onednn_order(mlp.down_proj),
        )


def _is_known(module: nn.Module) -> bool:
    """Return whether a module is as Transformers made it, or as ``load_model`` changed it."""
    package, _, _ = type(module).__module__.partition(".")
    return (
        package in ("torch", "transformers", "lmrl_env")
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and (not isinstance(module, nn.Linear) or type(module) is OneDNNLinear)
        and (not isinstance(module, rms_norm.KNOWN) or type(module) is rms_norm.FusedRMSNorm)
    )


def _in_onednn_order(*layers: Any) -> _Layer:
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return _Layer(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias)


def _apply(x: Tensor, layer: _Layer, then: str = "none") -> Tensor:
    """Return a layer of x, and an activation of that."""
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, then, [], "")


def _apply_with(x: Tensor, layer: _Layer, then: str, other: Tensor) -> Tensor:
    """Return a layer of x, plus or times another tensor."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, layer.weight, layer.bias, then)
