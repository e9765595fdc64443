"""Attention on the CPU in a packed row: tokens to their own row, and rows to what they continue.

A response attends to itself among padded rows of like length, and all responses of a prompt attend
to that as if they were one, where it stands; so do all prompts and responses to the tokens that
every prompt begins with. Short responses attend to a short prompt and themselves at once, by plain
products. Each part tells the logarithm of its normaliser Z, the sum of its exponentials:

    o = (Z₁ o₁ + Z₂ o₂) / (Z₁ + Z₂)

Backward, each part needs no more than o and log(Z₁ + Z₂) to have its share of the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Weights(NamedTuple):
    """Exponentials of scores above the highest, (b, g · k, P + k) and (b, g · k, 1)."""

    exponentials: Tensor
    highest: Tensor


class Block(NamedTuple):
    """Padded rows that attend to themselves, and to short prompts in front of them.

    Attributes:
        shape: rows and columns.
        prompts: tokens of the prompts, any at padding, shape (r, P), int64; and which of them are
            padding, (r, P), bool. None if the prompts are in ``prefixes``.
    """

    shape: tuple[int, int]
    prompts: tuple[Tensor, Tensor] | None = None


class PrefixPlan(NamedTuple):
    """Which tokens of a packed row attend to which.

    Attributes:
        blocks: of which each token is in one.
        cells: shape (c,), int64: the token in each cell of the blocks; any at padding.
        padding: shape (c,), bool: which cells hold none.
        real: shape (T,), int64: the cell of each token.
        prefixes: pairs of tokens and of those before them, in other rows, that they attend to.
    """

    blocks: list[Block]
    cells: Tensor
    padding: Tensor
    real: Tensor
    prefixes: list[tuple[slice, slice]]


def prefix_attention(
    queries: Tensor, keys: Tensor, values: Tensor, plan: PrefixPlan, scaling: float | None
) -> Tensor:
    """Return softmax(query · keyᵀ) · value of a packed row.

    Args:
        queries: shape (T, heads, d), float32 or float64, on the CPU.
        keys: shape (T, key-value heads, d).
        values: as ``keys``.
        plan: who attends to whom.
        scaling: multiplies the scores; 1 / √d by default.

    Returns:
        Shape (T, heads, d), with a first derivative and no second.
    """
    scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
    return _PrefixAttention.apply(queries, keys, values, plan, scaling)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(-3, -2) if x.dim() == 4 else x.transpose(0, 1)[None]


def _forward(rows: tuple[Tensor, ...], causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Return attended values, shape (t, heads, d), and log Z, (t, heads)."""
    output, log_z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_heads_first(x) for x in rows), 0.0, causal, scale=scaling
    )
    return output.transpose(1, 2).flatten(0, 1), log_z.transpose(1, 2).flatten(0, 1)


def _backward(
    rows: tuple[Tensor, ...], log_z: Tensor, causal: bool, scaling: float
) -> list[Tensor]:
    """Return the gradients of queries, keys and values, each of shape (t, heads, d)."""
    gradient, queries, keys, values, output = (_heads_first(x) for x in rows)
    log_z = log_z.transpose(-2, -1) if log_z.dim() == 3 else log_z.T[None]
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, queries, keys, values, output, log_z, 0.0, causal, scale=scaling
    )
    return [x.transpose(1, 2).flatten(0, 1) for x in gradients]


def _by_key_head(x: Tensor, heads: int) -> Tensor:
    """Lay (r, k, heads · g, d) out as (r · heads, g · k, d)."""
    return x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _by_token(x: Tensor, r: int, k: int) -> Tensor:
    """Lay (r · heads, g · k, d) out as (r · k, heads · g, d)."""
    by_row = x.unflatten(0, (r, -1)).unflatten(2, (-1, k))  # (r, heads, g, k, d)
    return by_row.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _behind(prompts: Tensor, packed: Tensor, rows: Tensor) -> Tensor:
    """Return keys, say, of prompts, (r, P), and of the rows behind them, (r · heads, P + k, d)."""
    in_front = packed.index_select(0, prompts.flatten()).unflatten(0, prompts.shape)
    return _by_key_head(torch.cat([in_front, rows], dim=1), rows.shape[2])


