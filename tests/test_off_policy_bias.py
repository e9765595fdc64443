"""Expected gradients where the batch was sampled by another policy, without clipping."""

from __future__ import annotations

import math

import pytest
import torch
from algos_files import NAMES, each
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_mdps import (
    UNCLIPPED,
    assert_close,
    can_learn,
    gradient,
    random_critic,
    real_valued,
    sine,
    worlds,
    zero_one,
)

from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    exact_gradient,
    state_values,
)

PER_TOKEN = ("rloo", "dr_grpo", "ppo")  # exact on-policy, each up to its scale
DISTANCES = (0.3, 1.0)
LONG = TokenMDP(3, 3, zero_one(1), eos=2)
seeds = st.integers(0, 99)


def is_small(world):
    return world[0].vocab_size * world[0].horizon < 9


def near(mdp, policy, seed, distance):
    """Another policy, whose logits differ by a random amount."""
    other = TabularPolicy(mdp, seed + 1000, scale=distance)
    other.logits.data += policy.logits.data
    return other


def unclipped(name, mdp, policy, group_size=2, **settings):
    """The expected gradient of a file over its scale on-policy."""
    if name == "ppo":
        settings = {"critic": random_critic(3), **settings}
    got = gradient(
        name, mdp, policy, group_size=group_size, loss_kwargs=UNCLIPPED, collapsed=False, **settings
    )
    scales = {"dr_grpo": (group_size - 1) / (group_size * mdp.horizon), "ppo": 1 / mdp.horizon}
    return got / scales.get(name, 1)


def sequence_ratio(logprobs, old_logprobs, advantages, mask, totals):
    ratio = ((logprobs - old_logprobs) * mask).sum(1).exp()
    return -(ratio * advantages).sum() / totals.responses, {}


@pytest.mark.parametrize("distance", DISTANCES)
@settings(max_examples=20)
@given(worlds(), seeds, st.integers(2, 3))
def test_the_ratio_of_the_sequence_gives_the_gradient_itself(distance, world, seed, group_size):
    assume(can_learn(*world) and (group_size == 2 or is_small(world)))
    arguments = {
        "policy_loss": sequence_ratio,
        "group_size": group_size,
        "old_policy": near(*world, seed, distance),
    }
    exact = exact_gradient(*world)
    assert_close(gradient("rloo", *world, **arguments), exact)
    scale = (group_size - 1) / group_size
    assert_close(gradient("dr_grpo", *world, **arguments), scale * exact)


def surrogate_gradient(mdp, policy, old):
    """∇ Σ_s d_old(s) Σ_a π(a|s) Q_old(s, a), Kakade and Langford 2002; Schulman et al. 2015."""
    values, reach = state_values(mdp, old), {}
    for q, p in enumerate(mdp.question_probs):
        reach[q, ()] = p
    total = 0.0
    for question, prefix in values:  # in the order of their length
        here = reach[question, prefix]
        for token, logprob in enumerate(old(question, prefix).tolist()):
            tokens = (*prefix, token)
            ends = token == mdp.eos or len(tokens) == mdp.horizon
            if not ends:
                reach[question, tokens] = here * math.exp(logprob)
            value = (
                mdp.reward(question, tokens, token == mdp.eos) if ends else values[question, tokens]
            )
            total = total + here * value * policy(question, prefix)[token].exp()
    return torch.autograd.grad(total, policy.logits)[0].flatten()


@each(*PER_TOKEN)
@settings(max_examples=15)
@given(worlds(), seeds, st.sampled_from(DISTANCES))
def test_the_ratio_of_a_token_gives_the_gradient_of_the_surrogate(name, world, seed, distance):
    mdp, policy = world
    assume(can_learn(*world))
    old = near(*world, seed, distance)
    expected = surrogate_gradient(mdp, policy, old)
    assert_close(unclipped(name, mdp, policy, old_policy=old), expected)


