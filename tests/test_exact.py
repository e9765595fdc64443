from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_models import random_model
from torch import nn

from lmrl_env.errors import ConfigurationError
from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    enumerate_batches,
    enumerate_trajectories,
    exact_gradient,
    expected_gradient,
    flat_gradient,
    objective,
    state_values,
    verifier_reward,
)
from lmrl_env.types import BatchTotals, Question
from lmrl_env.verifiers import boxed_math


def hashed_reward(question, tokens, terminated):
    """Real-valued, of either sign, and different for nearly every response."""
    return math.sin(7 * question + sum((i + 1) * (t + 2) ** 2 for i, t in enumerate(tokens))) + (
        0.5 * terminated
    )


def zero_one_reward(question, tokens, terminated):
    return float(sum(tokens) % 2 == question and terminated)


mdps = st.builds(
    lambda vocab_size, horizon, has_eos, questions: TokenMDP(
        vocab_size,
        horizon,
        hashed_reward,
        eos=vocab_size - 1 if has_eos else None,
        question_probs=questions,
    ),
    vocab_size=st.integers(2, 3),
    horizon=st.integers(1, 3),
    has_eos=st.booleans(),
    questions=st.sampled_from([(1.0,), (0.25, 0.75), (0.5, 0.0, 0.5)]),
)
seeds = st.integers(0, 99)


# An enumeration of its own: all strings of K tokens, cut behind the first EOS.


def responses(mdp):
    found = set()
    for question, _ in enumerate(mdp.question_probs):
        for tokens in itertools.product(range(mdp.vocab_size), repeat=mdp.horizon):
            if mdp.eos in tokens:
                tokens = tokens[: tokens.index(mdp.eos) + 1]
            found.add((question, tokens))
    return sorted(found)


def token_logprobs(policy, question, tokens):
    return [policy(question, tokens[:t])[token] for t, token in enumerate(tokens)]


def probability(policy, question, tokens):
    return math.exp(sum(x.item() for x in token_logprobs(policy, question, tokens)))


def reward_of(mdp, question, tokens):
    return mdp.reward(question, tokens, tokens[-1] == mdp.eos)


def plain_objective(mdp, policy):
    return sum(
        mdp.question_probs[q] * probability(policy, q, tokens) * reward_of(mdp, q, tokens)
        for q, tokens in responses(mdp)
    )


def plain_expected_gradient(estimator, mdp, policy, group_size, question_lists, **others):
    """Sum over *ordered* batches, each with its own forward and backward.

    question_lists: of the groups of a batch, with their probability.
    """
    compute_advantages, policy_loss = estimator
    old = others.get("old") or policy
    sampling = others.get("sampling") or old
    total = torch.zeros(sum(p.numel() for p in policy.parameters()), dtype=torch.float64)
    all_responses = responses(mdp)
    for questions, probability_of_list in question_lists:
        slots = [q for q in questions for _ in range(group_size)]
        for batch in itertools.product(*([r for r in all_responses if r[0] == q] for q in slots)):
            weight = probability_of_list * math.prod(probability(sampling, *r) for r in batch)

            def padded(policy, batch=batch):
                rows = [torch.stack(token_logprobs(policy, *response)) for response in batch]
                return torch.stack([nn.functional.pad(r, (0, mdp.horizon - len(r))) for r in rows])

            lengths = torch.tensor([len(tokens) for _, tokens in batch])
            mask = torch.arange(mdp.horizon) < lengths[:, None]
            rewards = torch.tensor([reward_of(mdp, *r) for r in batch], dtype=torch.float64)
            advantages = compute_advantages(rewards, group_size)
            old_logprobs = padded(old).detach()
            if "cap" in others:
                weights = (old_logprobs - padded(sampling).detach()).exp()
                advantages = advantages[:, None] * weights.clamp(max=others["cap"])
            kwargs = {"ref_logprobs": padded(others["ref"]).detach()} if "ref" in others else {}
            totals = BatchTotals(len(batch), int(lengths.sum()), mdp.horizon)
            loss, _ = policy_loss(padded(policy), old_logprobs, advantages, mask, totals, **kwargs)
            total -= weight * flat_gradient(loss, policy)
    return total


