"""Proof that the gradient of a loss does not depend on how the batch is cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmrl_env.testing.ragged import GROUP_SIZE, Cut, RaggedBatch, cuts

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Largest accepted difference from the whole batch, relative to its gradient's norm."""
METRIC_TOLERANCE = 1e-6
"""Of metrics, which may be counts in float32 whatever the loss is."""


class _Unchanged:
    """Raises AssertionError if a tensor was changed in place meanwhile."""

    def __init__(self, function: str, **inputs: Tensor):
        self.function = function
        self.inputs = inputs
        self.copies = {name: tensor.detach().clone() for name, tensor in inputs.items()}

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for name, tensor in self.inputs.items() if error is None else ():
            if not torch.equal(tensor, self.copies[name]):
                raise AssertionError(
                    f"{self.function} changed its argument {name!r} in place: expected it as it "
                    "was, since the next epoch reads it again; work on a copy"
                )


def _advantages(
    batch: RaggedBatch, compute_advantages: Callable[..., Any], with_values: bool
) -> Tensor:
    """Return what ``compute_advantages`` says of the whole batch."""
    if not with_values:
        with _Unchanged("compute_advantages", rewards=batch.rewards):
            result: Tensor = compute_advantages(batch.rewards, GROUP_SIZE)
        return result
    last = batch.lengths[:, None] - 1
    rewards = torch.zeros_like(batch.values).scatter(1, last, batch.rewards[:, None])
    inputs = {"rewards": rewards, "values": batch.values, "mask": batch.mask}
    with _Unchanged("compute_advantages", **inputs):
        advantages, _ = compute_advantages(rewards, batch.values, batch.mask)
    return advantages


class _Sums(NamedTuple):
    """What the micro-batches of one cut sum to: loss, metrics, gradient of each parameter."""

    loss: float
    metrics: dict[str, float]
    gradient: dict[str, Tensor]


def _sums(
    batch: RaggedBatch,
    cut: Cut,
    advantages: Tensor,
    policy_loss: Callable[..., tuple[Tensor, Mapping[str, Tensor]]],
    loss_kwargs: Mapping[str, Any],
    with_reference: bool,
) -> _Sums:
    """Return the sums over the micro-batches of a cut."""
    batch.policy.zero_grad()
    loss_sum, metric_sums = 0.0, defaultdict[str, float](float)
    for part in cut.parts:
        inputs = batch.micro_batch(cut, part, advantages)
        reference = inputs.pop("ref_logprobs")
        extra = {"ref_logprobs": reference} if with_reference else {}
        with _Unchanged("policy_loss", **inputs, **extra):
            loss, metrics = policy_loss(*inputs.values(), batch.totals, **extra, **loss_kwargs)
        if loss.requires_grad:
            loss.backward()
        loss_sum += loss.item()
        for name, share in metrics.items():
            metric_sums[name] += float(share)
    gradient = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in batch.policy.named_parameters()
    }
    return _Sums(loss_sum, dict(metric_sums), gradient)


def _compare(cut: Cut, whole: _Sums, parts: _Sums, tolerance: float, setting: str) -> None:
    """Raise AssertionError if the sums over the micro-batches are not those of the whole batch."""
    start = f"{cut.name} ({setting}): "
    expected, got = (torch.cat([g.flatten() for g in s.gradient.values()]) for s in (whole, parts))
    difference = float((got - expected).norm() / expected.norm())
    if not difference <= tolerance:
        name, index = _worst_parameter(whole.gradient, parts.gradient)
        raise AssertionError(
            f"{start}the gradient differs from the whole batch's by {difference:.3g} of its norm "
            f"(accepted: {tolerance:.0e}), most at {name}{list(index)}: "
            f"{parts.gradient[name][index]:.6g}, expected {whole.gradient[name][index]:.6g}; its "
            f"norm is {got.norm() / expected.norm():.4g} times the expected one; {cut.hint}"
        )
    if whole.metrics.keys() != parts.metrics.keys():
        raise AssertionError(
            f"{start}metrics {sorted(parts.metrics)}, expected {sorted(whole.metrics)}: every "
            "micro-batch must give a share of every metric"
        )
    shares = {"the loss": (parts.loss, whole.loss, tolerance)}
    for key in whole.metrics:
        shares[f"metric {key!r}"] = parts.metrics[key], whole.metrics[key], METRIC_TOLERANCE
    for name, (value, right, accepted) in shares.items():
        if not abs(value - right) <= accepted * max(1.0, abs(right)):
            raise AssertionError(
                f"{start}the shares of {name} sum to {value:.6g}, expected {right:.6g}; {cut.hint}"
            )


