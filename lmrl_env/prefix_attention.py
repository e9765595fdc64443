"""Attention on the CPU in a packed row: tokens to their own row, and rows to what they continue.

A response attends to itself among padded rows of like length, and all responses of a prompt attend
to that as if they were one, where it stands; so do all prompts and responses to the tokens that
every prompt begins with. Each part tells the logarithm of its normaliser Z, the sum of its
exponentials:

    o = (Z₁ o₁ + Z₂ o₂) / (Z₁ + Z₂)

Backward, each part needs no more than o and log(Z₁ + Z₂) to have its share of the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PrefixPlan(NamedTuple):
    """Which tokens of a packed row attend to which.

    Attributes:
        blocks: rows and columns of each padded block of rows, which attend to themselves.
        cells: shape (c,), int64: the token in each cell of the blocks; any at padding.
        padding: shape (c,), bool: which cells hold none.
        real: shape (T,), int64: the cell of each token.
        prefixes: pairs of tokens and of those before them, in other rows, that they attend to.
    """

    blocks: list[tuple[int, int]]
    cells: Tensor
    padding: Tensor
    real: Tensor
    prefixes: list[tuple[slice, slice]]


def prefix_attention(
    queries: Tensor, keys: Tensor, values: Tensor, plan: PrefixPlan, scaling: float | None
) -> Tensor:
    """Return softmax(query · keyᵀ) · value of a packed row.

    Args:
        queries: shape (T, heads, d), floating point, on the CPU.
        keys: shape (T, key-value heads, d).
        values: as ``keys``.
        plan: who attends to whom.
        scaling: multiplies the scores; 1 / √d by default.

    Returns:
        Shape (T, heads, d), with a first derivative and no second.
    """
    return _PrefixAttention.apply(queries, keys, values, plan, scaling)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(-3, -2) if x.dim() == 4 else x.transpose(0, 1)[None]


def _forward(
    rows: tuple[Tensor, ...], causal: bool, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Return attended values, shape (t, heads, d), and log Z, (t, heads)."""
    output, log_z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_heads_first(x) for x in rows), 0.0, causal, scale=scaling
    )
    return output.transpose(1, 2).flatten(0, 1), log_z.transpose(1, 2).flatten(0, 1)


def _backward(
    rows: tuple[Tensor, ...], log_z: Tensor, causal: bool, scaling: float | None
) -> list[Tensor]:
    """Return the gradients of queries, keys and values, each of shape (t, heads, d)."""
    gradient, queries, keys, values, output = (_heads_first(x) for x in rows)
    log_z = log_z.transpose(-2, -1) if log_z.dim() == 3 else log_z.T[None]
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, queries, keys, values, output, log_z, 0.0, causal, scale=scaling
    )
    return [x.transpose(1, 2).flatten(0, 1) for x in gradients]


def _blocks(plan: PrefixPlan, *packed: Tensor) -> list[tuple[Tensor, ...]]:
    """Return tensors (T, ...) in padded blocks, each of shape (r, k, ...)."""
    laid_out = [x.index_select(0, plan.cells) for x in packed]
    cut = [
        [
            part.unflatten(0, shape)
            for part, shape in zip(
                x.split([r * k for r, k in plan.blocks]), plan.blocks, strict=True
            )
        ]
        for x in laid_out
    ]
    return list(zip(*cut, strict=True))


def _packed(plan: PrefixPlan, parts: list[Any]) -> list[Tensor]:
    """Return as (T, ...) what there is of the cells of each block."""
    return [torch.cat(x).index_select(0, plan.real) for x in zip(*parts, strict=True)]


def _merge(output: Tensor, log_z: Tensor, own: Tensor, own_log_z: Tensor) -> None:
    """Put a further part into what the parts before it gave, in place."""
    share = (own_log_z - log_z).sigmoid_()[..., None].to(own.dtype)
    output.lerp_(own, share)
    log_z.copy_(torch.logaddexp(log_z, own_log_z))


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, plan: PrefixPlan,
        scaling: float | None,
    ) -> Tensor:  # fmt: skip
        parts = [_forward(rows, True, scaling) for rows in _blocks(plan, queries, keys, values)]
        output, log_z = _packed(plan, parts)
        for tokens, prefix in plan.prefixes:
            rows = queries[tokens], keys[prefix], values[prefix]
            _merge(output[tokens], log_z[tokens], *_forward(rows, False, scaling))
        ctx.save_for_backward(queries, keys, values, output, log_z)
        ctx.plan, ctx.scaling = plan, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, output, log_z = ctx.saved_tensors
        plan: PrefixPlan = ctx.plan
        parts = []
        padded = _blocks(plan, gradient, queries, keys, values, output, log_z)
        cells = [r * k for r, k in plan.blocks]
        for (*rows, z), padding in zip(padded, plan.padding.split(cells), strict=True):
            # Padding attends with the weight exp(score - ∞) = 0.
            z.masked_fill_(padding.view(*z.shape[:2], 1), torch.inf)
            parts.append(_backward(tuple(rows), z, True, ctx.scaling))
        query_gradient, key_gradient, value_gradient = _packed(plan, parts)
        for tokens, prefix in plan.prefixes:
            own = _backward(
                (gradient[tokens], queries[tokens], keys[prefix], values[prefix], output[tokens]),
                log_z[tokens],
                False,
                ctx.scaling,
            )
            query_gradient[tokens] += own[0]
            key_gradient[prefix] += own[1]
            value_gradient[prefix] += own[2]
        return query_gradient, key_gradient, value_gradient, None, None