# Estimators, by hand.


def rewards_themselves(rewards, group_size):
    return rewards


def leave_one_out(rewards, group_size):
    groups = rewards.reshape(-1, group_size)
    return (group_size * (groups - groups.mean(1, keepdim=True)) / (group_size - 1)).flatten()


def above_mean(rewards, group_size):
    groups = rewards.reshape(-1, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def over_batch_std(rewards, group_size):
    return above_mean(rewards, group_size) / (rewards.std() + 0.1)


def ratio_sum(logprobs, old_logprobs, advantages, mask):
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    return ((logprobs - old_logprobs).exp() * advantages * mask).sum()


def per_response(logprobs, old_logprobs, advantages, mask, totals):
    return -ratio_sum(logprobs, old_logprobs, advantages, mask) / totals.responses, {}


def per_budget(logprobs, old_logprobs, advantages, mask, totals):
    loss = -ratio_sum(logprobs, old_logprobs, advantages, mask)
    return loss / (totals.responses * totals.max_new_tokens), {}


def per_token(logprobs, old_logprobs, advantages, mask, totals):
    return -ratio_sum(logprobs, old_logprobs, advantages, mask) / totals.tokens, {}


def clipped_per_token(logprobs, old_logprobs, advantages, mask, totals, *, clip_eps=0.2):
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    terms = torch.minimum(ratio * advantages, clipped * advantages)
    return -(terms * mask).sum() / totals.tokens, {}


def with_reference(logprobs, old_logprobs, advantages, mask, totals, *, ref_logprobs):
    penalty = ((logprobs - ref_logprobs).square() * mask).sum() / totals.tokens
    return per_token(logprobs, old_logprobs, advantages, mask, totals)[0] + penalty, {}


def sequence_ratio(logprobs, old_logprobs, advantages, mask, totals):
    ratio = ((logprobs - old_logprobs) * mask).sum(1).exp()
    return -(ratio * advantages).sum() / totals.responses, {}


def assert_close(got, expected, tolerance=1e-12):
    assert torch.linalg.norm(got - expected) <= tolerance * max(1, torch.linalg.norm(expected))


# J, its gradient, and the distributions.


@settings(max_examples=25)
@given(mdp=mdps, seed=seeds)
def test_the_objective_is_the_probability_weighted_reward_of_all_responses(mdp, seed):
    policy = TabularPolicy(mdp, seed)
    assert objective(mdp, policy).item() == pytest.approx(plain_objective(mdp, policy), abs=1e-12)


@settings(max_examples=10)
@given(mdp=mdps, seed=seeds)
def test_the_gradient_is_what_finite_differences_of_the_objective_show(mdp, seed):
    policy = TabularPolicy(mdp, seed)
    gradient = exact_gradient(mdp, policy)
    with torch.no_grad():
        for i in range(0, policy.logits.numel(), 3):
            values = []
            for step in (1e-5, -2e-5, 1e-5):
                policy.logits.view(-1)[i] += step
                values.append(plain_objective(mdp, policy))
            slope = (values[0] - values[1]) / 2e-5
            assert gradient[i].item() == pytest.approx(slope, abs=1e-8)


@settings(max_examples=25)
@given(mdp=mdps, seed=seeds)
def test_every_response_is_enumerated_once_with_its_probability(mdp, seed):
    policy = TabularPolicy(mdp, seed)
    trajectories = enumerate_trajectories(mdp, policy)
    lengths = trajectories.lengths.tolist()
    found = {
        (q, tuple(tokens[:length])): p
        for q, tokens, length, p in zip(
            trajectories.questions.tolist(),
            trajectories.tokens.tolist(),
            lengths,
            trajectories.probs.tolist(),
            strict=True,
        )
    }
    expected = {
        (q, tokens): probability(policy, q, tokens)
        for q, tokens in responses(mdp)
        if mdp.question_probs[q] > 0
    }
    assert len(trajectories.probs) == len(found) == len(expected)
    assert found == pytest.approx(expected, rel=1e-12)
    assert trajectories.rewards.tolist() == pytest.approx([reward_of(mdp, *r) for r in found])
    ends = [tokens[-1] == mdp.eos for _, tokens in found]
    assert trajectories.terminated.tolist() == ends
    logprobs = trajectories.logprobs(policy).detach()
    assert torch.allclose(logprobs.sum(1).exp(), trajectories.probs, rtol=1e-12)
    assert not logprobs[~trajectories.mask].any()


def test_without_an_eos_every_response_is_truncated_at_the_budget():
    mdp = TokenMDP(3, 4, hashed_reward)
    trajectories = enumerate_trajectories(mdp, TabularPolicy(mdp))
    assert len(trajectories.probs) == 3**4
    assert trajectories.mask.all()
    assert not trajectories.terminated.any()


def test_vocabulary_5_and_horizon_5_are_enumerated():
    mdp = TokenMDP(5, 5, hashed_reward, question_probs=(0.5, 0.5))
    policy = TabularPolicy(mdp)
    trajectories = enumerate_trajectories(mdp, policy)
    assert len(trajectories.probs) == 2 * 5**5
    assert trajectories.probs.sum().item() == pytest.approx(2, rel=1e-12)
    assert exact_gradient(mdp, policy).shape == (2 * (5**5 - 1) // 4 * 5,)


class Committed(nn.Module):
    """Chooses between four answers with the first token; what follows is fixed."""

    LENGTHS = (2, 2, 10, 10)
    EOS = 4

    def __init__(self, seed):
        super().__init__()
        noise = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.logits = nn.Parameter(noise)

    def forward(self, question, prefix):
        logprobs = torch.full((5,), -torch.inf, dtype=torch.float64)
        if not prefix:
            return torch.cat([self.logits.log_softmax(-1), logprobs[:1]])
        logprobs[self.EOS if len(prefix) == self.LENGTHS[prefix[0]] - 1 else 0] = 0
        return logprobs


COMMITTED = TokenMDP(5, 10, lambda _, tokens, __: float(tokens[0] in (0, 2)), eos=Committed.EOS)


def test_tokens_of_probability_zero_are_not_followed():
    policy = Committed(0)
    trajectories = enumerate_trajectories(COMMITTED, policy)
    assert trajectories.lengths.tolist() == list(Committed.LENGTHS)
    probs = policy.logits.softmax(-1).detach()
    assert_close(trajectories.probs, probs)
    # J = p₀ + p₂, so ∂J/∂logit_i = p_i (1[i in {0, 2}] - J).
    right = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert_close(exact_gradient(COMMITTED, policy), probs * (right - probs @ right))


@settings(max_examples=20)
@given(mdp=mdps, seed=seeds)
def test_the_value_of_a_state_is_the_mean_reward_to_come(mdp, seed):
    policy = TabularPolicy(mdp, seed)
    values = state_values(mdp, policy)

    def value(question, prefix):  # Bellman's equation
        if prefix and (prefix[-1] == mdp.eos or len(prefix) == mdp.horizon):
            return reward_of(mdp, question, prefix)
        probs = policy(question, prefix).exp().tolist()
        return sum(p * value(question, (*prefix, token)) for token, p in enumerate(probs))

    assert values == pytest.approx({state: value(*state) for state in values}, abs=1e-12)
    assert (0, ()) in values


def test_rewards_of_tokens_add_up_and_values_count_those_to_come():
    mdp = TokenMDP(2, 2, lambda _, tokens, __: [1.0 + t for t in tokens])
    policy = TabularPolicy(mdp, scale=0)
    assert objective(mdp, policy).item() == pytest.approx(3)  # two tokens, 1.5 each
    assert state_values(mdp, policy) == pytest.approx({(0, ()): 3, (0, (0,)): 1.5, (0, (1,)): 1.5})
    trajectories = enumerate_trajectories(mdp, policy)
    assert trajectories.token_rewards.tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


@settings(max_examples=15)
@given(mdp=mdps, seed=seeds, group_size=st.integers(1, 3))
def test_groups_have_the_probability_of_all_their_orders(mdp, seed, group_size):
    assume(len(responses(mdp)) ** group_size < 5000)
    policy = TabularPolicy(mdp, seed)
    trajectories = enumerate_trajectories(mdp, policy)
    batches = enumerate_batches(mdp, trajectories, group_size=group_size)
    orders = Counter()
    for q, question_prob in enumerate(mdp.question_probs):
        rows = (trajectories.questions == q).nonzero()[:, 0].tolist()
        for group in itertools.product(rows, repeat=group_size):
            probs = (trajectories.probs[row].item() for row in group)
            orders[tuple(sorted(group))] += question_prob * math.prod(probs)
    found = dict(zip(map(tuple, batches.rows.tolist()), batches.probs.tolist(), strict=True))
    assert len(found) == len(batches.rows)
    assert found == pytest.approx({g: p for g, p in orders.items() if p > 0}, rel=1e-12)
    assert batches.probs.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("questions", [1, 2, (0, 1), (1, 0, 1)])
def test_batches_hold_the_questions_that_were_asked_for_and_are_certain_together(questions):
    mdp = TokenMDP(2, 2, zero_one_reward, eos=1, question_probs=(0.25, 0.75))
    trajectories = enumerate_trajectories(mdp, TabularPolicy(mdp))
    batches = enumerate_batches(mdp, trajectories, group_size=2, questions=questions)
    assert batches.probs.sum().item() == pytest.approx(1, abs=1e-12)
    asked = trajectories.questions[batches.rows].unflatten(1, (-1, 2))  # (M, B, G)
    assert (asked[:, :, 0] == asked[:, :, 1]).all()
    first = asked[:, :, 0]
    if isinstance(questions, int):
        assert first.shape[1] == questions
        share = (batches.probs @ first.double().mean(1)).item()
        assert share == pytest.approx(0.75)  # of question 1
    else:
        assert first.sort(1).values.unique(dim=0).tolist() == [sorted(questions)]


# Expectations of gradients.

TINY = TokenMDP(2, 2, hashed_reward, eos=1, question_probs=(0.25, 0.75))
TWO_DRAWN = [
    ((a, b), TINY.question_probs[a] * TINY.question_probs[b]) for a in (0, 1) for b in (0, 1)
]
ONE_DRAWN = [((0,), 0.25), ((1,), 0.75)]


@pytest.mark.parametrize(
    ("questions", "question_lists", "group_size"),
    [(1, ONE_DRAWN, 3), (2, TWO_DRAWN, 2), ((0, 1), [((0, 1), 1.0)], 2), ((1,), [((1,), 1.0)], 3)],
)
@pytest.mark.parametrize("loss", [per_token, clipped_per_token])
def test_expectation_is_that_over_all_ordered_batches(questions, question_lists, group_size, loss):
    policy, old = TabularPolicy(TINY, 1), TabularPolicy(TINY, 2)
    estimator = (over_batch_std, loss)
    got = expected_gradient(
        *estimator, TINY, policy, group_size=group_size, questions=questions, old_policy=old
    )
    expected = plain_expected_gradient(estimator, TINY, policy, group_size, question_lists, old=old)
    assert_close(got, expected)
    assert expected.norm() > 0.01


def test_expectation_under_another_engine_with_truncated_weights_and_a_reference():
    policy, old, engine, reference = (TabularPolicy(TINY, seed) for seed in range(4))
    estimator = (above_mean, with_reference)
    got = expected_gradient(
        *estimator, TINY, policy,
        group_size=2, old_policy=old, sampling_policy=engine, tis_cap=1.2, ref_policy=reference,
    )  # fmt: skip
    expected = plain_expected_gradient(
        estimator, TINY, policy, 2, ONE_DRAWN, old=old, sampling=engine, cap=1.2, ref=reference
    )
    assert_close(got, expected)


@settings(max_examples=20)
@given(mdp=mdps, seed=seeds, group_size=st.integers(2, 3))
def test_leave_one_out_is_unbiased_and_the_group_mean_up_to_a_known_scale(mdp, seed, group_size):
    policy = TabularPolicy(mdp, seed)
    exact = exact_gradient(mdp, policy)
    got = expected_gradient(leave_one_out, per_response, mdp, policy, group_size=group_size)
    assert_close(got, exact)
    got = expected_gradient(above_mean, per_budget, mdp, policy, group_size=group_size)
    assert_close(got, exact * (group_size - 1) / (group_size * mdp.horizon))


@pytest.mark.parametrize("seed", range(3))
def test_the_four_answers_of_lengths_2_2_10_10(seed):
    policy = Committed(seed)
    exact = exact_gradient(COMMITTED, policy)

    def expect(compute_advantages, policy_loss):
        return expected_gradient(compute_advantages, policy_loss, COMMITTED, policy, group_size=4)

    assert_close(expect(rewards_themselves, per_response), exact)
    assert_close(expect(leave_one_out, per_response), exact)
    assert_close(expect(above_mean, per_budget), 0.075 * exact)  # (G-1) / (G·C) = 3/40
    cosine = torch.cosine_similarity(expect(above_mean, per_token), exact, dim=0)
    assert 0.9 < cosine < 0.999


@pytest.mark.parametrize("loss", [per_response, per_token])
@pytest.mark.parametrize("questions", [1, (0, 1)])
def test_classes_of_reward_and_length_give_the_same_as_all_trajectories(loss, questions):
    mdp = TokenMDP(3, 2, zero_one_reward, eos=2, question_probs=(0.25, 0.75))
    policy = TabularPolicy(mdp)
    arguments = (over_batch_std, loss, mdp, policy)
    full = expected_gradient(*arguments, group_size=2, questions=questions)
    collapsed = expected_gradient(*arguments, group_size=2, questions=questions, collapsed=True)
    assert_close(collapsed, full)


def test_classes_make_larger_groups_possible():
    mdp = TokenMDP(5, 5, zero_one_reward, eos=4, question_probs=(0.5, 0.5))
    policy = TabularPolicy(mdp)
    got = expected_gradient(leave_one_out, per_response, mdp, policy, group_size=8, collapsed=True)
    assert_close(got, exact_gradient(mdp, policy), 1e-10)


def test_off_policy_the_unclipped_ratio_of_the_sequence_is_unbiased_and_that_of_tokens_is_not():
    policy, old = TabularPolicy(TINY, 3), TabularPolicy(TINY, 4)
    exact = exact_gradient(TINY, policy)

    def expect(policy_loss):
        return expected_gradient(
            leave_one_out, policy_loss, TINY, policy, group_size=2, old_policy=old
        )

    # The baseline of the old policy's responses does not depend on the response.
    assert_close(expect(sequence_ratio), exact)
    assert (expect(per_response) - exact).norm() > 0.01 * exact.norm()


def gae(rewards, values, mask, *, gae_lambda):
    """Backwards over tokens, responses of the same MDP side by side."""
    columns, running = [], torch.zeros_like(rewards[:, 0])
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + next_values * torch.nn.functional.pad(mask, (0, 1))[:, 1:] - values) * mask
    for t in reversed(range(rewards.shape[1])):
        running = deltas[:, t] + gae_lambda * running
        columns.insert(0, running)
    return torch.stack(columns, dim=1), None


def test_a_critic_is_harmless_at_lambda_1_and_below_only_if_exact():
    mdp = TokenMDP(3, 3, hashed_reward, eos=2, question_probs=(0.5, 0.5))
    policy = TabularPolicy(mdp)
    exact = exact_gradient(mdp, policy)
    values = state_values(mdp, policy)

    def expect(critic, gae_lambda):
        return expected_gradient(
            gae, per_response, mdp, policy,
            group_size=1, critic=critic, advantage_kwargs={"gae_lambda": gae_lambda},
        )  # fmt: skip

    def wrong(question, prefix):
        return question - 0.3 * len(prefix) + 0.2 * sum(prefix)

    assert_close(expect(wrong, 1.0), exact)
    assert_close(expect(lambda question, prefix: values[question, prefix], 0.5), exact)
    assert (expect(wrong, 0.5) - exact).norm() > 0.01 * exact.norm()


def rewards_to_go(rewards, group_size):
    return rewards.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize("by_token", [False, True])
def test_k1_in_the_rewards_adds_the_gradient_of_the_divergence(by_token):
    kl_coef, policy, reference = 0.3, TabularPolicy(TINY, 5), TabularPolicy(TINY, 6)

    def penalized(question, tokens, terminated):
        log_ratio = [
            (a - b).item()
            for a, b in zip(
                token_logprobs(policy, question, tokens),
                token_logprobs(reference, question, tokens),
                strict=True,
            )
        ]
        rewards = [-kl_coef * x for x in log_ratio]
        rewards[-1] += hashed_reward(question, tokens, terminated)
        return rewards

    mdp = TokenMDP(2, 2, penalized, eos=1, question_probs=TINY.question_probs)
    compute_advantages = rewards_to_go if by_token else rewards_themselves
    got = expected_gradient(
        compute_advantages, per_response, mdp, policy, group_size=1, token_rewards=by_token
    )
    divergence = sum(  # KL(π‖π_ref), of whole responses, with gradient
        TINY.question_probs[q] * ours.exp() * (ours - theirs)
        for q, tokens in responses(TINY)
        for ours, theirs in [
            (
                torch.stack(token_logprobs(policy, q, tokens)).sum(),
                torch.stack(token_logprobs(reference, q, tokens)).sum().detach(),
            )
        ]
    )
    assert_close(got, exact_gradient(TINY, policy) - kl_coef * flat_gradient(divergence, policy))


# Verifiers and models.


def test_any_verifier_gives_a_reward():
    texts = ["7", r"\boxed{", "}", ""]
    questions = [Question("a", "3 + 4?", "7"), Question("b", "70 + 7?", ("77", "77.0"))]
    reward = verifier_reward(boxed_math, questions, texts)
    assert reward(0, (1, 0, 2, 3), True) == 1.0
    assert reward(1, (1, 0, 2, 3), True) == 0.0
    assert reward(1, (1, 0, 0, 2, 3), True) == 1.0
    assert reward(0, (0, 3), True) == 0.0
    assert reward(0, (1, 0, 2), False) == 0.0
    graded = verifier_reward(boxed_math, questions, texts, truncated_reward=None)
    assert graded(0, (1, 0, 2), False) == 1.0
    mdp = TokenMDP(4, 4, reward, eos=3, question_probs=(0.5, 0.5))
    policy = TabularPolicy(mdp, scale=0)
    # Only "\boxed{7}" and EOS is right within four tokens, and only for the first question.
    assert objective(mdp, policy).item() == pytest.approx(0.5 / 4**4)


class ModelPolicy(nn.Module):
    """A causal language model that reads the question as its first token."""

    def __init__(self, model, vocab_size):
        super().__init__()
        self.model, self.vocab_size = model, vocab_size

    def forward(self, question, prefix):
        ids = torch.tensor([[question, *prefix]])
        return self.model(input_ids=ids).logits[0, -1, : self.vocab_size].log_softmax(-1)


def test_a_transformers_model_is_a_policy():
    mdp = TokenMDP(3, 2, hashed_reward, eos=2, question_probs=(0.5, 0.5))
    policy = ModelPolicy(random_model("qwen2"), mdp.vocab_size)
    exact = exact_gradient(mdp, policy)
    direction = exact / exact.norm()
    start = nn.utils.parameters_to_vector(policy.parameters()).detach()
    values = []
    for step in (1e-5, -1e-5):
        nn.utils.vector_to_parameters(start + step * direction, policy.parameters())
        values.append(plain_objective(mdp, policy))
    nn.utils.vector_to_parameters(start, policy.parameters())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(exact.norm().item(), rel=1e-6)
    got = expected_gradient(leave_one_out, per_response, mdp, policy, group_size=2)
    assert_close(got, exact, 1e-10)


# Functions that vmap cannot run, and errors.


def branching_per_token(logprobs, old_logprobs, advantages, mask, totals):
    if advantages.abs().max() == 0:
        return 0 * logprobs.sum(), {}
    rewarded = advantages.nonzero()[:, 0].tolist()
    loss, _ = per_token(
        logprobs[rewarded], old_logprobs[rewarded], advantages[rewarded], mask[rewarded], totals
    )
    return loss, {"clip_fraction": loss.item()}


def test_functions_that_branch_on_values_run_batch_by_batch():
    policy = TabularPolicy(TINY)
    branching = expected_gradient(above_mean, branching_per_token, TINY, policy, group_size=3)
    assert_close(branching, expected_gradient(above_mean, per_token, TINY, policy, group_size=3))


def test_an_error_of_the_functions_is_their_own():
    def failing(logprobs, old_logprobs, advantages, mask, totals):
        raise RuntimeError("no such thing")

    def misshapen(logprobs, old_logprobs, advantages, mask, totals):
        return (logprobs @ mask.double()).sum(), {}

    policy = TabularPolicy(TINY)
    with pytest.raises(RuntimeError, match="no such thing"):
        expected_gradient(above_mean, failing, TINY, policy, group_size=3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        expected_gradient(above_mean, misshapen, TINY, policy, group_size=3)


def test_functions_may_write_to_what_they_are_given():
    def in_place(rewards, group_size):
        rewards -= rewards.mean()
        return rewards

    policy = TabularPolicy(TINY)
    got = expected_gradient(in_place, per_response, TINY, policy, group_size=3)
    assert_close(got, exact_gradient(TINY, policy) * 2 / 3)


def test_too_many_batches_are_refused_with_their_number():
    mdp = TokenMDP(4, 2, hashed_reward)
    # 8 out of 16 responses: C(16 + 8 - 1, 8).
    with pytest.raises(ConfigurationError, match=re.escape("16 trajectories give 490314 batches")):
        expected_gradient(above_mean, per_token, mdp, TabularPolicy(mdp), group_size=8)


def test_too_many_trajectories_are_refused():
    mdp = TokenMDP(50, 3, hashed_reward)
    with pytest.raises(ConfigurationError, match="give more than 100000 trajectories"):
        enumerate_trajectories(mdp, lambda q, p: torch.zeros(50).double().log_softmax(-1))


def refused(message, *estimator, **kwargs):
    policy = TabularPolicy(TINY)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        expected_gradient(*estimator, TINY, policy, **{"group_size": 3, **kwargs})


@pytest.mark.parametrize("places", [1, 2])
def test_an_estimator_that_pairs_responses_by_their_places_is_refused(places):
    def above_another(rewards, group_size):
        groups = rewards.reshape(-1, group_size)
        return (groups - groups.roll(places, dims=1)).flatten()

    refused("changes with the order of", above_another, per_response, group_size=4)


def test_an_estimator_that_treats_groups_differently_is_refused():
    def first_group_only(rewards, group_size):
        places = torch.arange(len(rewards)) < group_size
        return above_mean(rewards, group_size) * places

    refused("changes with the order of", first_group_only, per_response, questions=2)


def test_a_loss_that_reads_padding_is_refused():
    def unmasked(logprobs, old_logprobs, advantages, mask, totals):
        return per_response(logprobs, old_logprobs, advantages, mask | True, totals)

    refused("the loss depends on log-probs at padding", above_mean, unmasked)


def test_a_gradient_that_is_not_finite_is_refused_with_the_rewards():
    def over_own_std(rewards, group_size):
        return above_mean(rewards, group_size) / rewards.std()

    refused("not finite for a batch with the rewards [", over_own_std, per_response)


def test_classes_are_refused_where_tokens_matter():
    def by_logprob(logprobs, old_logprobs, advantages, mask, totals):
        return (logprobs.square() * mask).sum() / totals.tokens, {}

    mdp = TokenMDP(3, 2, zero_one_reward, eos=2)
    policy = TabularPolicy(mdp)
    with pytest.raises(ConfigurationError, match="under collapsed=True with their tokens"):
        expected_gradient(above_mean, by_logprob, mdp, policy, group_size=2, collapsed=True)
    for other in ("old_policy", "sampling_policy", "ref_policy"):
        other = {other: TabularPolicy(TINY, 1)}
        refused("collapsed=True with another", above_mean, per_token, collapsed=True, **other)


def test_arguments_that_cannot_be_meant_are_refused():
    estimator = (above_mean, per_response)
    refused("tis_cap=2.0 without a sampling_policy", *estimator, tis_cap=2.0)
    refused("group_size=0, questions=1", *estimator, group_size=0)
    refused("group_size=3, questions=0", *estimator, questions=0)
    refused("group_size=3, questions=(0, 2)", *estimator, questions=(0, 2))
    refused("group_size=3, questions=()", *estimator, questions=())
    refused("policy_loss returned Tensor", above_mean, lambda *args: per_response(*args)[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0, horizon=2"),
        ({"horizon": 0}, "vocab_size=2, horizon=0"),
        ({"eos": 2}, "eos=2 is no token of a vocabulary of 2"),
        ({"question_probs": (0.5, 0.6)}, "sum to 1.1: expected probabilities"),
        ({"question_probs": (1.5, -0.5)}, "question_probs=(1.5, -0.5)"),
        ({"question_probs": ()}, "question_probs=() sum to 0"),
    ],
)
def test_what_is_no_mdp_is_refused(kwargs, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        TokenMDP(**{"vocab_size": 2, "horizon": 2, "reward": hashed_reward, **kwargs})


@pytest.mark.parametrize("reward", [math.nan, -math.inf, [1.0], [1.0, math.inf], [1.0, 2.0, 3.0]])
def test_rewards_must_be_finite_and_as_many_as_tokens(reward):
    mdp = TokenMDP(2, 2, lambda *_: reward)
    with pytest.raises(ConfigurationError, match=re.escape("the reward of tokens (0, 0)")):
        objective(mdp, TabularPolicy(mdp))


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (torch.zeros(2).log_softmax(-1), "torch.float32 of shape (2,): expected float64"),
        (torch.zeros(3).double().log_softmax(-1), "of shape (3,): expected float64"),
        (torch.zeros(2).double(), "probabilities sum to 2.0: expected 1"),
        (torch.full((2,), math.nan).double(), "probabilities sum to nan"),
    ],
)
def test_a_policy_gives_float64_log_probabilities(logprobs, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        enumerate_trajectories(TINY, lambda question, prefix: logprobs)


def test_an_estimator_that_needs_values_asks_for_a_critic():
    mdp = TokenMDP(2, 1, reward=lambda question, tokens, terminated: tokens[0])

    def compute_advantages(rewards, values, mask):
        return rewards - values, rewards

    with pytest.raises(ConfigurationError, match="expected critic="):
        expected_gradient(compute_advantages, None, mdp, TabularPolicy(mdp), group_size=1)
