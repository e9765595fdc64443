"""The variance of a policy-gradient estimate, exact, for groups of any size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lmrl_env.errors import ConfigurationError
from lmrl_env.exact.mdp import TokenMDP, TokenPolicy, TrainablePolicy
from lmrl_env.exact.trajectories import Trajectories, enumerate_trajectories
from lmrl_env.importance import Level, truncated_importance_weights


class GradientMoments(NamedTuple):
    """Mean and variance of the gradient estimate that one group of responses gives.

    Attributes:
        mean: E[g], shape (P,), float64, flat over the policy's parameters.
        variance: E‖g - E[g]‖², the trace of the covariance.
    """

    mean: Tensor
    variance: float

    def squared_error(self, gradient: Tensor, groups: int) -> float:
        """Return E‖ḡ - gradient‖² of the mean ḡ of independent groups."""
        return (self.mean - gradient).square().sum().item() + self.variance / groups


def leave_one_out_moments(
    mdp: TokenMDP,
    policy: TrainablePolicy,
    *,
    group_size: int,
    sampling_policy: TokenPolicy | None = None,
    tis_cap: float | None = None,
    tis_level: Level = "token",
) -> GradientMoments:
    """Return mean and variance of RLOO's gradient estimate, at the first update of a batch.

    g = 1/G Σᵢ (Rᵢ - mean of the other rewards) vᵢ = 1/(G-1) Σᵢ (Rᵢ - R̄) (vᵢ - v̄),
    vᵢ = Σₜ wᵢₜ ∇log π(oᵢₜ | q, oᵢ,<ₜ)

    It is the sample covariance of reward and vᵢ, a U-statistic (Hoeffding 1948), so that its
    moments need no enumeration of groups. With r = R - E[R] and u = v - E[v], given the question:

    E[g] = E[r u],   E‖g - E[g]‖² = E[r²‖u‖²] / G + (E[r²] E‖u‖² - (G-2) ‖E[r u]‖²) / (G (G-1))

    Dr. GRPO's estimate is (G-1)/(G·K) times RLOO's.

    Args:
        mdp: to enumerate; each group has a question of its own, drawn by ``question_probs``.
        policy: that is trained, the old one too.
        group_size: G, at least 2.
        sampling_policy: that the responses are drawn from; the policy itself if None.
        tis_cap: weighs by truncated importance weights from sampling to trained policy.
        tis_level: of the weights, of a token or of the whole response.

    Raises:
        ConfigurationError: for a group of one; or as ``enumerate_trajectories``.

    >>> from lmrl_env.exact import TabularPolicy
    >>> coin = TokenMDP(2, 1, reward=lambda question, tokens, terminated: tokens[0])
    >>> leave_one_out_moments(coin, TabularPolicy(coin, scale=0), group_size=2)
    GradientMoments(mean=tensor([-0.2500,  0.2500], dtype=torch.float64), variance=0.125)
    """
    if group_size < 2:
        raise ConfigurationError(
            f"group_size={group_size}: expected at least 2, since a response is compared with the "
            "others of its group"
        )
    sampling = policy if sampling_policy is None else sampling_policy
    trajectories = enumerate_trajectories(mdp, sampling)
    weights = trajectories.mask.double()
    if tis_cap is not None:
        with torch.no_grad():
            old, sampled = trajectories.logprobs(policy), trajectories.logprobs(sampling)
        weights *= truncated_importance_weights(
            old, sampled, tis_cap, level=tis_level, mask=trajectories.mask
        )
    vectors = torch.einsum("lk,lkp->lp", weights, _scores(trajectories, policy))
    mean, second_moment = torch.zeros_like(vectors[0]), 0.0
    for question, asked in enumerate(mdp.question_probs):
        rows = (trajectories.questions == question).nonzero()[:, 0]
        own_mean, own_variance = _covariance_moments(
            trajectories.probs[rows], trajectories.rewards[rows], vectors[rows], group_size
        )
        mean += asked * own_mean
        second_moment += asked * (own_variance + own_mean.square().sum().item())
    return GradientMoments(mean, second_moment - mean.square().sum().item())


def _covariance_moments(
    probs: Tensor, rewards: Tensor, vectors: Tensor, group_size: int
) -> tuple[Tensor, float]:
    """Return mean (P,) and variance of the sample covariance of rewards (L,) and vectors (L, P)."""
    rewards = rewards - probs @ rewards
    vectors = vectors - probs @ vectors
    r2, u2 = rewards.square(), vectors.square().sum(1)
    mean = (probs * rewards) @ vectors
    rest = (probs @ r2) * (probs @ u2) - (group_size - 2) * mean.square().sum()
    variance = probs @ (r2 * u2) / group_size + rest / (group_size * (group_size - 1))
    return mean, variance.item()


def _scores(trajectories: Trajectories, policy: TrainablePolicy) -> Tensor:
    """Return ∇log π of each token, shape (L, K, P)."""
    parameters = [p for _, p in policy.named_parameters() if p.requires_grad]
    table = torch.stack([policy(*state) for state in trajectories.states])  # (S, V)
    each = torch.eye(table.numel(), dtype=table.dtype).view(-1, *table.shape)  # (S·V, S, V)
    gradients = torch.autograd.grad(table, parameters, each, is_grads_batched=True)
    rows = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)  # (S·V, P)
    return rows[trajectories.visited * table.shape[1] + trajectories.tokens]
