"""One decoding step of models of Llama's kind on the CPU, of fewer operations.

A step of few rows and a small model is made of small operations, whose cost is that of calling
them. Here queries, keys and values are one product, weights of norms are multiplied into those of
the products behind them, and products add the residual, gate and multiply by themselves (oneDNN),
with weights in the order in which oneDNN reads them: 290 operations instead of 424 for four layers,
views included, and 0.66 to 0.81 of the time at 64 to 256 rows.
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

FIXED_ANGLES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose angles do not depend on the length of the text."""

MOST_BYTES = 2**29
"""Weights of which a copy is made for a batch: a step of larger models is no small operation."""

FEWEST_TOKENS = 2**8
"""Of a batch, below which a copy of the weights costs more than it saves."""


class _Layer(NamedTuple):
    """A linear layer, or several of the same input as one, in oneDNN's order."""

    weight: Tensor
    bias: Tensor | None


class _Block(NamedTuple):
    """A block of the model, the weights of its norms multiplied into the layers behind them.

    ``head_norm`` is that of queries and keys, (heads + key heads, d). Queries come scaled.
    """

    qkv: _Layer
    head_norm: Tensor | None
    output: _Layer
    gate: _Layer
    up: _Layer
    down: _Layer


class Decoder:
    """The logits of one more token a row, by the weights that a model has when it is made.

    Args:
        model: for which it ``pays``.
        length: most tokens of a prompt and its response together.
    """

    def __init__(self, model: PreTrainedModel, length: int):
        base: Any = model.base_model
        attention = base.layers[0].self_attn
        self._head_dim = int(attention.head_dim)
        self._scaling = float(attention.scaling)
        self._heads = int(model.config.num_attention_heads)
        self._key_heads = int(model.config.num_key_value_heads)
        self._epsilon = float(model.config.rms_norm_eps)
        self._embedding = base.embed_tokens.weight
        width = self._embedding.shape[1]
        # √(Σx² + Hε) = √H · √(mean(x²) + ε): norms divide by the left, and weights have the √H.
        self._root = width**0.5
        self._floor = torch.tensor((width * self._epsilon) ** 0.5)
        positions = torch.arange(length)[None]
        cos, sin = (angles[0] for angles in base.rotary_emb(self._embedding, positions))
        half = self._head_dim // 2
        sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        self._angles = torch.stack([cos, sin], dim=1)  # (length, 2, d)
        self._blocks = [self._block(layer) for layer in base.layers]
        self._head = self._after(base.norm, model.get_output_embeddings())

    @staticmethod
    def pays(model: PreTrainedModel, tokens: int) -> bool:
        """Return whether to make one for a batch of so many tokens.

        That is, whether the model computes what this class does, as those of ``load_model`` may,
        and sooner.
        """
        weights = list(model.parameters())
        rope = getattr(model.config, "rope_parameters", None) or {}
        return (
            type(model) in KNOWN
            and tokens >= FEWEST_TOKENS
            and model.config._attn_implementation == PACKED_ATTENTION
            and model.config.hidden_act == "silu"
            and rope.get("rope_type", "default") in FIXED_ANGLES
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
        angles = self._angles[positions]
        for i, block in enumerate(self._blocks):
            qkv = _apply(self._normalise(x), block.qkv).unflatten(-1, (-1, self._head_dim))
            attended = self._attend(i, qkv, block.head_norm, angles, cache)
            x = _apply_with(attended, block.output, "add", x)
            normed = self._normalise(x)
            gate = _apply(normed, block.gate, "swish")
            x = _apply_with(_apply_with(normed, block.up, "mul", gate), block.down, "add", x)
        return _apply(self._normalise(x), self._head)

    def _attend(
        self,
        i: int,
        qkv: Tensor,
        head_norm: Tensor | None,
        angles: Tensor,
        cache: SharedPromptCache,
    ) -> Tensor:
        """Return what a block attends to, (r, heads · d), given (r, heads + 2 key heads, d)."""
        queries_and_keys, values = qkv.tensor_split([-self._key_heads], dim=1)
        if head_norm is not None:
            normed = F.rms_norm(queries_and_keys, (self._head_dim,), None, self._epsilon)
            queries_and_keys = normed * head_norm
        cos, sin = angles.split(1, dim=1)
        swapped = queries_and_keys.roll(self._head_dim // 2, -1)
        rotated = torch.addcmul(queries_and_keys * cos, swapped, sin)
        queries, keys = rotated.tensor_split([-self._key_heads], dim=1)
        seen = cache.update(keys[:, :, None], values[:, :, None], i)
        queries = queries.unflatten(1, (self._key_heads, -1))
        return cache.attend_in_layer(i, queries, *seen).flatten(1)

    def _normalise(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(norm, self._floor)

    def _block(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        scale = torch.ones(self._heads + 2 * self._key_heads, 1)
        head_norm = None
        if isinstance(getattr(attention, "q_norm", None), rms_norm.FusedRMSNorm):
            head_norm = torch.cat(
                [
                    (attention.q_norm.weight * self._scaling).expand(self._heads, -1),
                    attention.k_norm.weight.expand(self._key_heads, -1),
                ]
            )
        else:
            scale[: self._heads] = self._scaling
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        return _Block(
            qkv=self._after(layer.input_layernorm, *qkv, scale=scale),
            head_norm=head_norm,
            output=_in_onednn_order(attention.o_proj.weight, attention.o_proj.bias),
            gate=self._after(layer.post_attention_layernorm, mlp.gate_proj),
            up=self._after(layer.post_attention_layernorm, mlp.up_proj),
            down=_in_onednn_order(mlp.down_proj.weight, mlp.down_proj.bias),
        )

    def _after(self, norm: Any, *layers: Any, scale: Tensor | None = None) -> _Layer:
        """Return layers of the same input as one, behind a norm that is ``_normalise`` now.

        Args:
            norm: in front of them.
            layers: linear.
            scale: shape (heads, 1): of each head that they put out.
        """
        weight = torch.cat([layer.weight for layer in layers]) * (norm.weight * self._root)
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        if scale is not None:
            scale = scale.expand(-1, self._head_dim).flatten()
            weight, bias = weight * scale[:, None], None if bias is None else bias * scale
        return _in_onednn_order(weight, bias)


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


def _in_onednn_order(weight: Tensor, bias: Tensor | None) -> _Layer:
    return _Layer(torch.ops.mkldnn._reorder_linear_weight(weight, None), bias)


def _apply(x: Tensor, layer: _Layer, then: str = "none") -> Tensor:
    """Return a layer of x, and an activation of that."""
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, then, [], "")


def _apply_with(x: Tensor, layer: _Layer, then: str, other: Tensor) -> Tensor:
    """Return a layer of x, plus or times another tensor."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, layer.weight, layer.bias, then)
