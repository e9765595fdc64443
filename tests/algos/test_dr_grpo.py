from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algos.dr_grpo import compute_advantages, policy_loss
from lmrl_env.errors import ConfigurationError
from lmrl_env.types import BatchTotals

LOG = math.log


def masks(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_advantages_are_rewards_above_the_mean_of_their_own_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.25])
    expected = [2 / 3, -1 / 3, -1 / 3, 0.25, 0.25, -0.5]
    assert compute_advantages(rewards, 3).tolist() == pytest.approx(expected)
    assert rewards.tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 0.25]


def test_rewards_that_form_no_groups_are_refused():
    with pytest.raises(ConfigurationError, match=re.escape("5 rewards do not form groups of")):
        compute_advantages(torch.zeros(5), 2)


def test_on_policy_the_loss_is_minus_the_advantage_sum_over_a_constant():
    # A = (2/3, -1/3, -1/3), lengths (2, 1, 2): Σ Σ A = 4/3 - 1/3 - 2/3 = 1/3; N·K = 3·4.
    advantages = compute_advantages(torch.tensor([1.0, 0.0, 0.0]), 3)
    logprobs = torch.full((3, 2), LOG(0.5), requires_grad=True)
    mask = masks([2, 1, 2], 2)
    loss, metrics = policy_loss(logprobs, logprobs.detach(), advantages, mask, BatchTotals(3, 5, 4))
    assert loss.item() == pytest.approx(-1 / 36)
    loss.backward()
    # ∂loss/∂logprob = -A·ratio/(N·K), zero outside the mask.
    expected = [[-2 / 36, -2 / 36], [1 / 36, 0.0], [1 / 36, 1 / 36]]
    assert torch.allclose(logprobs.grad, torch.tensor(expected))
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/approx_kl"] == 0


def test_clipping_stops_the_gradient_only_where_the_ratio_ran_ahead_of_the_advantage():
    # Ratios 1.5, 0.5, 1.5, 0.5 with A = +1, +1, -1, -1: clipped are the first and the last.
    logprobs = torch.log(torch.tensor([[1.5], [0.5], [1.5], [0.5]])).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    totals = BatchTotals(4, 4, 1)
    loss, metrics = policy_loss(
        logprobs, torch.zeros(4, 1), advantages, torch.ones(4, 1).bool(), totals
    )
    # Terms: min(1.5, 1.2), min(0.5, 0.8), min(-1.5, -1.2), min(-0.5, -0.8).
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    loss.backward()
    assert logprobs.grad[:, 0].tolist() == pytest.approx([0.0, -0.5 / 4, 1.5 / 4, 0.0])
    assert metrics["policy/clip_fraction"] == 0.5
    kl = sum(r - 1 - LOG(r) for r in (1.5, 0.5, 1.5, 0.5)) / 4
    assert metrics["policy/approx_kl"].item() == pytest.approx(kl)


def test_the_clip_range_may_be_wider_above_than_below():
    logprobs = torch.log(torch.tensor([[1.25], [1.25]]))
    args = (torch.zeros(2, 1), torch.tensor([1.0, 1.0]), torch.ones(2, 1).bool())
    totals = BatchTotals(2, 2, 1)
    assert policy_loss(logprobs, *args, totals)[0].item() == pytest.approx(-1.2)
    wide = policy_loss(logprobs, *args, totals, clip_eps_high=0.28)[0]
    assert wide.item() == pytest.approx(-1.25)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=7),
    data=st.data(),
    extra=st.integers(0, 3),
)
def test_shares_of_any_cut_any_order_and_any_padding_sum_to_the_same_loss_and_gradient(
    lengths, data, extra
):
    n, width = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    old = torch.randn(n, width, generator=generator, dtype=torch.float64)
    shift = torch.randn(n, width, generator=generator, dtype=torch.float64) / 3
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    totals = BatchTotals(n, sum(lengths), 8)
    mask = masks(lengths, width)

    whole = (old + shift).requires_grad_()
    loss, metrics = policy_loss(whole, old, advantages, mask, totals)
    loss.backward()

    order = data.draw(st.permutations(range(n)))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1))))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    sliced = (old + shift).requires_grad_()
    pad = (0, extra)
    shares = [
        policy_loss(
            torch.nn.functional.pad(sliced[rows], pad),
            torch.nn.functional.pad(old[rows], pad),
            advantages[rows],
            torch.nn.functional.pad(mask[rows], pad),
            totals,
        )
        for rows in parts
    ]
    sum(share for share, _ in shares).backward()
    assert sum(share.item() for share, _ in shares) == pytest.approx(loss.item(), abs=1e-12)
    assert torch.allclose(sliced.grad, whole.grad, atol=1e-12)
    for name, value in metrics.items():
        total = sum(share[name].item() for _, share in shares)
        assert total == pytest.approx(value.item(), abs=1e-6)  # counts are float32