def _dense(
    queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scaling: float
) -> tuple[Tensor, Tensor, _Weights]:
    """Return what ``_forward`` does, and the weights before they are normalised.

    Args:
        queries: shape (r, k, heads · g, d).
        keys: shape (r · heads, P + k, d).
        values: as ``keys``.
        hidden: shape (r, P), bool: keys of the prompts that are padding.
        scaling: multiplies the scores.
    """
    (r, k), places, width = queries.shape[:2], keys.shape[1], hidden.shape[1]
    laid_out = _by_key_head(queries, len(keys) // r)
    later = queries.new_full((k, places), -torch.inf).triu(width + 1)
    later = later.repeat(laid_out.shape[1] // k, 1)
    scores = torch.baddbmm(later[None], laid_out, keys.transpose(1, 2), alpha=scaling)
    by_row = scores.unflatten(0, (r, -1))  # (r, heads, g · k, P + k)
    by_row[..., :width].masked_fill_(hidden[:, None, None], -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    z = weights.sum(-1, keepdim=True)
    output, log_z = (weights @ values).div_(z), highest + z.log()
    return _by_token(output, r, k), _by_token(log_z, r, k)[..., 0], _Weights(weights, highest)


def _dense_backward(
    rows: tuple[Tensor, ...], keys: Tensor, values: Tensor, weights: Tensor, scaling: float
) -> list[Tensor]:
    """Return the gradients of queries, (r · k, heads, d), and of keys and values, (r, P + k, ...).

    Args:
        rows: gradient, queries and output, (r, k, heads · g, d).
        keys: as ``_dense`` takes them.
        values: as ``_dense`` takes them.
        weights: shape (r · heads, g · k, P + k), of these places among all that is attended to.
        scaling: multiplies the scores.
    """
    r, k = rows[0].shape[:2]
    gradient, queries, output = (_by_key_head(x, len(keys) // r) for x in rows)
    mean = (gradient * output).sum(-1, keepdim=True)
    scores = (gradient @ values.transpose(1, 2)).sub_(mean).mul_(weights).mul_(scaling)
    return [
        _by_token(scores @ keys, r, k),
        (scores.transpose(1, 2) @ queries).unflatten(0, (r, -1)).transpose(1, 2),
        (weights.transpose(1, 2) @ gradient).unflatten(0, (r, -1)).transpose(1, 2),
    ]


def _blocks(plan: PrefixPlan, *packed: Tensor) -> list[tuple[Tensor, ...]]:
    """Return tensors (T, ...) in padded blocks, each of shape (r, k, ...)."""
    laid_out = [x.index_select(0, plan.cells) for x in packed]
    return list(zip(*(_cut(plan, x) for x in laid_out), strict=True))


def _cut(plan: PrefixPlan, cells: Tensor) -> list[Tensor]:
    shapes = [block.shape for block in plan.blocks]
    parts = cells.split([r * k for r, k in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _packed(plan: PrefixPlan, parts: list[Any]) -> list[Tensor]:
    """Return as (T, ...) what there is of the cells of each block."""
    return [torch.cat(x).index_select(0, plan.real) for x in zip(*parts, strict=True)]


def _log_z(plan: PrefixPlan, log_z: Tensor) -> list[Tensor]:
    """Return log Z, (T, heads), in blocks: infinite at padding, whose weights are then 0."""
    laid_out = log_z.index_select(0, plan.cells)
    return _cut(plan, laid_out.masked_fill_(plan.padding[:, None], torch.inf))


def _merge(output: Tensor, log_z: Tensor, own: Tensor, own_log_z: Tensor) -> None:
    """Put a further part into what the parts before it gave, in place."""
    output.lerp_(own, (own_log_z - log_z).sigmoid_()[..., None])
    log_z.copy_(torch.logaddexp(log_z, own_log_z))


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, plan: PrefixPlan, scaling: float
    ) -> Tensor:
        parts: list[tuple[Tensor, Tensor]] = []
        dense: list[_Weights | None] = []
        for block, rows in zip(plan.blocks, _blocks(plan, queries, keys, values), strict=True):
            if block.prompts is None:
                parts.append(_forward(rows, True, scaling))
                dense.append(None)
                continue
            tokens, hidden = block.prompts
            row_keys, row_values = _behind(tokens, keys, rows[1]), _behind(tokens, values, rows[2])
            *part, weights = _dense(rows[0], row_keys, row_values, hidden, scaling)
            parts.append((part[0], part[1]))
            dense.append(weights)
        output, log_z = _packed(plan, parts)
        for places, prefix in plan.prefixes:
            rows = queries[places], keys[prefix], values[prefix]
            _merge(output[places], log_z[places], *_forward(rows, False, scaling))
        normalised: list[Tensor | None] = []
        for own, total in zip(dense, _log_z(plan, log_z), strict=True):
            if own is not None:
                by_head = _by_key_head(total[..., None], len(own.highest) // len(total))
                own.exponentials.mul_((own.highest - by_head).exp_())
            normalised.append(None if own is None else own.exponentials)
        ctx.save_for_backward(queries, keys, values, output, log_z, *normalised)
        ctx.plan, ctx.scaling = plan, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, output, log_z, *all_weights = ctx.saved_tensors
        plan: PrefixPlan = ctx.plan
        parts, of_prompts = [], []
        padded = _blocks(plan, gradient, queries, keys, values, output)
        totals = _log_z(plan, log_z)
        for block, rows, weights, total in zip(
            plan.blocks, padded, all_weights, totals, strict=True
        ):
            if block.prompts is None:
                parts.append(_backward(rows, total, True, ctx.scaling))
                continue
            tokens, hidden = block.prompts
            row_keys, row_values = _behind(tokens, keys, rows[2]), _behind(tokens, values, rows[3])
            first, *both = _dense_backward(
                (rows[0], rows[1], rows[4]), row_keys, row_values, weights, ctx.scaling
            )
            width = hidden.shape[1]
            parts.append([first, *(x[:, width:].flatten(0, 1) for x in both)])
            in_front = [x[:, :width].flatten(0, 1) for x in both]
            of_prompts.append((tokens.flatten(), *in_front))
        query_gradient, key_gradient, value_gradient = _packed(plan, parts)
        for tokens, prompt_keys, prompt_values in of_prompts:
            key_gradient.index_add_(0, tokens, prompt_keys)
            value_gradient.index_add_(0, tokens, prompt_values)
        for places, prefix in plan.prefixes:
            part = _backward(
                (gradient[places], queries[places], keys[prefix], values[prefix], output[places]),
                log_z[places],
                False,
                ctx.scaling,
            )
            query_gradient[places] += part[0]
            key_gradient[prefix] += part[1]
            value_gradient[prefix] += part[2]
        return query_gradient, key_gradient, value_gradient, None, None
