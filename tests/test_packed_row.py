from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import V, make_rollout
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos.dr_grpo import policy_loss
from lmrl_env import packed_row
from lmrl_env.attention import use_packed_attention
from lmrl_env.batches import micro_batches, token_metrics
from lmrl_env.packed_row import PackedLayout
from lmrl_env.policy import Policy
from lmrl_env.types import BatchTotals

HEADS, KEY_HEADS, D = 4, 2, 8


def layout_of(prompts, index, responses, common=0) -> PackedLayout:
    lengths = (np.array(x, dtype=np.int64) for x in (prompts, index, responses))
    return PackedLayout(*lengths, common=common)


def tokens_of(layout, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    count = layout._row_lengths.sum()
    return [
        (scale * torch.randn(count, heads, D, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def in_prefix_parts(layout, q, k, v):
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return layout.attend(torch.nn.Identity(), *heads_first, 0.3)[0]


def by_copies(layout, q, k, v):
    return layout._attend_by_copies(torch.nn.Identity(), q, k, v, 0.3)


def one_by_one(layout, prompts, index, responses, common, q, k, v):
    """Attend token by token, from what each may see."""
    output = torch.zeros_like(q)
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    beginning = list(range(common))
    rows = [(0, beginning, [])]
    own = [list(range(end + 1 - length + common, end + 1)) for end, length in zip(
        layout.prompt_ends, prompts, strict=True)]  # fmt: skip
    rows += [(tokens[0], range(len(tokens)), beginning) for tokens in own]
    for start, prompt, length in zip(layout.response_starts, index, responses, strict=True):
        rows.append((start, range(length), beginning + own[prompt]))
    for start, columns, before in rows:
        for column in columns:
            seen = [*before, *range(start, start + column + 1)]
            scores = torch.einsum("hd,shd->hs", q[start + column], k[seen]) * 0.3
            output[start + column] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[seen])
    return output


def gradients(output, inputs):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output)
    return torch.autograd.grad((output * weights).sum(), inputs)


layouts = st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
    lambda prompts: st.lists(
        st.tuples(st.integers(0, len(prompts) - 1), st.integers(0, 6)), min_size=1, max_size=20
    ).flatmap(
        lambda rows: st.integers(0, min(prompts) - 1).map(
            lambda common: (prompts, *map(list, zip(*rows, strict=True)), common)
        )
    )
)


@settings(max_examples=100)
@given(layouts, st.booleans(), st.sampled_from([0, 24]))
def test_both_ways_to_attend_give_what_each_token_sees(lengths, rounded, longest_in_front):
    with mock.patch.multiple(
        packed_row,
        TOKENS_AT_ONCE=8,
        FEWEST_ROUNDED=0 if rounded else 999,
        LONGEST_IN_FRONT=longest_in_front,
    ):
        layout = layout_of(*lengths)
    q, k, v = tokens_of(layout)
    assert rounded <= (len(q) % 8 == 0)
    outputs = [f(layout, q, k, v) for f in (in_prefix_parts, by_copies)]
    expected = one_by_one(layout, *lengths, q.detach(), k.detach(), v.detach())
    prompts, _, responses, common = lengths
    real = sum(prompts) + sum(responses) - (len(prompts) - 1) * common
    outputs, expected = [x[:real] for x in outputs], expected[:real]
    for output in outputs:
        torch.testing.assert_close(output.detach(), expected, rtol=0, atol=1e-12)
    for own, other in zip(*(gradients(x, (q, k, v)) for x in outputs), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("common", [0, 13])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # scores up to thousands, at padding too
@pytest.mark.parametrize("prompts", [[150, 14, 60], [24, 14, 19]])
def test_parts_by_their_normalisers_are_the_copies_in_float32(scale, common, prompts):
    index = np.repeat(np.arange(3), 8)
    layout = layout_of(prompts, index, np.random.default_rng(0).integers(0, 57, 24), common)
    inputs = tokens_of(layout, dtype=torch.float32, scale=scale)
    exactly = [x.detach().double().requires_grad_() for x in inputs]
    fast, slow, exact = (
        (output := f(layout, *x), *gradients(output, x))
        for f, x in ((in_prefix_parts, inputs), (by_copies, inputs), (by_copies, exactly))
    )
    for own, other, expected in zip(fast, slow, exact, strict=True):
        assert own.isfinite().all()
        assert (own - expected).norm() <= 3 * (other - expected).norm()
        assert (own - expected).norm() <= 5e-6 * scale * expected.norm()


def test_copies_serve_values_of_another_size_than_the_keys():
    layout = layout_of([3], [0, 0], [2, 4])
    q, k, v = tokens_of(layout)
    narrow = in_prefix_parts(layout, q, k, v[..., :5])
    torch.testing.assert_close(narrow, in_prefix_parts(layout, q, k, v)[..., :5])


class NoWaiting(TorchDispatchMode):
    """Fails on what a GPU would have to be waited for."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert not any(name in str(op) for name in self.WAITS), op
        if "index" in str(op):
            indices = [x for x in args[1:2] if isinstance(x, list | tuple)]
            assert not any(t is not None and t.dtype == torch.bool for x in indices for t in x), op
        return op(*args, **(kwargs or {}))


def test_nothing_in_a_micro_batch_waits_for_the_device():
    config = Qwen2Config(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    use_packed_attention(model)  # Transformers' own masks wait
    policy = Policy(model, V)
    rollout = make_rollout([5, 4, 6], [3, 6, 2, 5, 4, 6], group_size=2)
    cuts = [np.arange(4), np.arange(4, 6), np.zeros(0, dtype=np.int64)]
    advantages = torch.linspace(-1, 1, 6)
    with NoWaiting():
        for micro in micro_batches(rollout, cuts, 2, "cpu"):
            logprobs, entropy = policy(micro.tokens, temperature=1.0, with_entropy=True)
            old, totals = logprobs.detach(), BatchTotals(6, 26, 6)
            loss, metrics = policy_loss(logprobs, old, micro.part(advantages), micro.mask, totals)
            metrics |= token_metrics(micro, logprobs, old, entropy, totals)
            loss.backward()
    assert all(p.grad is not None for p in model.model.parameters())


def test_a_boolean_index_would_be_noticed():
    with NoWaiting(), pytest.raises(AssertionError):
        torch.ones(3)[torch.ones(3, dtype=torch.bool)]
    with NoWaiting(), pytest.raises(AssertionError):
        torch.ones(3).sum().item()
