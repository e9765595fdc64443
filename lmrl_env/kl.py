"""Estimators of the divergence from a reference policy, out of the log-probs of samples.

With x = log π(o) - log π_ref(o) and o ~ π (Schulman 2020, "Approximating KL Divergence"), the mean
of each estimator approximates KL(π‖π_ref). The *gradient* of that mean, which is what a penalty
does to the policy, is another matter; for x of a whole response:

=========================  ==========================================================
k1 = x, in the loss        0: it penalises nothing
k1 = x, in the reward      ∇KL(π‖π_ref), times the coefficient
k2 = x² / 2, in the loss   ∇KL(π‖π_ref)
k3 = exp(-x) - 1 + x,      ∇KL(π_ref‖π), the divergence the other way round
in the loss
=========================  ==========================================================

Summed over the tokens of a response, k2 and k3 in the loss give neither of the two gradients: they
leave out how a token changes the states that follow it. ``algos/grpo.py`` has k3 per token in the
loss, as its paper does; ``algos/rloo.py`` has k1 of the response in the reward;
``algos/reinforce_pp.py`` has k1 per token in the rewards, which sums to the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """Return x, unbiased for the divergence, of either sign.

    Args:
        log_ratio: x = log π - log π_ref, any shape; nats.
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return x² / 2, biased for the divergence, never negative.

    Args:
        log_ratio: x = log π - log π_ref, any shape; nats.
    """
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Return exp(-x) - 1 + x, unbiased for the divergence, never negative.

    Args:
        log_ratio: x = log π - log π_ref, any shape; nats.

    >>> k3(torch.tensor([0.0, 0.1, -0.1]))
    tensor([0.0000, 0.0048, 0.0052])
    """
    return torch.expm1(-log_ratio) + log_ratio
