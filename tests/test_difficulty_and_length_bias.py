"""How hard a question weighs, and where the length of wrong answers is driven, exactly."""

from __future__ import annotations

import math

import pytest
import torch
from algos_files import NAMES, each
from hypothesis import given, settings
from hypothesis import strategies as st
from small_mdps import difficulty_weight, gradient, random_critic
from torch import nn

from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    enumerate_batches,
    enumerate_trajectories,
    flat_gradient,
)
from lmrl_env.groups import has_signal

BY_STD = ("grpo", "dapo", "gspo", "cispo", "lite_ppo", "reinforce_pp")
PASS_RATES = (0.02, 0.1, 0.3, 0.5, 0.9)
COIN = TokenMDP(2, 1, lambda question, tokens, _: tokens[0])


def coin(p):
    policy = TabularPolicy(COIN, scale=0)
    policy.logits.data[0, 1] = math.log(p / (1 - p))
    return policy


def weight(name, p, group_size, **kwargs):
    """E[A·score] / p(1-p), which is E[g] over ∇J, where responses have one token."""
    settings = {"critic": random_critic(0)} if name == "ppo" else {}
    got = gradient(name, COIN, coin(p), group_size=group_size, **settings, **kwargs)
    return got[1].item() / (p * (1 - p))


@pytest.mark.parametrize("p", PASS_RATES)
@each(*NAMES)
def test_the_weight_of_a_question_is_the_closed_form(name, p):
    if name in BY_STD:
        got = weight(name, p, 8, advantage_kwargs={"eps": 1e-13})
        assert got == pytest.approx(difficulty_weight(p, 8), rel=1e-9)
    else:
        expected = {"rloo": 1, "dr_grpo": 7 / 8, "ppo": 1}[name]
        assert weight(name, p, 4 if name == "ppo" else 8) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("p", "expected"), [(0.02, 2.41), (0.1, 2.18), (0.3, 1.84), (0.5, 1.74)])
def test_the_std_of_a_group_of_eight_weighs_hard_and_easy_questions_up(p, expected):
    assert weight("grpo", p, 8) == pytest.approx(expected, abs=0.005)
    assert weight("grpo", 1 - p, 8) == pytest.approx(expected, abs=0.005)


@settings(max_examples=30)
@given(st.floats(0.01, 0.49), st.integers(4, 8))
def test_the_weight_falls_towards_even_odds_from_groups_of_four_on(p, group_size):
    nearer = p + 0.25 * (0.5 - p)
    assert weight("grpo", p, group_size) > weight("grpo", nearer, group_size)
    assert weight("grpo", p, 3) == pytest.approx(weight("grpo", nearer, 3), rel=1e-9)


@settings(max_examples=30)
@given(st.floats(0.02, 0.98), st.integers(2, 8))
def test_eps_lowers_the_weight_by_less_than_its_share_of_the_smallest_std(p, group_size):
    # One right of G has the smallest std that is not 0, 1/√G; the largest is at most 1/√2.
    exact = difficulty_weight(p, group_size)
    lost = 1 - weight("grpo", p, group_size) / exact
    assert 1e-4 * math.sqrt(2) * 0.999 < lost < 1e-4 * math.sqrt(group_size)


@settings(max_examples=30)
@given(st.floats(0.01, 0.99), st.integers(2, 8))
def test_a_group_teaches_nothing_with_the_chance_that_all_are_right_or_all_wrong(p, group_size):
    flips = enumerate_trajectories(COIN, coin(p))
    rows, probs = enumerate_batches(COIN, flips, group_size=group_size)
    dull = [not has_signal(flips.rewards[row], group_size).item() for row in rows]
    expected = p**group_size + (1 - p) ** group_size
    assert probs[dull].sum().item() == pytest.approx(expected, rel=1e-9)


def test_the_population_std_misses_the_closed_form():
    def population(rewards, group_size):
        groups = rewards.reshape(-1, group_size)
        deviations = groups - groups.mean(1, keepdim=True)
        return (deviations / (groups.std(1, keepdim=True, correction=0) + 1e-13)).flatten()

    got = weight("grpo", 0.3, 8, compute_advantages=population)
    assert got == pytest.approx(math.sqrt(8 / 7) * difficulty_weight(0.3, 8), rel=1e-9)


# Length.


class Committed(nn.Module):
    """The first token commits to a right (0) or a wrong (1) answer; then it is free to go on.

    Behind the first token EOS (2) ends the response, or token 0 goes on; at the budget there is
    EOS only, so that no response is truncated.

    Args:
        seed: of the parameters.
        horizon: K, at least 3.
        shared: has the tail chosen by the same parameters whatever the answer.
        ends: whether EOS is certain at the budget.
    """

    def __init__(self, seed, horizon, shared=False, ends=True):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.horizon, self.ends = horizon, ends
        self.commits = nn.Parameter(torch.randn(1, generator=generator, dtype=torch.float64))
        shape = (1 if shared else 2, horizon - 1)
        self.goes_on = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    def forward(self, question, prefix):
        never = torch.full((1,), -math.inf, dtype=torch.float64)
        if not prefix:
            return torch.cat([self.commits, torch.zeros(1).double(), never]).log_softmax(0)
        if self.ends and len(prefix) == self.horizon - 1:
            return torch.cat([never, never, torch.zeros(1).double()])
        on = self.goes_on[prefix[0] % len(self.goes_on), len(prefix) - 1, None]
        return torch.cat([on.sigmoid().log(), never, (-on).sigmoid().log()])


def committed_mdp(horizon, truncated_pays=True):
    return TokenMDP(
        3, horizon, lambda _, tokens, ended: float(tokens[0] == 0 and (ended or truncated_pays)), 2
    )


