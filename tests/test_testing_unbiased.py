from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

from lmrl_env.errors import ConfigurationError
from lmrl_env.exact import TabularPolicy, TokenMDP
from lmrl_env.testing import assert_unbiased, bias_report


def rewards_themselves(rewards, group_size):
    return rewards


def above_mean(rewards, group_size):
    groups = rewards.reshape(-1, group_size)
    return (groups - groups.mean(dim=1, keepdim=True)).reshape(-1)


def population_std(rewards, group_size):
    groups = rewards.reshape(-1, group_size)
    std = groups.std(dim=1, keepdim=True, correction=0)
    return (above_mean(rewards, group_size).reshape(-1, group_size) / (std + 1e-4)).reshape(-1)


def per_response(logprobs, old_logprobs, advantages, mask, totals):
    ratio = (logprobs - old_logprobs).exp()
    return -(ratio * advantages[:, None] * mask).sum() / totals.responses, {}


def per_token(logprobs, old_logprobs, advantages, mask, totals):
    loss, _ = per_response(logprobs, old_logprobs, advantages, mask, totals)
    return loss * totals.responses / totals.tokens, {}


def times(factor):
    def policy_loss(*args):
        return factor * per_response(*args)[0], {}

    return policy_loss


# Two questions of one token each: token 1 pays 2 and 1. The policy is uniform, so that
# ∂J/∂logits[q, 1] = ½ · pay · p(1-p): 1/4 and 1/8, and minus that for token 0.
TWO_COINS = TokenMDP(
    2, 1, lambda question, tokens, _: tokens[0] * (2.0 - question), question_probs=(0.5, 0.5)
)
COINS = {"mdp": TWO_COINS, "policy": TabularPolicy(TWO_COINS, scale=0), "group_size": 1}


def squared(rewards, group_size):
    return rewards**2


def test_a_report_says_angle_scale_and_the_worst_parameter():
    # Rewards squared count the first question double: E[g] is 1/2 and 1/8 against 1/4 and 1/8.
    # Scale (1/8 + 1/64) / (1/16 + 1/64) = 9/5, cosine 9/64 / √(17/64 · 5/64) = 9/√85; scaled ∇J
    # is 9/20 and 9/40: the first is off by 1/20, the second by 1/10.
    report = bias_report(squared, per_response, **COINS)
    assert report.exact.tolist() == pytest.approx([-1 / 4, 1 / 4, -1 / 8, 1 / 8])
    assert report.expected.tolist() == pytest.approx([-1 / 2, 1 / 2, -1 / 8, 1 / 8])
    assert report.scale == pytest.approx(9 / 5)
    assert report.cosine == pytest.approx(9 / math.sqrt(85))
    assert report.sine == pytest.approx(2 / math.sqrt(85))
    assert report.degrees == pytest.approx(math.degrees(math.acos(9 / math.sqrt(85))))
    assert report.relative_error == pytest.approx(2 / math.sqrt(5))  # (1/4) / √(5/64)
    assert report.worst.name == "logits"
    assert report.worst.index[0] == 1
    assert abs(report.worst.expected) == pytest.approx(9 / 40)
    assert abs(report.worst.got) == pytest.approx(1 / 8)
    for text in ("12.53°", "cos 0.976187", "scale            1.8 ", "logits[1, ", "got "):
        assert text in str(report)


def test_the_worst_parameter_is_against_the_gradient_itself_where_the_scale_is_asked_for():
    # Against ∇J the second question is right and the first is off by 1/4.
    worst = bias_report(squared, per_response, up_to_scale=False, **COINS).worst
    assert worst.index[0] == 0
    assert (abs(worst.expected), abs(worst.got)) == pytest.approx((1 / 4, 1 / 2))


def test_the_worst_parameter_is_named_behind_those_that_are_not_trained():
    class Shifted(TabularPolicy):
        def __init__(self, mdp):
            super().__init__(mdp, scale=0)
            self.logits.requires_grad_(False)
            self.shift = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            self.more = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))

        def forward(self, question, prefix):
            shifts = torch.cat([-self.shift, self.shift]) + self.more[question]
            return (self.logits[self.states[question, prefix]] + shifts).log_softmax(-1)

    policy = Shifted(TWO_COINS)
    report = bias_report(squared, per_response, **{**COINS, "policy": policy})
    # The shift moves both questions: 2 (1/4 + 1/8) and 2 (1/2 + 1/8).
    assert report.exact.tolist() == pytest.approx([3 / 4, -1 / 4, 1 / 4, -1 / 8, 1 / 8])
    assert report.expected.tolist() == pytest.approx([5 / 4, -1 / 2, 1 / 2, -1 / 8, 1 / 8])
    # Scale (60 + 16 + 2) / (36 + 8 + 2) = 39/23. The gaps |5/4 - 117/92| = 1/46, |1/2 - 39/92| =
    # 7/92 and |1/8 - 39/184| = 2/23, of which the last is the largest.
    assert report.scale == pytest.approx(39 / 23)
    assert report.worst.name == "more"
    assert report.worst.index[0] == 1
    assert abs(report.worst.expected - report.worst.got) == pytest.approx(2 / 23)


