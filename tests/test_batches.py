from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos.dr_grpo import compute_advantages, policy_loss
from lmrl_env.batches import micro_batch_rows, micro_batches, token_metrics
from lmrl_env.policy import Policy
from lmrl_env.rollout import Rollout
from lmrl_env.types import BatchTotals

V, K = 11, 6


def make_rollout(prompt_lengths, response_lengths, group_size, seed=0) -> Rollout:
    """Return a batch of random tokens."""
    random = np.random.default_rng(seed)
    prompts = np.repeat(np.asarray(prompt_lengths), group_size)
    lengths = np.asarray(response_lengths)
    n = len(lengths)
    prompt_ids = np.zeros((n, prompts.max()), np.int32)
    for i in range(0, n, group_size):
        prompt_ids[i : i + group_size, : prompts[i]] = random.integers(0, V, prompts[i])
    mask = np.arange(K) < lengths[:, None]
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_lengths=prompts,
        response_ids=np.where(mask, random.integers(0, V, (n, K)), 0).astype(np.int32),
        response_lengths=lengths,
        mask=mask,
        sampling_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        rewards=random.integers(0, 2, n).astype(np.float64),
        dense_rewards=np.zeros((n, K)),
        terminated=np.ones(n, bool),
        question_ids=np.arange(n) // group_size,
        versions=np.zeros(n, np.int64),
        responses=[""] * n,
        answers=[""] * n,
        verifier_status=[""] * n,
        scores=[{}] * n,
        sample_seconds=0.0,
        env_seconds=0.0,
    )


batches = st.integers(1, 4).flatmap(
    lambda groups: st.tuples(
        st.lists(st.integers(1, 9), min_size=groups, max_size=groups),
        st.lists(st.integers(1, K), min_size=2 * groups, max_size=2 * groups),
    )
)


@given(batches, st.integers(1, 60))
def test_every_row_is_in_one_micro_batch_of_at_most_the_token_budget(lengths, max_tokens):
    rollout = make_rollout(*lengths, group_size=2)
    rows = np.arange(len(rollout.rewards))
    cuts = micro_batch_rows(rollout, rows, 2, max_tokens)
    assert sorted(np.concatenate(cuts)) == list(rows)
    for cut in cuts:
        prompts = {row // 2: rollout.prompt_lengths[row] for row in cut}
        tokens = sum(prompts.values()) + rollout.response_lengths[cut].sum()
        assert tokens <= max_tokens or len(cut) == 1


def test_micro_batches_are_as_full_as_their_order_allows():
    rollout = make_rollout([5, 5], [3, 3, 3, 3], group_size=2)
    # A group costs 5 + 3 + 3 = 11, and the next group's first row 8 more.
    cuts = micro_batch_rows(rollout, np.arange(4), 2, max_tokens=18)
    assert [cut.tolist() for cut in cuts] == [[0, 1], [2, 3]]
    cuts = micro_batch_rows(rollout, np.arange(4), 2, max_tokens=19)
    assert [cut.tolist() for cut in cuts] == [[0, 1, 2], [3]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return Policy(Qwen2ForCausalLM(config).double(), V)


def gradient(policy, rollout, max_tokens, empty=0):
    """Return the gradient of a Dr. GRPO step that is cut by a token budget."""
    policy.zero_grad()
    advantages = compute_advantages(torch.from_numpy(rollout.rewards), 2)
    totals = BatchTotals(len(rollout.rewards), int(rollout.mask.sum()), K)
    rows = np.arange(len(rollout.rewards))
    cuts = [*micro_batch_rows(rollout, rows, 2, max_tokens), *[rows[:0]] * empty]
    sums: dict[str, float] = {}
    for micro in micro_batches(rollout, cuts, 2, "cpu"):
        logprobs, entropy = policy(micro.tokens, temperature=0.7, with_entropy=True)
        old = logprobs.detach() - 0.1
        loss, metrics = policy_loss(logprobs, old, advantages[micro.rows], micro.mask, totals)
        loss.backward()
        for name, share in (metrics | token_metrics(micro, logprobs, old, entropy, totals)).items():
            sums[name] = sums.get(name, 0.0) + share.item()
    return torch.cat([p.grad.ravel() for p in policy.parameters()]), sums


@given(batches, st.integers(1, 60), st.integers(0, 2))
@settings(max_examples=25)
def test_gradient_and_metrics_do_not_depend_on_the_micro_batches(
    policy, lengths, max_tokens, empty
):
    rollout = make_rollout(*lengths, group_size=2)
    whole, sums = gradient(policy, rollout, 10**9)
    parts, part_sums = gradient(policy, rollout, max_tokens, empty)
    assert (parts - whole).norm() <= 1e-10 * max(1e-12, whole.norm())
    assert part_sums == pytest.approx(sums, abs=1e-10)


def test_an_empty_micro_batch_adds_nothing():
    rollout = make_rollout([3], [2, 4], group_size=2)
    (micro,) = micro_batches(rollout, [np.zeros(0, np.int64)], 2, "cpu")
    assert not micro.mask.any()
    assert micro.last


def test_micro_batches_tell_what_their_own_prompts_begin_with():
    rollout = make_rollout([20, 24, 22, 20], [3] * 8, group_size=2)
    template = np.arange(20) % V
    rollout.prompt_ids[:6, :20] = template  # the third question's rows too, but not the fourth's
    rollout.prompt_ids[4:6, 18] += 1
    cuts = [np.arange(4), np.arange(6), np.arange(2), np.arange(4, 8)]
    micros = list(micro_batches(rollout, cuts, 2, "cpu"))
    # 20 tokens are alike, but one of each prompt has to follow; alone, a prompt shares nothing.
    assert [micro.tokens.lengths.common for micro in micros] == [19, 18, 0, 0]
