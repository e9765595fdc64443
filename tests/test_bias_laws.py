"""The expected gradient of each algorithm file on-policy, against ∇J, by enumeration."""

from __future__ import annotations

import pytest
from algos_files import ALGORITHMS, each
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_mdps import (
    assert_close,
    assert_same_direction,
    can_learn,
    cosine,
    gradient,
    random_critic,
    real_valued,
    sine,
    worlds,
    zero_one,
)

from lmrl_env.exact import TabularPolicy, TokenMDP, exact_gradient, state_values

group_sizes = st.integers(2, 4)
seeds = st.integers(0, 99)

LENGTHS_DIFFER = TokenMDP(3, 3, zero_one(1), eos=2)


# Unbiased.


@settings(max_examples=40)
@given(worlds(), group_sizes)
def test_reinforce_and_rloo_are_unbiased_in_direction_and_scale(world, group_size):
    assume(can_learn(*world))
    exact = exact_gradient(*world)
    assert_close(gradient("rloo", *world, group_size=group_size), exact)
    reinforce = gradient(
        "rloo", *world, group_size=1, compute_advantages=lambda rewards, _: rewards
    )
    assert_close(reinforce, exact)


@settings(max_examples=40)
@given(worlds(), group_sizes)
def test_dr_grpo_has_the_direction_and_a_known_scale(world, group_size):
    assume(can_learn(*world))
    scale = (group_size - 1) / (group_size * world[0].horizon)
    assert_close(gradient("dr_grpo", *world, group_size=group_size), scale * exact_gradient(*world))


@settings(max_examples=10)
@given(worlds(horizon=(1, 2)), st.sampled_from([(0, 1), (0, 0)]))
def test_several_questions_a_batch_change_neither(world, asked):
    mdp, policy = world
    assume(can_learn(*world))
    asked = [min(q, len(mdp.question_probs) - 1) for q in asked]
    fixed = TokenMDP(
        mdp.vocab_size, mdp.horizon, mdp.reward, mdp.eos,
        tuple(asked.count(q) / 2 for q in range(len(mdp.question_probs))),
    )  # fmt: skip
    assume(exact_gradient(fixed, policy).norm() > 1e-6)
    for questions, exact in ((2, exact_gradient(*world)), (asked, exact_gradient(fixed, policy))):
        assert_close(gradient("rloo", *world, group_size=2, questions=questions), exact)
        got = gradient("dr_grpo", *world, group_size=2, questions=questions)
        assert_close(got, exact / (2 * mdp.horizon))


def ppo_gradient(world, critic, gae_lambda, **kwargs):
    advantage_kwargs = {"gae_lambda": gae_lambda}
    return gradient(
        "ppo", *world, group_size=1, critic=critic, advantage_kwargs=advantage_kwargs, **kwargs
    )


@settings(max_examples=40)
@given(worlds(), seeds)
def test_ppo_at_lambda_one_is_unbiased_whatever_the_critic_says(world, seed):
    assume(can_learn(*world))
    expected = exact_gradient(*world) / world[0].horizon
    assert_close(ppo_gradient(world, random_critic(seed), 1.0), expected)
    batch_of_two = gradient("ppo", *world, group_size=2, critic=random_critic(seed))
    assert_close(batch_of_two, expected)


@settings(max_examples=40)
@given(worlds(), st.floats(0, 1))
def test_ppo_at_any_lambda_is_unbiased_if_the_critic_is_exact(world, gae_lambda):
    assume(can_learn(*world))
    values = state_values(*world)
    got = ppo_gradient(world, lambda *state: values[state], gae_lambda)
    assert_close(got, exact_gradient(*world) / world[0].horizon)


@settings(max_examples=40)
@given(worlds(horizon=(2, 3)), seeds, st.floats(0, 0.9))
def test_ppo_below_lambda_one_is_biased_by_a_critic_that_is_not(world, seed, gae_lambda):
    assume(can_learn(*world))
    got = ppo_gradient(world, random_critic(seed), gae_lambda)
    assert sine(got, exact_gradient(*world)) > 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_bootstrapping_at_the_budget_turns_the_gradient(seed):
    # The value behind the last token of a truncated response is paid as if it were a reward.
    mdp, critic = LENGTHS_DIFFER, random_critic(seed)

    def bootstrapped(question, tokens, terminated):
        behind = 0 if terminated else critic(question, tokens)
        return mdp.reward(question, tokens, terminated) + behind

    wrong = TokenMDP(mdp.vocab_size, mdp.horizon, bootstrapped, mdp.eos)
    policy = TabularPolicy(mdp, seed)
    exact = exact_gradient(mdp, policy)
    assert_same_direction(ppo_gradient((mdp, policy), critic, 1.0), exact)
    assert cosine(ppo_gradient((wrong, policy), critic, 1.0), exact) < 0.99


