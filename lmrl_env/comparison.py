"""Gradients of several algorithms on one rollout batch, and the weight that each gives a token.

On a fixed batch, losses of policy gradients differ in nothing but the weight that they give the
log-prob of a token, wᵢₜ = -∂L/∂log π(oᵢₜ), and the direction of ascent is Σᵢₜ wᵢₜ ∇log π(oᵢₜ): one
forward pass serves all algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lmrl_env.algorithm_files import Algorithm, errors_of
from lmrl_env.batches import MicroBatch, micro_batch_rows, micro_batches
from lmrl_env.errors import ConfigurationError
from lmrl_env.policy import Policy
from lmrl_env.rollout import Rollout
from lmrl_env.types import BatchTotals

Floats = npt.NDArray[np.float64]

SAME_POLICY_GAP = {"float32": 1e-3, "bfloat16": 2e-2}
"""Largest mean difference of log-probs, in nats, between engine and trainer of one policy."""

PARAMETERS_AT_ONCE = 2**20
"""Of each gradient, in double precision, when products are summed."""


class Comparison(NamedTuple):
    """Gradients and weights of F algorithms on one batch.

    Attributes:
        norms: shape (F,), of the gradients with respect to the model's parameters.
        cosines: shape (F, F), of the angles between them; NaN beside a gradient of 0.
        weights: shape (F, N, K), of each action token in the direction of ascent; 0 elsewhere.
        logprob_gap: mean difference of the policy's log-probs from the engine's, in nats.
        on_policy: whether the policy is taken for the one that sampled the batch.
    """

    norms: Floats
    cosines: Floats
    weights: npt.NDArray[np.float32]
    logprob_gap: float
    on_policy: bool


def compare(
    policy: Policy,
    batch: Rollout,
    group_size: int,
    algorithms: Sequence[Algorithm],
    *,
    temperature: float,
    same_policy_gap: float = SAME_POLICY_GAP["float32"],
    max_tokens: int = 8192,
    progress: bool = False,
) -> Comparison:
    """Return the exact gradients of the algorithms' losses, the batch being one optimiser step.

    g = Σᵢₜ -∂L/∂log π(oᵢₜ) · ∇log π(oᵢₜ)

    The old log-probs are the policy's own if it is the one that sampled the batch, else those that
    the engine reported. The losses keep their default settings, and a critic's values are 0.

    Args:
        policy: on any device; the main memory holds one gradient for each algorithm.
        batch: of whole groups.
        group_size: G.
        algorithms: F of them.
        temperature: that the batch was sampled at.
        same_policy_gap: largest mean difference of log-probs that is put down to arithmetic; nats.
        max_tokens: of a forward pass; does not change the result.
        progress: whether to show a bar where there is a terminal.

    Raises:
        ConfigurationError: if an algorithm fails, or returns what no loss can be.
    """
    device = next(policy.parameters()).device
    cuts = micro_batch_rows(batch, np.arange(len(batch.rewards)), group_size, max_tokens)

    def logprobs_of_micro_batches(task: str) -> Iterator[tuple[MicroBatch, Tensor]]:
        console = Console(stderr=True)
        disable = not (progress and console.is_terminal)
        micros = micro_batches(batch, cuts, group_size, device)
        for micro in track(
            micros, task, len(cuts), console=console, transient=True, disable=disable
        ):
            yield micro, policy(micro.tokens, temperature=temperature)[0]

    tokens = max(1, int(batch.mask.sum()))
    gap = 0.0
    with torch.no_grad():
        for micro, logprobs in logprobs_of_micro_batches("log-probs"):
            difference = (logprobs - micro.sampling_logprobs).abs()
            gap += (difference * micro.mask).sum().item() / tokens
    on_policy = gap <= same_policy_gap

    advantages = [_advantages(algorithm, batch, group_size).to(device) for algorithm in algorithms]
    totals = BatchTotals(len(batch.rewards), tokens, batch.mask.shape[1])
    parameters = list(policy.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    gradients = torch.zeros(len(algorithms), sum(sizes), dtype=parameters[0].dtype)
    weights = np.zeros((len(algorithms), *batch.mask.shape), dtype=np.float32)
    for micro, logprobs in logprobs_of_micro_batches("gradients"):
        old = logprobs.detach() if on_policy else micro.sampling_logprobs
        for f, algorithm in enumerate(algorithms):
            ascent = _token_weights(algorithm, micro, logprobs, old, advantages[f], totals)
            weights[f, micro.rows.cpu(), : micro.width] = (ascent * micro.mask).cpu()
            parts = torch.autograd.grad(
                logprobs,
                parameters,
                ascent,
                retain_graph=f < len(algorithms) - 1,
                materialize_grads=True,
            )
            for total, part in zip(gradients[f].split(sizes), parts, strict=True):
                total += part.flatten().to(total.device)
    return Comparison(*_norms_and_cosines(gradients), weights, gap, on_policy)


def _advantages(algorithm: Algorithm, batch: Rollout, group_size: int) -> Tensor:
    """Return the advantages of the batch, shape (N,) or (N, K)."""
    with errors_of(algorithm.name, algorithm.path):
        if algorithm.has_critic:
            rewards, mask = torch.from_numpy(batch.token_rewards), torch.from_numpy(batch.mask)
            advantages, _ = algorithm.compute_advantages(rewards, torch.zeros_like(rewards), mask)
        else:
            advantages = algorithm.compute_advantages(torch.from_numpy(batch.rewards), group_size)
    shape = tuple(getattr(advantages, "shape", ()))
    if shape not in (batch.rewards.shape, batch.mask.shape):
        raise ConfigurationError(
            f"compute_advantages of {algorithm.name} returns shape {shape}: expected a tensor of "
            f"shape {batch.rewards.shape}, or {batch.mask.shape} for advantages per token"
        )
    return advantages.float()


def _token_weights(
    algorithm: Algorithm,
    micro: MicroBatch,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    totals: BatchTotals,
) -> Tensor:
    """Return -∂L/∂log π, shape (n, k)."""
    leaf = logprobs.detach().requires_grad_()
    with errors_of(algorithm.name, algorithm.path):
        loss, _ = algorithm.policy_loss(
            leaf, old_logprobs, micro.part(advantages), micro.mask, totals
        )
        (descent,) = torch.autograd.grad(loss, leaf)
    if not descent.isfinite().all():
        raise ConfigurationError(
            f"policy_loss of {algorithm.name} returns {loss.item()}, whose gradient is not finite: "
            "expected finite numbers; look for a division by 0, as by the std of equal rewards"
        )
    return -descent


def _norms_and_cosines(gradients: Tensor) -> tuple[Floats, Floats]:
    """Return norms (F,) and cosines (F, F) of gradients (F, P), summed in double precision."""
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(PARAMETERS_AT_ONCE, dim=1):
        products += part.double() @ part.double().T
    norms = products.diagonal().sqrt().numpy()
    scale = np.where(norms > 0, norms, np.nan)
    return norms, products.numpy() / (scale[:, None] * scale)