def length_drift(name, mdp, policy, is_meant, group_size=3):
    """Derivative of E[length | meant] along the expected update, per unit of its norm.

    is_meant: of the trajectories, which are meant.
    """
    critic = {"critic": random_critic(1)} if name == "ppo" else {}
    update = gradient(name, mdp, policy, group_size=group_size, **critic)
    trajectories = enumerate_trajectories(mdp, policy)
    probs = trajectories.logprobs(policy).sum(1).exp() * is_meant(trajectories)
    mean_length = (probs * trajectories.lengths).sum() / probs.sum()
    return (flat_gradient(mean_length, policy) @ update / update.norm()).item()


def wrong(trajectories):
    return (trajectories.rewards == 0) & trajectories.terminated


def right(trajectories):
    return (trajectories.rewards == 1) & trajectories.terminated


committed = st.builds(
    lambda seed, horizon: (committed_mdp(horizon), Committed(seed, horizon)),
    st.integers(0, 999),
    st.integers(3, 5),
)


@each("dr_grpo", "rloo", "ppo", "reinforce_pp")
@settings(max_examples=15)
@given(committed, st.integers(2, 4))
def test_once_the_answer_stands_a_constant_divisor_leaves_its_length_alone(name, world, group_size):
    for meant in (wrong, right):
        assert abs(length_drift(name, *world, meant, group_size)) < 1e-12


@each("grpo", "gspo", "dapo", "cispo", "lite_ppo")
@settings(max_examples=15)
@given(committed, st.integers(2, 4))
def test_a_divisor_with_the_length_makes_wrong_answers_longer_and_right_ones_shorter(
    name, world, group_size
):
    assert length_drift(name, *world, wrong, group_size) > 1e-6
    assert length_drift(name, *world, right, group_size) < -1e-6


@settings(max_examples=30)
@given(committed, st.integers(2, 4))
def test_the_tokens_of_the_batch_do_so_less_than_those_of_the_response(world, group_size):
    of_batch = length_drift("dapo", *world, wrong, group_size)
    assert length_drift("grpo", *world, wrong, group_size) > of_batch


@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(3, 5), st.integers(2, 4))
def test_where_the_policy_cannot_tell_its_answer_the_two_drifts_cancel(seed, horizon, group_size):
    policy = Committed(seed, horizon, shared=True)
    for name in ("grpo", "gspo"):
        drift = length_drift(name, committed_mdp(horizon), policy, wrong, group_size)
        assert abs(drift) < 1e-12


def test_truncated_answers_that_pay_nothing_are_to_be_kept_apart_from_wrong_ones():
    # Dr. GRPO moves their share, and with it the mean length of what earns 0.
    mdp, policy = committed_mdp(4, truncated_pays=False), Committed(0, 4, ends=False)
    assert abs(length_drift("dr_grpo", mdp, policy, wrong)) < 1e-12
    assert abs(length_drift("dr_grpo", mdp, policy, lambda t: t.rewards == 0)) > 0.1


class FreeTail(TabularPolicy):
    """Any policy but that EOS is not the first token and is certain at the budget."""

    def forward(self, question, prefix):
        logits = self.logits[self.states[question, prefix]]
        mask = torch.zeros(3).double()
        if not prefix:
            mask[2] = -math.inf
        elif len(prefix) == 3:
            mask[:2] = -math.inf
        return (logits + mask).log_softmax(0)


@settings(max_examples=25)
@given(st.integers(0, 999), st.sampled_from([1.0, 3.0]), st.integers(2, 3))
def test_so_they_do_in_random_tails_with_two_ways_to_go_on(seed, scale, group_size):
    mdp = committed_mdp(4)
    policy = FreeTail(mdp, seed, scale)
    assert length_drift("grpo", mdp, policy, wrong, group_size) > 0
    assert abs(length_drift("dr_grpo", mdp, policy, wrong, group_size)) < 1e-12


class Gamble(nn.Module):
    """Behind a wrong answer the policy goes on for 7 tokens, or for 4 or 12 with even odds.

    Which of the two is settled by one of 60 tokens, each of which by itself moves the mean little.
    """

    def __init__(self):
        super().__init__()
        self.commits, self.gambles = (nn.Parameter(torch.zeros(2).double()) for _ in range(2))
        self.many = nn.Parameter(torch.zeros(60).double())

    def forward(self, question, prefix):
        never = torch.full((61,), -math.inf).double()
        if prefix in ((), (1,)):
            two = self.gambles if prefix else self.commits
            return torch.cat([two, never[2:]]).log_softmax(0)
        if prefix == (1, 0):
            return torch.cat([self.many, never[60:]]).log_softmax(0)
        if prefix[0] == 0:
            length = 2
        elif prefix[1] == 1:
            length = 7
        else:
            length = (4, 12)[prefix[2] % 2]
        forced = 60 if len(prefix) == length - 1 else 0
        return never.index_fill(0, torch.tensor(forced), 0.0)


def test_and_yet_it_is_no_theorem():
    # The gamble is longer in the mean, 8 > 7, and by 1/length shorter, 1/6 > 1/7.
    mdp = TokenMDP(61, 12, lambda _, tokens, __: float(tokens[0] == 0), eos=60)
    policy = Gamble()
    lengths = enumerate_trajectories(mdp, policy).lengths
    assert sorted(set(lengths.tolist())) == [2, 4, 7, 12]
    assert length_drift("grpo", mdp, policy, wrong, 2) < -1e-4
    assert abs(length_drift("dr_grpo", mdp, policy, wrong, 2)) < 1e-12
