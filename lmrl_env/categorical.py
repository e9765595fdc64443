"""Log-probability and entropy of a categorical distribution, with few tensors of its logits' size.

Where the logits are recomputed for the backward pass, by a checkpoint, this frees them again: one
node of the graph has made both results, so that the gradient of one alone visits all that was
recomputed. Nodes of their own for the entropy, which is often computed and seldom in the loss,
would never be visited, and would hold as much as all logits at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_prob_and_entropy(
    logits: Tensor, values: Tensor, temperature: float, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(logits / temperature) at the values, and −Σᵥ π(v) log π(v), in nats.

    Args:
        logits: shape (t, V), floating point.
        values: shape (t,), int64.
        temperature: above 0.
        with_entropy: whether to compute the entropy too.

    Returns:
        Both of shape (t,), at least float32, with a first derivative and no second; None for an
        entropy that is not asked for.

    >>> log_prob_and_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), 1.0)
    (tensor([-0.6931]), tensor([0.6931]))
    """
    return _LogProbAndEntropy.apply(logits, values, temperature, with_entropy)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(at_least_float32) / temperature).log_softmax(-1)


class _LogProbAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, values: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(logits, values)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        logprobs = _log_softmax(logits, temperature)
        entropy = -logprobs.exp().mul_(logprobs).sum(-1) if with_entropy else None
        return logprobs.gather(-1, values[:, None])[:, 0], entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        # ∂ log π(y) / ∂zᵥ = 1[v = y] − π(v),   ∂H / ∂zᵥ = −π(v) (log π(v) + H),   z = logits / T
        logits, values = ctx.saved_tensors
        logprobs = _log_softmax(logits, ctx.temperature)
        gradient = logprobs.exp()
        if grad_entropy is not None:
            entropy = -(gradient * logprobs).sum(-1)
            factor = logprobs.add_(entropy[:, None]).mul_(grad_entropy[:, None])
            if grad_logprob is not None:
                factor.add_(grad_logprob[:, None])
            gradient.mul_(factor.neg_())
        elif grad_logprob is not None:
            gradient.mul_(-grad_logprob[:, None])
        else:
            return None, None, None, None
        if grad_logprob is not None:
            gradient.scatter_add_(-1, values[:, None], grad_logprob[:, None])
        return gradient.div_(ctx.temperature).to(logits.dtype), None, None, None
