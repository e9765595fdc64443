"""The exact expectation of an estimator's gradient, out of its own code and without sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from lmrl_env.errors import ConfigurationError
from lmrl_env.exact.batches import collapse, enumerate_batches
from lmrl_env.exact.mdp import TokenMDP, TokenPolicy, TrainablePolicy
from lmrl_env.exact.trajectories import Trajectories, enumerate_trajectories, flat_gradient
from lmrl_env.importance import Level, reweight
from lmrl_env.types import BatchTotals

CHUNK = 4096
"""Batches that are differentiated at a time."""
CHECKED_BATCHES = 8
"""Batches that are computed twice, the second time one by one and in another order."""
SYMMETRY_TOLERANCE = 1e-6
"""Largest accepted difference between the two, relative to the largest gradient."""

ComputeAdvantages = Callable[..., Any]
PolicyLoss = Callable[..., tuple[Tensor, Any]]


def expected_gradient(
    compute_advantages: ComputeAdvantages,
    policy_loss: PolicyLoss,
    mdp: TokenMDP,
    policy: TrainablePolicy,
    *,
    group_size: int,
    questions: int | Sequence[int] = 1,
    old_policy: TokenPolicy | None = None,
    sampling_policy: TokenPolicy | None = None,
    tis_cap: float | None = None,
    tis_level: Level = "token",
    ref_policy: TokenPolicy | None = None,
    critic: Callable[[int, tuple[int, ...]], float] | None = None,
    token_rewards: bool = False,
    collapsed: bool = False,
    advantage_kwargs: Mapping[str, Any] | None = None,
    loss_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return the exact expectation of the direction in which an estimator moves the policy.

    E[-∇L] = -Σ_b P(b) ∇L(b), over all training batches b of B groups of G responses, where L is the
    loss that the two functions of an algorithm file make of the batch.

    The functions must treat the groups of a batch alike, and the responses of a group, since a
    batch is enumerated in one order only; this is checked on a few batches. They run under
    ``torch.func.vmap``, or batch by batch if they branch on values of tensors.

    Args:
        compute_advantages: ``(rewards, group_size) -> advantages``, from (N,) to (N,), with
            N = B·G; with a critic ``(rewards, values, mask) -> (advantages, ...)``, all (N, K).
        policy_loss: ``(logprobs, old_logprobs, advantages, mask, totals) -> (loss, metrics)``.
        mdp: to enumerate.
        policy: that is trained.
        group_size: G, at least 1.
        questions: B, how many are drawn independently for a batch; or which, if they are fixed.
        old_policy: of ``old_logprobs``; the policy itself if None, which is on-policy.
        sampling_policy: that the responses are drawn from; the old policy if None.
        tis_cap: weighs by truncated importance weights from sampling to old policy.
        tis_level: of the weights, of a token or of the whole response.
        ref_policy: adds the keyword ``ref_logprobs``, shape (N, K), to the loss.
        critic: value of a state, before its action.
        token_rewards: gives advantages the rewards of tokens, (N, K), as a critic always does.
        collapsed: takes trajectories together that differ in their tokens only. On-policy, and for
            losses that depend on reward and length only; this too is checked on a few batches.
        advantage_kwargs: further keywords of ``compute_advantages``.
        loss_kwargs: further keywords of ``policy_loss``; without clipping is with large bounds.

    Returns:
        Shape (P,), float64, flat over the trained parameters of the policy.

    Raises:
        ConfigurationError: if there are too many batches, the arguments exclude each other, or the
            functions fail a check above or give a gradient that is not finite.

    >>> from lmrl_env.exact import TabularPolicy, exact_gradient
    >>> def reinforce(logprobs, old_logprobs, advantages, mask, totals):
    ...     return -(advantages[:, None] * logprobs * mask).sum() / totals.responses, {}
    >>> mdp = TokenMDP(2, 2, reward=lambda question, tokens, terminated: tokens[0], eos=1)
    >>> policy = TabularPolicy(mdp)
    >>> expected = expected_gradient(lambda rewards, group_size: rewards, reinforce, mdp, policy,
    ...                              group_size=2)
    >>> torch.allclose(expected, exact_gradient(mdp, policy), atol=0, rtol=1e-12)
    True
    """
    if critic is None and "values" in signature(compute_advantages).parameters:
        raise ConfigurationError(
            "compute_advantages takes values and there is no critic: expected critic=, a function "
            "of question and prefix, such as lambda question, prefix: 0.0"
        )
    old = policy if old_policy is None else old_policy
    sampling = old if sampling_policy is None else sampling_policy
    off_policy = old is not policy or sampling is not policy
    if collapsed and (off_policy or ref_policy is not None or critic is not None):
        raise ConfigurationError(
            "collapsed=True with another old, sampling or reference policy or a critic: expected "
            "none of them, since the loss then depends on the tokens; use collapsed=False"
        )
    if tis_cap is not None and sampling_policy is None:
        raise ConfigurationError(
            f"tis_cap={tis_cap} without a sampling_policy: expected one, since the weights are 1 "
            "where the old policy samples"
        )
    trajectories = enumerate_trajectories(mdp, sampling)
    classes = collapse(trajectories) if collapsed else None
    drawn = classes.trajectories if classes else trajectories
    batches = enumerate_batches(mdp, drawn, group_size=group_size, questions=questions)
    by_token = token_rewards or critic is not None

    def estimator(drawn: Trajectories) -> _Estimator:
        with torch.no_grad():
            responses = _Responses(
                logprobs=drawn.logprobs(policy),
                old_logprobs=drawn.logprobs(old),
                sampling_logprobs=drawn.logprobs(sampling),
                ref_logprobs=None if ref_policy is None else drawn.logprobs(ref_policy),
                values=None if critic is None else drawn.values(critic),
                mask=drawn.mask,
                rewards=drawn.token_rewards if by_token else drawn.rewards,
            )
        return _Estimator(
            compute_advantages,
            policy_loss,
            responses,
            group_size,
            tis_cap,
            tis_level,
            advantage_kwargs or {},
            loss_kwargs or {},
        )

    main = estimator(drawn)
    _check_symmetry(main, estimator(classes.others) if classes else main, batches.rows)
    weights = torch.zeros_like(drawn.token_rewards)  # (L, K): E[∂L/∂logprobs]
    for rows, probs in zip(batches.rows.split(CHUNK), batches.probs.split(CHUNK), strict=True):
        gradients = probs[:, None, None] * _gradients(main, rows)
        weights.index_add_(0, rows.flatten(), gradients.flatten(0, 1))
    if classes:
        share = trajectories.probs / drawn.probs[classes.class_of]
        weights = weights[classes.class_of] * share[:, None]
    return -flat_gradient(trajectories.logprobs(policy), policy, weights)


