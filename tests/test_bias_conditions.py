"""When a standardised or length-normalised estimator keeps the direction of ∇J, and when not."""

from __future__ import annotations

import math

import pytest
from algos_files import each
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_mdps import (
    ONE,
    REAL,
    TWO,
    ZERO_ONE,
    assert_close,
    assert_same_direction,
    can_learn,
    difficulty_weight,
    gradient,
    gradient_of_weighted_sum,
    pass_rates,
    real_valued,
    sine,
    worlds,
    zero_one,
)

from lmrl_env.exact import TabularPolicy, TokenMDP, enumerate_trajectories, exact_gradient

STANDARDISED = ("grpo", "dapo", "gspo", "cispo", "lite_ppo", "reinforce_pp")
group_sizes = st.integers(2, 4)


@each(*STANDARDISED)
@settings(max_examples=8)
@given(worlds(rewards=ZERO_ONE, questions=ONE, eos=(False,)), group_sizes)
def test_one_question_rewards_of_0_and_1_and_equal_lengths_leave_the_direction(
    name, world, group_size
):
    assume(can_learn(*world))
    assert_same_direction(gradient(name, *world, group_size=group_size), exact_gradient(*world))


@settings(max_examples=25)
@given(worlds(rewards=ZERO_ONE), st.integers(4, 5))
def test_reinforce_pp_keeps_the_direction_if_each_response_has_a_question_of_its_own(world, n):
    assume(can_learn(*world))
    got = gradient("reinforce_pp", *world, group_size=1, questions=n)
    assert_same_direction(got, exact_gradient(*world))


@settings(max_examples=25)
@given(worlds(rewards=ZERO_ONE, questions=ONE), group_sizes, st.integers(1, 2))
def test_reinforce_pp_keeps_the_direction_for_one_question(world, group_size, groups):
    assume(can_learn(*world))
    got = gradient("reinforce_pp", *world, group_size=group_size, questions=groups)
    assert_same_direction(got, exact_gradient(*world))


LENGTHS_DIFFER = TokenMDP(3, 2, zero_one(1), eos=2)
QUESTIONS_DIFFER = TokenMDP(3, 2, zero_one(7), question_probs=(0.5, 0.5))  # equal lengths
REWARDS_DIFFER = TokenMDP(3, 2, real_valued(3))


@each(*(name for name in STANDARDISED if name != "reinforce_pp"))
def test_different_lengths_turn_the_direction(name):
    assert is_biased(name, LENGTHS_DIFFER, group_size=3)


@each(*STANDARDISED)
def test_rewards_of_more_than_two_values_turn_the_direction(name):
    assert is_biased(name, REWARDS_DIFFER, group_size=3)
    assert is_biased(name, REWARDS_DIFFER, group_size=4)


@pytest.mark.parametrize("questions", [1, 2, (0, 1)])
@each(*STANDARDISED)
def test_questions_of_different_pass_rates_turn_the_direction(name, questions):
    # That of REINFORCE++ too, for the responses to a question stand in one batch together.
    assert is_biased(name, QUESTIONS_DIFFER, group_size=4, questions=questions)


def test_a_fixed_list_of_questions_turns_the_direction_of_reinforce_pp():
    assert is_biased("reinforce_pp", QUESTIONS_DIFFER, group_size=1, questions=(0, 0, 1, 1))


def is_biased(name, mdp, **settings):
    policy = TabularPolicy(mdp, seed=2)
    got, exact = gradient(name, mdp, policy, **settings), exact_gradient(mdp, policy)
    assert got @ exact > 0
    return sine(got, exact) > 1e-5


@settings(max_examples=40)
@given(worlds(rewards=ZERO_ONE), group_sizes)
def test_grpo_follows_the_centred_reward_over_the_length_weighted_by_difficulty(world, group_size):
    # E[g] = Σ_q P(q) w(p_q) ∇E[(R - p_q) / |o|], the pass rate p_q held fixed.
    mdp, policy = world
    rates = pass_rates(mdp, policy)
    assume(can_learn(*world) and all(1e-6 < p < 1 - 1e-6 for p in rates))

    def weight(q, tokens):
        centred = mdp.reward(q, tokens, True) - rates[q]
        return difficulty_weight(rates[q], group_size) * centred / len(tokens)

    expected = gradient_of_weighted_sum(mdp, policy, weight)
    got = gradient("grpo", *world, group_size=group_size, advantage_kwargs={"eps": 1e-13})
    assert_close(got, expected)


@settings(max_examples=25)
@given(worlds(rewards=ZERO_ONE, questions=TWO, eos=(False,)), st.integers(2, 3))
def test_groups_of_two_or_three_know_no_difficulty(world, group_size):
    # k(G-k) is the same for all k from 1 to G-1, so that the std is, where it is not 0.
    assume(can_learn(*world))
    for name in ("grpo", "dapo"):
        got = gradient(name, *world, group_size=group_size)
        assert_same_direction(got, exact_gradient(*world))


@settings(max_examples=25)
@given(worlds(rewards=REAL, questions=ONE, eos=(False,)))
def test_in_groups_of_two_grpo_counts_wins_whatever_the_size_of_rewards(world):
    # A = ±1/√2, so that E[A | o] is the chance to win less the chance to lose, over √2.
    mdp, policy = world
    assume(can_learn(*world))
    responses = enumerate_trajectories(mdp, policy)
    others = list(zip(responses.rewards.tolist(), responses.probs.tolist(), strict=True))

    def expected_advantage(question, tokens):
        own = mdp.reward(question, tokens, False)
        wins = sum(p * ((own > other) - (own < other)) for other, p in others)
        return wins / math.sqrt(2) / mdp.horizon

    expected = gradient_of_weighted_sum(mdp, policy, expected_advantage)
    got = gradient("grpo", mdp, policy, group_size=2, advantage_kwargs={"eps": 1e-13})
    assert_close(got, expected)
