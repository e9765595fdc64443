"""Small token MDPs with random rewards, and what the algorithm files do to a policy there."""

from __future__ import annotations

import math
import random

import torch
from algos_files import ALGORITHMS
from hypothesis import strategies as st

from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    enumerate_trajectories,
    exact_gradient,
    expected_gradient,
)

UNCLIPPED = {"clip_eps_low": 1.0, "clip_eps_high": 1e9}


def draw(*key):
    """A number from 0 to 1 that looks random and is the same for the same key."""
    return random.Random(str(key)).random()


def zero_one(seed, share=0.5):
    return lambda question, tokens, _: float(draw(seed, question, tokens) < share)


def real_valued(seed):
    """From -1 to 2 by quarters, which float64 holds: equal rewards happen, and are equal."""
    return lambda question, tokens, _: round(12 * draw(seed, question, tokens)) / 4 - 1


def random_critic(seed):
    return lambda question, prefix: 2 * draw("critic", seed, question, prefix) - 1


ZERO_ONE, REAL = (zero_one,), (real_valued,)
ONE, TWO = ((1.0,),), ((0.3, 0.7),)


@st.composite
def worlds(
    draw,
    rewards=ZERO_ONE + REAL,
    questions=ONE + TWO,
    eos=(True, False),
    horizon=(1, 3),
    scales=(0.0, 1.0, 1.0, 3.0),
):
    """An MDP and a policy in which something can be gained, some policies nearly certain."""
    vocab_size = draw(st.integers(2, 3))
    mdp = TokenMDP(
        vocab_size,
        draw(st.integers(*horizon)),
        draw(st.sampled_from(rewards))(draw(st.integers(0, 99))),
        eos=vocab_size - 1 if draw(st.sampled_from(eos)) else None,
        question_probs=draw(st.sampled_from(questions)),
    )
    scale = draw(st.sampled_from(scales))
    return mdp, TabularPolicy(mdp, draw(st.integers(0, 99)), scale)


def gradient(name, mdp, policy, **settings):
    """The expected gradient of an algorithm file, one of whose functions may be replaced."""
    functions = ALGORITHMS[name]
    knows_tokens = {"critic", "old_policy", "sampling_policy", "ref_policy", "token_rewards"}
    settings.setdefault("collapsed", not knows_tokens & settings.keys())
    policy_loss = settings.pop("policy_loss", functions.policy_loss)
    compute_advantages = settings.pop("compute_advantages", functions.compute_advantages)
    return expected_gradient(compute_advantages, policy_loss, mdp, policy, **settings)


def can_learn(mdp, policy):
    return exact_gradient(mdp, policy).norm() > 1e-6


def gradient_of_weighted_sum(mdp, policy, weights):
    """Σ_o P(q) π(o|q) w(o) ∇log π(o|q), flat; weights: (question, tokens) -> w."""
    trajectories = enumerate_trajectories(mdp, policy)
    responses = zip(
        trajectories.questions.tolist(),
        trajectories.tokens.tolist(),
        trajectories.lengths.tolist(),
        strict=True,
    )
    w = torch.tensor([weights(q, tuple(t[:n])) for q, t, n in responses], dtype=torch.float64)
    asked = torch.tensor(mdp.question_probs, dtype=torch.float64)[trajectories.questions]
    total = (asked * trajectories.probs * w * trajectories.logprobs(policy).sum(1)).sum()
    (result,) = torch.autograd.grad(total, [policy.logits])
    return result.flatten()


def pass_rates(mdp, policy):
    """Expected reward of each question."""
    trajectories = enumerate_trajectories(mdp, policy)
    rates = torch.zeros(len(mdp.question_probs), dtype=torch.float64)
    rates.index_add_(0, trajectories.questions, trajectories.probs * trajectories.rewards)
    return rates.tolist()


def assert_close(got, expected, tolerance=1e-9):
    gap, size = (got - expected).norm().item(), expected.norm().item()
    assert gap <= tolerance * size, f"{gap:.3g} of {size:.3g}: {got} against {expected}"


def sine(got, expected):
    """Of the angle between two gradients."""
    along = (got @ expected) / (expected @ expected) * expected
    return ((got - along).norm() / got.norm()).item()


def cosine(got, expected):
    return (got @ expected / (got.norm() * expected.norm())).item()


def assert_same_direction(got, exact):
    assert got @ exact > 0
    assert sine(got, exact) < 1e-9


def difficulty_weight(p, group_size, std_of=lambda k, n: math.sqrt(k * (n - k) / (n * (n - 1)))):
    """E[A_i | R_i = 1] - E[A_i | R_i = 0] for A = (R - mean) / std, over k right of G."""
    n = group_size
    return sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k) * (k / n) * (1 - k / n) / std_of(k, n)
        for k in range(1, n)
    ) / (p * (1 - p))
