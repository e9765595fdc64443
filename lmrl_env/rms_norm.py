"""RMSNorm as one step of the graph: half the passes over memory of Transformers' formula.

Zhang and Sennrich 2019, arXiv:1910.07467:   y = w ⊙ x / √(mean(x²) + ε)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

KNOWN = (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
"""Classes of this very formula. Others' differ, such as Gemma's, whose weights are w - 1."""


def use_fused_norms(model: nn.Module) -> None:
    """Make the norms of a model compute as one step, if they are of a known class.

    Args:
        model: which is changed in place and keeps its parameters.
    """
    for layer in model.modules():
        if type(layer) in KNOWN and _is_the_formula(layer):
            layer.__class__ = FusedRMSNorm


class FusedRMSNorm(LlamaRMSNorm):
    """An RMSNorm that is one step of the graph in float32, and Transformers' otherwise."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised states, of the same shape (..., H)."""
        if hidden_states.dtype == self.weight.dtype == torch.float32:
            return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


@torch.no_grad()
def _is_the_formula(layer: nn.Module) -> bool:
    """Return whether a layer computes what ``FusedRMSNorm`` would, on known states."""
    weight: Any = layer.weight
    epsilon: Any = layer.variance_epsilon
    states = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    expected = weight * states * torch.rsqrt(states.square().mean() + epsilon)
    tolerance = 10 * torch.finfo(torch.promote_types(weight.dtype, torch.bfloat16)).eps
    return torch.allclose(layer(states), expected, rtol=max(tolerance, 1e-5), atol=1e-6)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # With n = x·s:   ∂w = Σ g ⊙ n,   ∂x = s (g ⊙ w - n mean(g ⊙ w ⊙ n))
        x, weight, scale = ctx.saved_tensors
        normalised = x * scale
        products = gradient * normalised
        weight_gradient = (
            products.reshape(-1, len(weight)).sum(0) if ctx.needs_input_grad[1] else None
        )
        if not ctx.needs_input_grad[0]:
            return None, weight_gradient, None
        mean = (products @ weight)[..., None] / x.shape[-1]
        own = (gradient * weight).addcmul_(normalised, mean, value=-1).mul_(scale)
        return own, weight_gradient, None
