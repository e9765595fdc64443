"""What a penalty on the divergence from a reference policy does to the policy, by enumeration."""

from __future__ import annotations

import pytest
import torch
from algos_files import ALGORITHMS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_mdps import assert_close, cosine, gradient, worlds, zero_one

from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    enumerate_trajectories,
    exact_gradient,
    expected_gradient,
    flat_gradient,
)
from lmrl_env.kl import k1, k2, k3

seeds = st.integers(0, 99)
small_worlds = worlds(scales=(0.0, 1.0))
CASE = TokenMDP(3, 3, zero_one(1), eos=2)


def reference(mdp, seed):
    return TabularPolicy(mdp, seed + 1000)


def weighted(mdp, policy, other):
    """log π and log π_ref of whole responses, with gradient, and the questions' probabilities."""
    trajectories = enumerate_trajectories(mdp, policy)
    asked = torch.tensor(mdp.question_probs, dtype=torch.float64)[trajectories.questions]
    return trajectories.logprobs(policy).sum(1), trajectories.logprobs(other).sum(1), asked


def kl_gradient(mdp, policy, other):
    """∇KL(π‖π_ref) of whole responses, by autograd."""
    log_p, log_r, asked = weighted(mdp, policy, other)
    return flat_gradient((asked * log_p.exp() * (log_p - log_r)).sum(), policy)


def reverse_kl_gradient(mdp, policy, other):
    """∇KL(π_ref‖π)."""
    log_p, log_r, asked = weighted(mdp, policy, other)
    return flat_gradient((asked * log_r.exp() * (log_r - log_p)).sum(), policy)


def kl_of_states(mdp, policy, other, reverse):
    """Σ_s d(s) ∇KL of the next token in s, the distribution of states held fixed."""
    trajectories = enumerate_trajectories(mdp, policy)
    reach, total = {}, 0.0
    asked = torch.tensor(mdp.question_probs, dtype=torch.float64)
    for row, n in enumerate(trajectories.lengths.tolist()):
        weight = (asked[trajectories.questions[row]] * trajectories.probs[row]).item()
        for state in trajectories.visited[row, :n].tolist():
            reach[state] = reach.get(state, 0.0) + weight
    for state, weight in reach.items():
        log_p, log_r = (p(*trajectories.states[state]) for p in (policy, other))
        first, second = (log_r, log_p) if reverse else (log_p, log_r)
        total = total + weight * (first.exp() * (first - second)).sum()
    return flat_gradient(total, policy)


def of_response(estimator):
    def policy_loss(logprobs, old_logprobs, advantages, mask, totals, *, ref_logprobs):
        log_ratio = ((logprobs - ref_logprobs) * mask).sum(1)
        return estimator(log_ratio).sum() / totals.responses, {}

    return policy_loss


def of_tokens(estimator):
    def policy_loss(logprobs, old_logprobs, advantages, mask, totals, *, ref_logprobs):
        return (estimator(logprobs - ref_logprobs) * mask).sum() / totals.responses, {}

    return policy_loss


def penalty(policy_loss, mdp, policy, other):
    """E∇ of a term in the loss."""
    return -expected_gradient(
        lambda rewards, _: rewards, policy_loss, mdp, policy, group_size=1, ref_policy=other
    )


@settings(max_examples=25)
@given(small_worlds, seeds)
def test_k1_in_the_loss_penalises_nothing(world, seed):
    other = reference(world[0], seed)
    for form in (of_response, of_tokens):
        assert penalty(form(k1), *world, other).abs().max() < 1e-12


@settings(max_examples=25)
@given(small_worlds, seeds)
def test_k2_of_the_response_in_the_loss_lowers_the_divergence_from_the_reference(world, seed):
    other = reference(world[0], seed)
    assert_close(penalty(of_response(k2), *world, other), kl_gradient(*world, other))


@settings(max_examples=25)
@given(small_worlds, seeds)
def test_k3_of_the_response_in_the_loss_lowers_the_divergence_of_the_reference(world, seed):
    other = reference(world[0], seed)
    assert_close(penalty(of_response(k3), *world, other), reverse_kl_gradient(*world, other))


@settings(max_examples=25)
@given(small_worlds, seeds)
def test_summed_over_tokens_k2_and_k3_lower_those_of_each_state_where_it_is(world, seed):
    other = reference(world[0], seed)
    k2_tokens, k3_tokens = (penalty(of_tokens(k), *world, other) for k in (k2, k3))
    assert_close(k2_tokens, kl_of_states(*world, other, reverse=False))
    assert_close(k3_tokens, kl_of_states(*world, other, reverse=True))


def test_summed_over_tokens_k2_and_k3_have_the_gradient_of_neither_divergence():
    policy, other = TabularPolicy(CASE, 0), reference(CASE, 0)
    targets = [kl_gradient(CASE, policy, other), reverse_kl_gradient(CASE, policy, other)]
    for estimator in (k2, k3):
        got = penalty(of_tokens(estimator), CASE, policy, other)
        assert all(cosine(got, target) < 0.96 for target in targets)
    assert cosine(*targets) < 0.96


@settings(max_examples=25)
@given(worlds(horizon=(1, 1), scales=(0.0, 1.0)), seeds)
def test_for_responses_of_one_token_the_two_forms_are_the_same(world, seed):
    other = reference(world[0], seed)
    assert_close(penalty(of_tokens(k2), *world, other), kl_gradient(*world, other))
    assert_close(penalty(of_tokens(k3), *world, other), reverse_kl_gradient(*world, other))