def _worst_parameter(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor]
) -> tuple[str, tuple[int, ...]]:
    """Return name and index of the entry that differs most."""
    differences = {name: (got[name] - expected[name]).abs().nan_to_num(torch.inf) for name in got}
    name = max(differences, key=lambda key: differences[key].max().item())
    index = np.unravel_index(int(differences[name].argmax()), differences[name].shape)
    return name, tuple(int(i) for i in index)


def assert_partition_invariant(
    compute_advantages: Callable[..., Any],
    policy_loss: Callable[..., tuple[Tensor, Mapping[str, Tensor]]],
    *,
    loss_kwargs: Mapping[str, Any] = MappingProxyType({}),
    with_values: bool = False,
    with_reference: bool = False,
    seed: int = 0,
) -> None:
    """Prove that a loss gives one gradient however its batch is cut and laid out.

    Σ_micro-batches ∇ policy_loss(micro-batch, totals) = ∇ policy_loss(batch, totals)

    The batch is random and ragged: 4 groups of 3 responses of 1 to 7 tokens, budget 9, some tokens
    inside a response being state and no action, one group's rewards all equal, ``old_logprobs`` off
    the policy by about 0.3 nats. ``compute_advantages`` sees it once and whole; the loss sees
    micro-batches of 1 to 12 rows, uneven ones, an empty one, rows in another order, wider and left
    padding, micro-batches as wide as their longest response, and finite nonsense where the mask is
    False. Gradient, loss and every metric must sum to those of the whole batch, the gradient within
    1e-10 of its norm in float64 and 1e-6 in float32, for advantages as they were computed and for
    advantages per token, times importance weights. No argument may be changed in place.

    Args:
        compute_advantages: ``(rewards, group_size) -> advantages`` as in ``algos/dr_grpo.py``;
            rewards of shape (N,), advantages of shape (N,) or (N, K).
        policy_loss: ``(logprobs, old_logprobs, advantages, mask, totals, **loss_kwargs) -> (loss,
            metrics)`` as in ``algos/dr_grpo.py``.
        loss_kwargs: further keyword arguments of the loss.
        with_values: call ``compute_advantages(rewards, values, mask) -> (advantages, returns)``, as
            in ``algos/ppo.py``; all of shape (N, K), the reward at the last token.
        with_reference: pass ``ref_logprobs``, shape (n, k), to the loss.
        seed: of the batch.

    Raises:
        AssertionError: with the cut, the difference, the worst parameter and the usual cause; or
            if the gradient of the whole batch is 0 or not finite, which would prove nothing.

    >>> def compute_advantages(rewards, group_size):
    ...     groups = rewards.reshape(-1, group_size)
    ...     return (groups - groups.mean(dim=1, keepdim=True)).reshape(-1)
    >>> def policy_loss(logprobs, old_logprobs, advantages, mask, totals):
    ...     advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    ...     return -(advantages * logprobs * mask).sum() / totals.tokens, {}
    >>> assert_partition_invariant(compute_advantages, policy_loss)
    """
    for dtype, tolerance in TOLERANCE.items():
        batch = RaggedBatch(seed, dtype)
        advantages = _advantages(batch, compute_advantages, with_values)
        per_token = advantages if advantages.dim() == 2 else advantages[:, None]
        for given in (advantages, per_token * batch.importance_weights):
            setting = f"{dtype}, advantages of shape {tuple(given.shape)}".removeprefix("torch.")
            arguments = (given, policy_loss, loss_kwargs, with_reference)
            whole = _sums(
                batch, Cut("the whole batch", (torch.arange(batch.size),), ""), *arguments
            )
            norm = float(torch.cat([g.flatten() for g in whole.gradient.values()]).norm())
            if not 0 < norm < torch.inf:
                raise AssertionError(
                    f"the whole batch ({setting}) has a gradient of norm {norm}: expected a finite "
                    "one above 0, or nothing is proved; does the loss keep the graph of logprobs?"
                )
            for cut in cuts(batch.size, seed):
                _compare(cut, whole, _sums(batch, cut, *arguments), tolerance, setting)
