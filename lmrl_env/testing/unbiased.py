"""Is an estimator of the policy gradient unbiased? Decided by enumeration, not by sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from lmrl_env.errors import ConfigurationError
from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    TrainablePolicy,
    exact_gradient,
    expected_gradient,
)
from lmrl_env.exact.expectation import ComputeAdvantages, PolicyLoss

ZERO = 1e-12
"""Gradients below this, relative to rewards or to ∇J, are zero but for rounding errors."""


@dataclass(frozen=True)
class ParameterGap:
    """A parameter whose gradient is not what it should be.

    Attributes:
        name: of the tensor in the policy.
        index: of the element in the tensor.
        expected: what unbiasedness asks for.
        got: the expectation of the estimator.
    """

    name: str
    index: tuple[int, ...]
    expected: float
    got: float

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return f"{self.name}[{place}]: expected {self.expected:.6g}, got {self.got:.6g}"


class BiasReport(NamedTuple):
    """How the expectation of an estimator's gradient, E[g], stands to ∇J.

    Attributes:
        cosine: of the angle between them; 1 if the direction is unbiased.
        sine: of that angle, ‖E[g] - scale·∇J‖ / ‖E[g]‖, which shows small angles better.
        scale: E[g]·∇J / ‖∇J‖²; 1 if the size is unbiased too.
        relative_error: ‖E[g] - ∇J‖ / ‖∇J‖.
        worst: the parameter in which E[g] is farthest from |scale|·∇J, or from ∇J itself where
            the scale is asked for.
        expected: E[g], shape (P,), float64.
        exact: ∇J, shape (P,), float64.
    """

    cosine: float
    sine: float
    scale: float
    relative_error: float
    worst: ParameterGap
    expected: Tensor
    exact: Tensor

    @property
    def degrees(self) -> float:
        """Angle between E[g] and ∇J, from 0 to 180."""
        return math.degrees(math.atan2(self.sine, self.cosine))

    def __str__(self) -> str:
        return (
            f"angle to ∇J      {self.degrees:.4g}° (cos {self.cosine:.9f})\n"
            f"scale            {self.scale:.9g} (E[g]·∇J / ‖∇J‖²)\n"
            f"relative error   {self.relative_error:.3g} (‖E[g] - ∇J‖ / ‖∇J‖)\n"
            f"worst parameter  {self.worst}"
        )


def bias_report(
    compute_advantages: ComputeAdvantages,
    policy_loss: PolicyLoss,
    *,
    mdp: TokenMDP | None = None,
    policy: TrainablePolicy | None = None,
    group_size: int = 3,
    questions: int | Sequence[int] = 2,
    up_to_scale: bool = True,
    **settings: Any,
) -> BiasReport:
    """Compare the exact expectation of an estimator's gradient with ∇J.

    Args:
        compute_advantages: ``(rewards, group_size) -> advantages``, as in the files of ``algos/``.
        policy_loss: ``(logprobs, old_logprobs, advantages, mask, totals) -> (loss, metrics)``.
        mdp: to enumerate; by default one of two questions of different pass rates, with real-valued
            rewards, EOS and responses of one or two tokens.
        policy: that is trained, an ``nn.Module`` or alike; by default a random tabular one.
        group_size: G, responses to a question.
        questions: B, how many are drawn independently for a batch; or which, if they are fixed, and
            then J is the mean over these.
        up_to_scale: finds the worst parameter against |scale|·∇J, not against ∇J.
        settings: the other keywords of ``lmrl_env.exact.expected_gradient``: off-policy sampling, a
            reference policy, a critic, keywords of the two functions.

    Raises:
        ConfigurationError: if one of the gradients is zero, which has no direction; or as
            ``expected_gradient``.

    >>> def mean_of_response(logprobs, old_logprobs, advantages, mask, totals):
    ...     means = (advantages[:, None] * logprobs * mask).sum(1) / mask.sum(1)
    ...     return -means.sum() / totals.responses, {}
    >>> print(bias_report(lambda rewards, group_size: rewards, mean_of_response))
    angle to ∇J      16.54° (cos 0.958629820)
    scale            0.556865048 (E[g]·∇J / ‖∇J‖²)
    relative error   0.473 (‖E[g] - ∇J‖ / ‖∇J‖)
    worst parameter  logits[0, 2]: expected 0.000755661, got 0.0128396
    """
    mdp = _example_mdp() if mdp is None else mdp
    asked = [] if isinstance(questions, int) else list(questions)
    known = range(len(mdp.question_probs))
    if asked and set(asked) <= set(known):
        mdp = replace(mdp, question_probs=tuple(asked.count(q) / len(asked) for q in known))
    policy = TabularPolicy(mdp) if policy is None else policy
    exact = exact_gradient(mdp, policy)
    if not exact.norm() > ZERO:
        raise ConfigurationError(
            f"‖∇J‖ = {exact.norm():.3g}: expected a policy that can gain something; let rewards "
            "differ between responses that it gives"
        )
    expected = expected_gradient(
        compute_advantages,
        policy_loss,
        mdp,
        policy,
        group_size=group_size,
        questions=questions,
        **settings,
    )
    if not expected.norm() > ZERO * exact.norm():
        raise ConfigurationError(
            f"‖E[g]‖ = {expected.norm():.3g}, while ‖∇J‖ = {exact.norm():.3g}: expected an "
            "estimator that moves the policy; does the loss depend on logprobs, and do "
            f"advantages differ in a group of {group_size}?"
        )
    scale = (expected @ exact / (exact @ exact)).item()
    return BiasReport(
        cosine=(expected @ exact / (expected.norm() * exact.norm())).item(),
        sine=((expected - scale * exact).norm() / expected.norm()).item(),
        scale=scale,
        relative_error=((expected - exact).norm() / exact.norm()).item(),
        worst=_worst(policy, expected, abs(scale) * exact if up_to_scale else exact),
        expected=expected,
        exact=exact,
    )


def assert_unbiased(
    compute_advantages: ComputeAdvantages,
    policy_loss: PolicyLoss,
    *,
    up_to_scale: bool = True,
    tolerance: float = 1e-9,
    **settings: Any,
) -> None:
    """Fail unless the expectation of an estimator's gradient is ∇J, or a positive multiple of it.

    Args:
        compute_advantages: as in ``bias_report``.
        policy_loss: as in ``bias_report``.
        up_to_scale: accepts any positive multiple, which a learning rate makes good.
        tolerance: of the sine of the angle to ∇J, and of the scale's distance from 1.
        settings: the other keywords of ``bias_report``.

    Raises:
        AssertionError: if it is not, with angle, scale and the worst parameter.
        ConfigurationError: as ``bias_report``.

    >>> def reinforce(logprobs, old_logprobs, advantages, mask, totals):
    ...     return -(advantages[:, None] * logprobs * mask).sum() / totals.responses, {}
    >>> assert_unbiased(lambda rewards, group_size: rewards, reinforce, up_to_scale=False)
    """
    report = bias_report(compute_advantages, policy_loss, up_to_scale=up_to_scale, **settings)
    if not (report.scale > 0 and report.sine <= tolerance):
        raise AssertionError(f"the estimator's direction is biased\n{report}")
    if not (up_to_scale or abs(report.scale - 1) <= tolerance):
        raise AssertionError(
            f"the estimator has the right direction, but not the scale 1\n{report}"
        )


def _worst(policy: TrainablePolicy, got: Tensor, expected: Tensor) -> ParameterGap:
    """Return the element of a flat gradient that is farthest from the expected one."""
    elements = [
        (name, index)
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
        for index in itertools.product(*map(range, parameter.shape))
    ]
    place = int((got - expected).abs().argmax())
    return ParameterGap(*elements[place], expected[place].item(), got[place].item())


def _example_mdp() -> TokenMDP:
    """Return two questions, the second of which is harder: tokens 0 and 1, and 2 for EOS."""

    def reward(question: int, tokens: tuple[int, ...], terminated: bool) -> float:
        is_right = tokens == (1, 2) if question else tokens[0] == 0
        return is_right + 0.25 * terminated

    return TokenMDP(3, 2, reward, eos=2, question_probs=(0.5, 0.5))
