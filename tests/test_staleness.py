"""Gradients on samples of an earlier policy: mean and variance of every correction."""

from __future__ import annotations

import math

import pytest
import torch
from algos_files import ALGORITHMS, each
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_mdps import assert_close, can_learn, gradient, real_valued, sine, worlds, zero_one
from test_off_policy_bias import is_small, near, seeds, unclipped

from lmrl_env.errors import ConfigurationError
from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    enumerate_batches,
    enumerate_trajectories,
    exact_gradient,
    flat_gradient,
    leave_one_out_moments,
)
from lmrl_env.importance import truncated_importance_weights
from lmrl_env.types import BatchTotals

LEVELS = ("token", "sequence")
LONG = TokenMDP(3, 3, zero_one(1), eos=2)
distances = st.sampled_from((0.1, 0.5, 1.0))
corrections = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {
            "tis_cap": st.sampled_from((0.5, 1.0, 2.0, math.inf)),
            "tis_level": st.sampled_from(LEVELS),
        }
    ),
)


def largest_ratio(mdp, policy, stale):
    responses = enumerate_trajectories(mdp, stale)
    gap = (responses.logprobs(policy) - responses.logprobs(stale)).sum(1)
    return gap.exp().max().item()


@each("rloo", "dr_grpo", "ppo")
@settings(max_examples=15)
@given(worlds(), seeds, distances)
def test_weights_of_the_sequence_without_a_cap_give_the_gradient_itself(
    name, world, seed, distance
):
    assume(can_learn(*world) and is_small(world))
    stale = near(*world, seed, distance)
    weighted = {"sampling_policy": stale, "tis_level": "sequence"}
    exact = exact_gradient(*world)
    assert_close(unclipped(name, *world, tis_cap=math.inf, **weighted), exact)
    enough = largest_ratio(*world, stale) * (1 + 1e-9)
    assert_close(unclipped(name, *world, tis_cap=enough, **weighted), exact)


@each("rloo", "dr_grpo", "ppo")
def test_a_cap_on_the_sequence_that_binds_biases(name):
    policy = TabularPolicy(LONG)
    stale = near(LONG, policy, 0, 0.3)
    cap = 0.9 * largest_ratio(LONG, policy, stale)
    weighted = {"sampling_policy": stale, "tis_cap": cap, "tis_level": "sequence"}
    assert sine(unclipped(name, LONG, policy, **weighted), exact_gradient(LONG, policy)) > 1e-4


@settings(max_examples=15)
@given(worlds(horizon=(1, 1)), seeds, distances, st.sampled_from((0.5, 1.0, 2.0)))
def test_for_responses_of_one_token_the_levels_are_the_same(world, seed, distance, cap):
    assume(can_learn(*world))
    by_token, by_sequence = (
        gradient("rloo", *world, group_size=3, sampling_policy=near(*world, seed, distance),
                 tis_cap=cap, tis_level=level)
        for level in LEVELS
    )  # fmt: skip
    assert torch.equal(by_token, by_sequence)


@settings(max_examples=30)
@given(worlds(), seeds, distances, corrections, st.integers(2, 3))
def test_the_mean_is_the_expected_gradient_of_the_file(
    world, seed, distance, correction, group_size
):
    assume(can_learn(*world) and (group_size == 2 or is_small(world)))
    settings = {"sampling_policy": near(*world, seed, distance), **correction}
    moments = leave_one_out_moments(*world, group_size=group_size, **settings)
    expected = gradient("rloo", *world, group_size=group_size, **settings)
    torch.testing.assert_close(moments.mean, expected, rtol=1e-9, atol=1e-12)


def group_gradients(mdp, policy, stale, group_size, tis_cap=None, tis_level="token"):
    """Gradient of rloo.py for every group that can be drawn, one by one, and its probability."""
    responses = enumerate_trajectories(mdp, stale)
    groups = enumerate_batches(mdp, responses, group_size=group_size)
    algorithm, gradients = ALGORITHMS["rloo"], []
    for rows in groups.rows:
        mask, logprobs = responses.mask[rows], responses.logprobs(policy)[rows]
        advantages = algorithm.compute_advantages(responses.rewards[rows], group_size)
        if tis_cap is not None:
            sampled = responses.logprobs(stale)[rows]
            weights = truncated_importance_weights(
                logprobs, sampled, tis_cap, level=tis_level, mask=mask
            )
            advantages = advantages[:, None] * weights
        totals = BatchTotals(group_size, int(mask.sum()), mdp.horizon)
        loss, _ = algorithm.policy_loss(logprobs, logprobs.detach(), advantages, mask, totals)
        gradients.append(-flat_gradient(loss, policy))
    return torch.stack(gradients), groups.probs


@pytest.mark.parametrize("group_size", [2, 3])
@settings(max_examples=8)
@given(worlds(horizon=(1, 2)), seeds, distances, corrections)
def test_the_variance_is_that_over_all_groups(group_size, world, seed, distance, correction):
    assume(can_learn(*world) and (group_size == 2 or world[0].vocab_size == 2))
    stale = near(*world, seed, distance)
    moments = leave_one_out_moments(
        *world, group_size=group_size, sampling_policy=stale, **correction
    )
    gradients, probs = group_gradients(*world, stale, group_size, **correction)
    mean = probs @ gradients
    variance = (probs @ (gradients - mean).square().sum(1)).item()
    torch.testing.assert_close(moments.mean, mean, rtol=1e-9, atol=1e-12)
    assert moments.variance == pytest.approx(variance, rel=1e-9, abs=1e-12)
    exact = exact_gradient(*world)
    error = (probs @ (gradients - exact).square().sum(1)).item()
    assert moments.squared_error(exact, groups=1) == pytest.approx(error, rel=1e-9, abs=1e-12)


def test_the_variance_of_a_group_of_two_coins_is_as_by_hand():
    # Rewards 0 and 1; the groups 01 and 10, each of probability p(1-p), pay (R₁-R₂)/2 · (s₁-s₂)
    # = ±(1, -1)/2 with the sign that makes it (-1/2, 1/2), where p = 1/4; the others pay 0.
    coin = TokenMDP(2, 1, lambda question, tokens, terminated: tokens[0])
    policy = TabularPolicy(coin, scale=0)
    policy.logits.data[0, 1] = math.log(1 / 3)
    moments = leave_one_out_moments(coin, policy, group_size=2)
    share = 2 * 3 / 16
    assert moments.mean.tolist() == pytest.approx([-share / 2, share / 2])
    assert moments.variance == pytest.approx((share - share**2) / 2)
    assert moments.squared_error(moments.mean, groups=4) == pytest.approx(moments.variance / 4)


def test_on_policy_all_corrections_are_the_same():
    mdp = TokenMDP(3, 2, real_valued(3), eos=2)
    policy = TabularPolicy(mdp)
    plain = leave_one_out_moments(mdp, policy, group_size=4)
    for level in LEVELS:
        weighted = leave_one_out_moments(mdp, policy, group_size=4, tis_cap=1.0, tis_level=level)
        assert torch.equal(weighted.mean, plain.mean) and weighted.variance == plain.variance


def test_a_group_of_one_is_refused():
    with pytest.raises(ConfigurationError, match="group_size=1"):
        leave_one_out_moments(LONG, TabularPolicy(LONG), group_size=1)
