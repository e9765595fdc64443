"""What a loss divides its sum over tokens by, asked of the loss itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch

from lmrl_env.types import BatchTotals

_COUNTS: Mapping[str, float] = {"responses": 3, "tokens": 50, "max_new_tokens": 7, "length": 5}
WORDS = {
    "responses": "responses",
    "tokens": "all tokens of the optimiser step",
    "max_new_tokens": "max_new_tokens",
    "length": "length of the response",
}
"""What ``normaliser`` returns, for people."""


def follows_contract(policy_loss: Callable[..., Any] | None) -> TypeGuard[Callable[..., Any]]:
    """Return whether a loss can be called with log-probs, advantages, mask and totals alone."""
    if policy_loss is None:
        return False
    parameters = list(inspect.signature(policy_loss).parameters.values())
    return len(parameters) >= 5 and all(p.default is not p.empty for p in parameters[5:])


def normaliser(policy_loss: Callable[..., Any]) -> list[str]:
    """Return the counts whose product divides the sum over tokens in a loss.

    They are those in whose proportion the gradient of one token's log-prob falls, on-policy and at
    an advantage of 1: ``responses``, ``tokens`` (all of the optimiser step), ``max_new_tokens``
    and ``length`` (of the token's own response).

    Args:
        policy_loss: of an algorithm file.

    >>> from lmrl_env.algorithm_files import checkout_files, load_algorithms
    >>> path = next(path for path in checkout_files() if path.stem == "dr_grpo")
    >>> normaliser(load_algorithms([path])[0].policy_loss)
    ['responses', 'max_new_tokens']
    """
    divisor = _divisor(policy_loss, _COUNTS)
    return [
        name
        for name, count in _COUNTS.items()
        if _divisor(policy_loss, {**_COUNTS, name: 2 * count}) > 1.5 * divisor
    ]


def _divisor(policy_loss: Callable[..., Any], counts: Mapping[str, float]) -> float:
    shape = (1, int(counts["length"]))
    logprobs = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    totals = BatchTotals(*(int(counts[name]) for name in BatchTotals._fields))
    mask = torch.ones(shape, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, torch.zeros_like(logprobs), torch.ones(1), mask, totals)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return -1 / gradient[0, 0].item()


def in_numbers(names: list[str], *, responses: int, max_new_tokens: int) -> str:
    """Return the numbers of a normaliser.

    >>> in_numbers(["responses", "max_new_tokens"], responses=128, max_new_tokens=96)
    '128 × 96 = 12,288'
    >>> in_numbers(["responses", "length"], responses=128, max_new_tokens=96)
    '128 × at most 96'
    >>> in_numbers(["tokens"], responses=128, max_new_tokens=96)
    'at most 12,288'

    Args:
        names: see ``normaliser``.
        responses: of an optimiser step.
        max_new_tokens: K.
    """
    most = {
        "responses": f"{responses:,}",
        "tokens": f"at most {responses * max_new_tokens:,}",
        "max_new_tokens": f"{max_new_tokens:,}",
        "length": f"at most {max_new_tokens:,}",
    }
    text = " × ".join(most[name] for name in names)
    if names == ["responses", "max_new_tokens"]:
        text += f" = {responses * max_new_tokens:,}"
    return text
