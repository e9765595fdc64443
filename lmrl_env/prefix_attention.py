"""Attention on the CPU of responses to their shared prompts, in parts put together exactly.

All responses of a prompt attend to it as if they were one, where it stands, and to themselves in
padded rows; so do all prompts and responses to the tokens that every prompt begins with. Each
part tells the logarithm of its normaliser Z, the sum of its exponentials:

    o = (Z₁ o₁ + Z₂ o₂) / (Z₁ + Z₂)

Backward, each part needs no more than o and log(Z₁ + Z₂) to have its share of the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Tokens of a packed row that attend to tokens of it.

    Attributes:
        queries: the tokens that attend.
        keys: the tokens that they attend to.
        is_causal: whether these are the same tokens, of which none sees a later one.
        is_first: whether no part before this one had its queries.
    """

    queries: slice
    keys: slice
    is_causal: bool
    is_first: bool


class PrefixPlan(NamedTuple):
    """Which tokens of a packed row attend to which.

    Attributes:
        parts: tokens that attend to tokens where these stand, none of them empty.
        responses: tokens of all responses, the end of the row.
        blocks: rows and columns of each padded block of responses.
        cells: shape (c,), int64: the token in each cell of the blocks; any at padding.
        padding: shape (c,), bool: which cells hold none.
        real: shape (t,), int64: the cell of each of the responses' tokens.
    """

    parts: list[Part]
    responses: slice
    blocks: list[tuple[int, int]]
    cells: Tensor
    padding: Tensor
    real: Tensor


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
        output = queries.new_empty(queries.shape)
        log_z = queries.new_empty(
            queries.shape[:2], dtype=torch.promote_types(queries.dtype, torch.float32)
        )
        for part in plan.parts:
            rows = (queries[part.queries], keys[part.keys], values[part.keys])
            own, own_log_z = _forward(rows, part.is_causal, scaling)
            if part.is_first:
                output[part.queries], log_z[part.queries] = own, own_log_z
            else:
                _merge(output[part.queries], log_z[part.queries], own, own_log_z)
        if plan.blocks:
            parts = [_forward(rows, True, scaling) for rows in _blocks(plan, queries, keys, values)]
            own, own_log_z = (
                torch.cat(x).index_select(0, plan.real) for x in zip(*parts, strict=True)
            )
            _merge(output[plan.responses], log_z[plan.responses], own, own_log_z)
        ctx.save_for_backward(queries, keys, values, output, log_z)
        ctx.plan, ctx.scaling = plan, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, output, log_z = ctx.saved_tensors
        plan: PrefixPlan = ctx.plan
        query_gradient, key_gradient, value_gradient = (
            torch.zeros_like(x) for x in (queries, keys, values)
        )
        for part in plan.parts:
            own = _backward(
                (
                    gradient[part.queries],
                    queries[part.queries],
                    keys[part.keys],
                    values[part.keys],
                    output[part.queries],
                ),
                log_z[part.queries],
                part.is_causal,
                ctx.scaling,
            )
            query_gradient[part.queries] += own[0]
            key_gradient[part.keys] += own[1]
            value_gradient[part.keys] += own[2]
        if plan.blocks:
            padded = _blocks(plan, gradient, queries, keys, values, output, log_z)
            parts = []
            cells = [r * k for r, k in plan.blocks]
            for (*rows, z), padding in zip(padded, plan.padding.split(cells), strict=True):
                # Padding attends with the weight exp(score - ∞) = 0.
                z.masked_fill_(padding.view(*z.shape[:2], 1), torch.inf)
                parts.append(_backward(tuple(rows), z, True, ctx.scaling))
            own = [torch.cat(x).index_select(0, plan.real) for x in zip(*parts, strict=True)]
            query_gradient[plan.responses] += own[0]
            key_gradient[plan.responses], value_gradient[plan.responses] = own[1:]
        return query_gradient, key_gradient, value_gradient, None, None