class _Responses(NamedTuple):
    """What an estimator knows of each trajectory; (L, K), but outcome rewards (L,)."""

    logprobs: Tensor
    old_logprobs: Tensor
    sampling_logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    mask: Tensor
    rewards: Tensor


class _Estimator(NamedTuple):
    """The two functions of an algorithm file and their arguments."""

    compute_advantages: ComputeAdvantages
    policy_loss: PolicyLoss
    responses: _Responses
    group_size: int
    tis_cap: float | None
    tis_level: Level
    advantage_kwargs: Mapping[str, Any]
    loss_kwargs: Mapping[str, Any]

    def loss(self, logprobs: Tensor, rows: Tensor, tokens: Any) -> Tensor:
        """Return the loss of one batch.

        Args:
            logprobs: shape (N, K), those that are differentiated.
            rows: shape (N,), which trajectories.
            tokens: number of actions among them, an int or, under vmap, a scalar tensor.
        """
        all_rows = self.responses
        mask, old_logprobs = all_rows.mask[rows], all_rows.old_logprobs[rows]
        kwargs = dict(self.loss_kwargs)
        if all_rows.ref_logprobs is not None:
            kwargs["ref_logprobs"] = all_rows.ref_logprobs[rows]
        if all_rows.values is not None:
            advantages = self.compute_advantages(
                all_rows.rewards[rows], all_rows.values[rows], mask, **self.advantage_kwargs
            )[0]
        else:
            advantages = self.compute_advantages(
                all_rows.rewards[rows], self.group_size, **self.advantage_kwargs
            )
        if self.tis_cap is not None:
            advantages = reweight(
                advantages,
                old_logprobs,
                all_rows.sampling_logprobs[rows],
                self.tis_cap,
                level=self.tis_level,
                mask=mask,
            )
        totals = BatchTotals(len(rows), tokens, mask.shape[1])
        result = self.policy_loss(logprobs, old_logprobs, advantages, mask, totals, **kwargs)
        if not isinstance(result, tuple) or result[0].dim() > 0:
            raise ConfigurationError(
                f"policy_loss returned {type(result).__name__}: expected (loss, metrics), with the "
                "loss a scalar"
            )
        return result[0]