# On-policy these are the same.


@settings(max_examples=40)
@given(worlds(), group_sizes)
def test_gspo_moves_the_policy_as_grpo_does(world, group_size):
    assume(can_learn(*world))
    grpo = gradient("grpo", *world, group_size=group_size)
    assert_close(gradient("gspo", *world, group_size=group_size), grpo)


@settings(max_examples=40)
@given(worlds(), group_sizes)
def test_cispo_and_with_one_group_a_batch_lite_ppo_move_it_as_dapo_does(world, group_size):
    assume(can_learn(*world))
    dapo = gradient("dapo", *world, group_size=group_size)
    assert_close(gradient("cispo", *world, group_size=group_size), dapo)
    assert_close(gradient("lite_ppo", *world, group_size=group_size), dapo)


def test_with_two_groups_a_batch_lite_ppo_is_not_dapo_even_for_one_question():
    mdp = TokenMDP(3, 2, real_valued(1), eos=2)
    arguments = {"mdp": mdp, "policy": TabularPolicy(mdp), "group_size": 2, "questions": 2}
    assert sine(gradient("lite_ppo", **arguments), gradient("dapo", **arguments)) > 1e-4


# Mistakes, each of which a law above would not let pass.


def over(divisor):
    """The loss of rloo.py, by response, over something."""

    def policy_loss(logprobs, old_logprobs, advantages, mask, totals):
        ratio = (logprobs - old_logprobs).exp()
        terms = ratio * advantages.reshape(len(mask), -1) * mask / divisor(mask)
        return -terms.sum() / totals.responses, {}

    return policy_loss


def own_length(mask):
    return mask.sum(1, keepdim=True)


def longest_of_the_batch(mask):
    return mask.any(0).sum()


@pytest.mark.parametrize("divisor", [own_length, longest_of_the_batch])
@each("rloo", "dr_grpo", "reinforce_pp")
def test_dividing_by_what_the_policy_chooses_turns_the_gradient(name, divisor):
    policy = TabularPolicy(LENGTHS_DIFFER)
    exact = exact_gradient(LENGTHS_DIFFER, policy)
    arguments = (name, LENGTHS_DIFFER, policy)
    got = gradient(*arguments, group_size=2, policy_loss=over(divisor))
    assert cosine(got, exact) < 0.999
    constant = over(lambda mask: mask.shape[1])
    assert_same_direction(gradient(*arguments, group_size=2, policy_loss=constant), exact)


def test_a_baseline_that_holds_the_response_itself_misses_the_scale():
    policy = TabularPolicy(LENGTHS_DIFFER)
    exact = exact_gradient(LENGTHS_DIFFER, policy)
    with_own = ALGORITHMS["dr_grpo"].compute_advantages
    got = gradient("rloo", LENGTHS_DIFFER, policy, group_size=4, compute_advantages=with_own)
    assert_close(got, 3 / 4 * exact)


def cispo_without_stop_gradient(logprobs, old_logprobs, advantages, mask, totals):
    ratio = (logprobs - old_logprobs).exp().clamp(0, 1.2)
    return -(ratio * advantages[:, None] * logprobs * mask).sum() / totals.tokens, {}


def gspo_without_stop_gradient(logprobs, old_logprobs, advantages, mask, totals):
    lengths = mask.sum(1, keepdim=True)
    sequence = (((logprobs - old_logprobs) * mask).sum(1, keepdim=True) / lengths).exp()
    ratio = sequence * (logprobs - logprobs.detach()).exp()
    return -(ratio * advantages[:, None] * mask / lengths).sum() / totals.responses, {}


def test_without_their_stop_gradients_cispo_is_not_dapo_and_gspo_not_grpo():
    arguments = {"mdp": LENGTHS_DIFFER, "policy": TabularPolicy(LENGTHS_DIFFER), "group_size": 3}
    got = gradient("cispo", policy_loss=cispo_without_stop_gradient, collapsed=False, **arguments)
    assert sine(got, gradient("dapo", **arguments)) > 0.01
    got = gradient("gspo", policy_loss=gspo_without_stop_gradient, **arguments)
    assert_close(got, 2 * gradient("grpo", **arguments))  # both factors move the policy