def test_questions_that_are_fixed_are_what_the_objective_is_over():
    # Question 1 alone: ∂J/∂logits[1, 1] = p(1-p) = 1/4; twice question 1, once 0: 1/6 and 1/6.
    report = bias_report(rewards_themselves, per_response, questions=(1,), **COINS)
    assert report.exact.tolist() == pytest.approx([0, 0, -1 / 4, 1 / 4])
    assert_unbiased(rewards_themselves, per_response, questions=(1,), up_to_scale=False, **COINS)
    report = bias_report(rewards_themselves, per_response, questions=(1, 0, 1), **COINS)
    assert report.exact.tolist() == pytest.approx([-1 / 6, 1 / 6, -1 / 6, 1 / 6])
    assert report.relative_error < 1e-12


@pytest.mark.parametrize("questions", [(), (0, 2), 0])
def test_questions_that_there_are_not_are_refused(questions):
    message = re.escape(f"questions={questions}: expected at least 1 each, or a list")
    with pytest.raises(ConfigurationError, match=message):
        bias_report(rewards_themselves, per_response, questions=questions, **COINS)


def test_an_unbiased_estimator_passes():
    assert_unbiased(rewards_themselves, per_response, up_to_scale=False)
    assert_unbiased(above_mean, per_response)


def test_the_scale_is_asked_for_only_on_demand():
    # The mean of three includes the response itself: scale 2/3.
    with pytest.raises(
        AssertionError, match=r"not the scale 1\n(.*\n)scale            0\.66666666"
    ):
        assert_unbiased(above_mean, per_response, up_to_scale=False)
    assert_unbiased(rewards_themselves, times(1e-6))
    assert_unbiased(rewards_themselves, times(1 + 1e-8))
    with pytest.raises(AssertionError, match="not the scale 1"):
        assert_unbiased(rewards_themselves, times(1 + 1e-8), up_to_scale=False)
    assert_unbiased(rewards_themselves, times(1 + 1e-8), up_to_scale=False, tolerance=1e-7)


@pytest.mark.parametrize(
    "estimator",
    [(above_mean, per_token), (population_std, per_response), (squared, per_response)],
)
def test_a_biased_estimator_fails_with_angle_scale_and_worst_parameter(estimator):
    message = (
        r"direction is biased\nangle to ∇J +[\d.]+° \(cos 0\.\d+\)\nscale +[\d.]+ .*\n.*\n"
        r"worst parameter  logits\[\d, \d\]: expected -?[\d.e-]+, got -?[\d.e-]+"
    )
    with pytest.raises(AssertionError, match=message):
        assert_unbiased(*estimator)


def test_the_opposite_direction_fails():
    with pytest.raises(AssertionError, match=r"180° \(cos -1\.0+\)\nscale +-1 "):
        assert_unbiased(rewards_themselves, times(-1))


def test_a_small_angle_fails():
    def a_little_squared(rewards, group_size):
        return rewards + 1e-7 * rewards**2

    with pytest.raises(AssertionError, match="direction is biased"):
        assert_unbiased(a_little_squared, per_response, **COINS)  # 1 - cosine is below 1e-14
    assert_unbiased(a_little_squared, per_response, tolerance=1e-6, **COINS)


def test_settings_of_the_enumeration_are_passed_on():
    # Off-policy the ratio of a token is that of the response where it has one token only.
    assert_unbiased(
        rewards_themselves, per_response, old_policy=TabularPolicy(TWO_COINS, seed=1), **COINS
    )
    longer = TokenMDP(2, 2, lambda _, tokens, __: float(sum(tokens)))
    assert_unbiased(rewards_themselves, per_response, mdp=longer)
    with pytest.raises(AssertionError, match="direction is biased"):
        assert_unbiased(
            rewards_themselves, per_response, mdp=longer, old_policy=TabularPolicy(longer, seed=1)
        )


def test_a_gradient_of_zero_is_an_error_and_no_pass():
    constant = TokenMDP(2, 1, lambda *_: 1.0)
    with pytest.raises(ConfigurationError, match=re.escape("expected a policy that can gain")):
        assert_unbiased(rewards_themselves, per_response, mdp=constant)

    def detached(logprobs, *args):
        return per_response(logprobs.detach(), *args)

    for estimator in [(rewards_themselves, times(0.0)), (rewards_themselves, detached)]:
        with pytest.raises(ConfigurationError, match=re.escape("expected an estimator that moves")):
            assert_unbiased(*estimator)
    with pytest.raises(ConfigurationError, match=re.escape("differ in a group of 1?")):
        assert_unbiased(above_mean, per_response, group_size=1)


def test_the_example_proves_one_estimator_and_refutes_another(capsys):
    path = Path(__file__).parents[1] / "examples" / "prove_your_estimator.py"
    spec = importlib.util.spec_from_file_location("prove_your_estimator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    proved, refuted = capsys.readouterr().out.split("Divided")
    assert "cos 1.000000000" in proved
    assert "cos 0.999" in refuted