def _gradients(estimator: _Estimator, rows: Tensor) -> Tensor:
    """Return ∂L/∂logprobs of each batch, shape (M, N, K), for rows of shape (M, N)."""
    mask = estimator.responses.mask[rows]
    logprobs = estimator.responses.logprobs[rows]
    try:
        gradients = vmap(grad(estimator.loss))(logprobs, rows, mask.sum((1, 2)))
    except RuntimeError:  # what vmap cannot do; an error of the functions is raised again here
        gradients = _gradients_one_by_one(estimator, rows)
    if not gradients.isfinite().all():
        batch = rows[~gradients.isfinite().flatten(1).all(dim=1)][0]
        raise ConfigurationError(
            f"the gradient of the loss is not finite for a batch with the rewards "
            f"{estimator.responses.rewards[batch].tolist()}: expected finite numbers; is "
            "something divided by a standard deviation of 0?"
        )
    if gradients.masked_fill(mask, 0).any():
        raise ConfigurationError(
            "the loss depends on log-probs at padding: expected none where mask is False; "
            "multiply by the mask before summing"
        )
    return gradients


def _gradients_one_by_one(estimator: _Estimator, rows: Tensor) -> Tensor:
    """Return what ``_gradients`` does, for functions that vmap cannot run."""
    gradients = []
    for batch in rows:
        logprobs = estimator.responses.logprobs[batch].requires_grad_()
        loss = estimator.loss(logprobs, batch, int(estimator.responses.mask[batch].sum()))
        gradients.append(torch.zeros_like(logprobs))
        if loss.requires_grad:
            gradients[-1] += torch.autograd.grad(loss, logprobs, materialize_grads=True)[0]
    return torch.stack(gradients)


def _check_symmetry(estimator: _Estimator, other: _Estimator, rows: Tensor) -> None:
    """Refuse an estimator for which one order, or one member of a class, cannot stand for all.

    Args:
        estimator: over the trajectories of the enumeration.
        other: over other members of their classes.
        rows: shape (M, N), all batches.
    """
    generator = torch.Generator().manual_seed(0)
    places = torch.linspace(0, len(rows) - 1, min(len(rows), CHECKED_BATCHES)).long()
    groups = torch.arange(rows.shape[1]).reshape(-1, estimator.group_size)
    batches, orders = rows[places], []
    for _ in batches:
        order = groups[torch.randperm(len(groups), generator=generator)]
        orders.append(order[:, torch.randperm(estimator.group_size, generator=generator)].flatten())
    order = torch.stack(orders)  # (M, N)
    again = _gradients_one_by_one(other, batches.gather(1, order))
    given = _gradients(estimator, batches).take_along_dim(order[:, :, None], dim=1)
    if (given - again).abs().max() > SYMMETRY_TOLERANCE * given.abs().max():
        raise ConfigurationError(
            "the gradient changes with the order of the groups or of the responses in one, or "
            "under collapsed=True with their tokens: expected estimators that treat responses "
            "alike; pair responses by their rewards, not their places, or use collapsed=False"
        )