@each(*PER_TOKEN)
@settings(max_examples=15)
@given(worlds(horizon=(1, 1)), seeds, st.sampled_from(DISTANCES))
def test_for_responses_of_one_token_both_are_the_same(name, world, seed, distance):
    assume(can_learn(*world))
    got = unclipped(name, *world, group_size=3, old_policy=near(*world, seed, distance))
    assert_close(got, exact_gradient(*world))


@each(*NAMES)
def test_the_ratio_of_a_token_is_biased_for_longer_responses(name):
    policy = TabularPolicy(LONG)
    got = unclipped(name, LONG, policy, old_policy=near(LONG, policy, 0, 0.3))
    assert sine(got, exact_gradient(LONG, policy)) > 0.01


def test_without_the_ratio_even_one_token_is_biased():
    mdp = TokenMDP(3, 1, real_valued(3))
    policy = TabularPolicy(mdp)

    def no_ratio(logprobs, old_logprobs, advantages, mask, totals):
        return -(logprobs * advantages[:, None] * mask).sum() / totals.responses, {}

    settings = {"group_size": 2, "old_policy": near(mdp, policy, 0, 1.0)}
    exact = exact_gradient(mdp, policy)
    assert sine(gradient("rloo", mdp, policy, policy_loss=no_ratio, **settings), exact) > 0.01
    assert_close(unclipped("rloo", mdp, policy, **settings), exact)


@settings(max_examples=15)
@given(worlds(), seeds, st.sampled_from(DISTANCES))
def test_cispo_without_a_bound_is_dapo_without_one(world, seed, distance):
    assume(can_learn(*world) and is_small(world))
    old = near(*world, seed, distance)
    dapo = unclipped("dapo", *world, old_policy=old)
    assert_close(unclipped("cispo", *world, old_policy=old), dapo)


# The engine samples by a policy of its own, and the trainer's is the old one.


@each(*(name for name in NAMES if name != "gspo"))
@settings(max_examples=8)
@given(worlds(), seeds, st.sampled_from(DISTANCES))
def test_weights_without_a_cap_make_the_engine_the_old_policy(name, world, seed, distance):
    # ρ_t · π_old/π_engine = π/π_engine, token by token.
    assume(can_learn(*world) and is_small(world))
    engine = near(*world, seed, distance)
    got = unclipped(name, *world, sampling_policy=engine, tis_cap=1e9)
    assert_close(got, unclipped(name, *world, old_policy=engine))


@each(*PER_TOKEN)
@settings(max_examples=15)
@given(worlds(horizon=(1, 1)), seeds, st.sampled_from(DISTANCES))
def test_weights_without_a_cap_are_exact_for_responses_of_one_token(name, world, seed, distance):
    assume(can_learn(*world))
    engine = near(*world, seed, distance)
    got = unclipped(name, *world, sampling_policy=engine, tis_cap=1e9)
    assert_close(got, exact_gradient(*world))


def test_a_cap_that_binds_biases_one_that_does_not_changes_nothing():
    mdp = TokenMDP(3, 1, real_valued(3))
    policy = TabularPolicy(mdp, scale=0)
    engine = TabularPolicy(mdp, scale=0)
    engine.logits.data[0] = torch.tensor([0.1, 0.4, 0.5]).log()
    exact = exact_gradient(mdp, policy)

    def expected(cap):
        return unclipped("rloo", mdp, policy, sampling_policy=engine, tis_cap=cap)

    assert_close(expected(3.34), exact)  # (1/3) / 0.1 is the largest weight
    assert sine(expected(2.0), exact) > 0.01
    assert sine(unclipped("rloo", mdp, policy, sampling_policy=engine), exact) > sine(
        expected(2.0), exact
    )


def test_what_weights_leave_is_how_the_engine_reaches_its_states():
    policy = TabularPolicy(LONG)
    engine = near(LONG, policy, 0, 0.3)
    exact = exact_gradient(LONG, policy)
    left = unclipped("rloo", LONG, policy, sampling_policy=engine, tis_cap=1e9)
    assert sine(left, exact) > 0.01
    assert_close(left, surrogate_gradient(LONG, policy, engine))
    plain = unclipped("rloo", LONG, policy, sampling_policy=engine)
    assert (left - exact).norm() < (plain - exact).norm()
