"""Linear layers on the CPU by oneDNN, whose float32 products are twice as fast as PyTorch's own.

PyTorch gives float32 products to another library (MKL), which reaches 118 GFLOP/s a core on an
AMD EPYC with AVX-512 where oneDNN reaches 270, both in true float32: their errors against float64
are 2.1e-7 and 2.9e-7.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_PRODUCTS = 2**20
"""Multiplications of a layer below which oneDNN's cost of a call outweighs its speed."""


PREPARED = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""Says how many shapes oneDNN stays prepared for: its own 1,024 are fewer than a run has."""


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of a model compute by oneDNN where that is faster.

    Args:
        model: which is changed in place and keeps its parameters. Layers of subclasses, such as
            quantised ones, stay as they are. The environment variable ``PREPARED`` is set unless
            it is.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDNNLinear
    os.environ.setdefault(PREPARED, "16384")  # oneDNN reads it once, at its first product


class OneDNNLinear(nn.Linear):
    """A linear layer that computes by oneDNN if it is float32 on the CPU and not small.

    Which library computes is a function of types, devices and shapes, so that a run repeats.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return input · weightᵀ + bias, shape (..., out), of an input of shape (..., in)."""
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return input · weightᵀ + bias, as ``torch.nn.functional.linear`` does.

    Args:
        input: shape (..., in).
        weight: shape (out, in).
        bias: shape (out,).

    Returns:
        Shape (..., out). By oneDNN it has a first derivative and no second.
    """
    if not _pays(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled():
        return _OneDNN.apply(input, weight, bias)
    return _multiply(input, weight, bias)


def _pays(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        input.numel() * len(weight) >= FEWEST_PRODUCTS
        and all(is_plain(x) for x in (input, weight, bias) if x is not None)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def is_plain(x: Tensor) -> bool:
    """Return whether a tensor is dense float32 on the CPU and none that is shared among ranks."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and type(x) in (Tensor, nn.Parameter)
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient[None]  # (t, out)
        x_gradient = weight_gradient = bias_gradient = None
        if needs_x:
            x_gradient = _multiply(gradient, weight.T)
        if needs_weight:
            inputs = x.reshape(len(rows), -1)  # (t, in)
            if weight.shape[0] > weight.shape[1]:  # oneDNN is faster with the larger side second
                weight_gradient = _multiply(inputs.T, rows.T).T
            else:
                weight_gradient = _multiply(rows.T, inputs.T)
        if needs_bias:
            bias_gradient = rows.sum(0)
        return x_gradient, weight_gradient, bias_gradient