# As the files have it.


def penalized(name, mdp, policy, other, kl_coef):
    """The MDP whose rewards an algorithm file has penalised."""

    def logprobs(source, question, tokens):
        with torch.no_grad():
            steps = [source(question, tokens[:t])[token] for t, token in enumerate(tokens)]
            return torch.stack(steps)[None]

    def reward(question, tokens, terminated):
        ours, theirs = (logprobs(source, question, tokens) for source in (policy, other))
        outcome = mdp.reward(question, tokens, terminated)
        rewards = torch.zeros_like(ours)
        rewards[0, -1] = outcome
        if name == "rloo":
            rewards = rewards.sum(1)
        mask = torch.ones_like(ours).bool()
        result = ALGORITHMS[name].penalize(rewards, ours, theirs, mask, kl_coef)[0]
        return result.tolist()

    return TokenMDP(mdp.vocab_size, mdp.horizon, reward, mdp.eos, mdp.question_probs)


def penalised_gradient(mdp, policy, other, kl_coef):
    """∇(J - β KL(π‖π_ref))."""
    return exact_gradient(mdp, policy) - kl_coef * kl_gradient(mdp, policy, other)


@settings(max_examples=20)
@given(small_worlds, seeds, st.integers(2, 3))
def test_k1_in_the_reward_of_rloo_lowers_the_divergence_from_the_reference(world, seed, group_size):
    mdp, policy = world
    other = reference(mdp, seed)
    got = gradient(
        "rloo",
        penalized("rloo", *world, other, 0.3),
        policy,
        group_size=group_size,
        collapsed=False,
    )
    assert_close(got, penalised_gradient(*world, other, 0.3))


def rewards_to_go(rewards, group_size):
    return rewards.flip(1).cumsum(1).flip(1)


@settings(max_examples=20)
@given(small_worlds, seeds)
def test_k1_in_the_token_rewards_of_reinforce_pp_does_the_same(world, seed):
    # Without its standardisation, which has a bias of its own where rewards are not 0 and 1.
    mdp, policy = world
    other = reference(mdp, seed)
    got = gradient(
        "reinforce_pp", penalized("reinforce_pp", *world, other, 0.3), policy,
        group_size=1, compute_advantages=rewards_to_go, token_rewards=True,
    )  # fmt: skip
    assert_close(got * mdp.horizon, penalised_gradient(*world, other, 0.3))


@settings(max_examples=20)
@given(small_worlds, seeds)
def test_the_term_of_grpo_is_the_k3_of_tokens_averaged_over_each_response(world, seed):
    mdp, policy = world
    other, kl_coef = reference(mdp, seed), 0.3
    nothing_to_gain = TokenMDP(
        mdp.vocab_size, mdp.horizon, lambda *_: 1.0, mdp.eos, mdp.question_probs
    )
    got = -gradient(
        "grpo", nothing_to_gain, policy,
        group_size=2, ref_policy=other, loss_kwargs={"kl_coef": kl_coef},
    )  # fmt: skip

    def mean_of_response(logprobs, old_logprobs, advantages, mask, totals, *, ref_logprobs):
        ratio = (ref_logprobs - logprobs).exp()
        means = ((ratio - 1 - ratio.log()) * mask).sum(1) / mask.sum(1)
        return means.sum() / totals.responses, {}

    expected = kl_coef * penalty(mean_of_response, *world, other)
    assert_close(got, expected)
    if mdp.eos is None:  # then all lengths are K
        assert_close(got, kl_coef / mdp.horizon * kl_of_states(*world, other, reverse=True))


def test_the_term_of_grpo_has_the_gradient_of_neither_divergence():
    policy, other = TabularPolicy(CASE, 0), reference(CASE, 0)
    nothing_to_gain = TokenMDP(3, 3, lambda *_: 1.0, eos=2)
    settings = {"group_size": 2, "ref_policy": other, "loss_kwargs": {"kl_coef": 1.0}}
    got = -gradient("grpo", nothing_to_gain, policy, **settings)
    assert cosine(got, kl_gradient(CASE, policy, other)) < 0.96
    assert cosine(got, reverse_kl_gradient(CASE, policy, other)) < 0.96


# Mistakes.


@pytest.mark.parametrize("right", [kl_gradient, reverse_kl_gradient])
def test_k3_of_the_log_ratio_the_other_way_round_lowers_neither(right):
    # exp(x) - 1 - x is its value under samples of the reference, not of the policy.
    policy, other = TabularPolicy(CASE, 0), reference(CASE, 0)
    swapped = penalty(of_response(lambda x: k3(-x)), CASE, policy, other)
    assert cosine(swapped, right(CASE, policy, other)) < 0.96


def test_k1_of_tokens_in_the_reward_without_what_is_to_come_misses_the_divergence():
    policy, other = TabularPolicy(CASE, 0), reference(CASE, 0)
    nothing_to_gain = TokenMDP(3, 3, lambda *_: 0.0, eos=2)
    mdp = penalized("reinforce_pp", nothing_to_gain, policy, other, 1.0)
    settings = {"group_size": 1, "token_rewards": True}
    exact = -kl_gradient(CASE, policy, other)
    for advantages, is_right in ((rewards_to_go, True), (lambda rewards, _: rewards, False)):
        got = gradient("reinforce_pp", mdp, policy, compute_advantages=advantages, **settings)
        assert (cosine(got, exact) > 0.999999) == is_right
