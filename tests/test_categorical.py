from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.categorical import log_prob_and_entropy

F64 = {"dtype": torch.float64}


def composed(logits, values, temperature):
    """The two by torch's own operations and their derivatives, in float64."""
    probs = (logits.double() / temperature).softmax(-1)
    distribution = torch.distributions.Categorical(probs)
    return distribution.log_prob(values), distribution.entropy()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 999),
    t=st.integers(1, 4),
    v=st.integers(1, 6),
    temperature=st.sampled_from((0.5, 1.0, 2.0)),
    used=st.sampled_from(((1, 0), (0, 1), (1, 1))),
)
def test_values_and_gradients_are_those_of_composed_operations(seed, t, v, temperature, used):
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(t, v, generator=generator, **F64)).requires_grad_()
    before = logits.detach().clone()
    values = torch.randint(v, (t,), generator=generator)
    weights = torch.randn(2, t, generator=generator, **F64) * torch.tensor(used)[:, None]

    def gradient(results):
        loss = sum((w * x).sum() for w, x, use in zip(weights, results, used, strict=True) if use)
        return torch.autograd.grad(loss, logits)[0]

    got = log_prob_and_entropy(logits, values, temperature)
    expected = composed(logits, values, temperature)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient(got), gradient(expected), rtol=0, atol=1e-10)
    assert torch.equal(logits, before)
    alone, none = log_prob_and_entropy(logits, values, temperature, with_entropy=False)
    assert none is None and torch.equal(alone, got[0])
    if used == (1, 0):
        expected = gradient(composed(logits, values, temperature))
        torch.testing.assert_close(gradient((alone, None)), expected, rtol=0, atol=1e-10)


def test_two_outcomes_are_as_by_hand():
    # π = 1/4, 3/4 at temperature 2; ∂ log π(0) = (3/4, -3/4) / 2, and
    # ∂H/∂z₀ = -1/4 (log 1/4 + H) with H = log 4 - 3/4 log 3, the other its opposite.
    logits = torch.tensor([[0.0, 2 * math.log(3)]], **F64, requires_grad=True)
    logprob, entropy = log_prob_and_entropy(logits, torch.tensor([0]), 2.0)
    h = math.log(4) - 3 / 4 * math.log(3)
    assert logprob.item() == pytest.approx(-math.log(4))
    assert entropy.item() == pytest.approx(h)
    (gradient,) = torch.autograd.grad(logprob.sum(), logits, retain_graph=True)
    assert gradient.tolist()[0] == pytest.approx([3 / 8, -3 / 8])
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    slope = -(h - math.log(4)) / 4 / 2
    assert gradient.tolist()[0] == pytest.approx([slope, -slope])


def test_bfloat16_is_computed_in_float32_and_has_a_gradient_of_its_own_kind():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = torch.tensor([1, 2, 3])
    got = log_prob_and_entropy(logits.requires_grad_(), values, 1.0)
    assert got[0].dtype == got[1].dtype == torch.float32
    expected = composed(logits, values, 1.0)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(got[0].sum(), logits)
    assert gradient.dtype == torch.bfloat16


def test_autocast_makes_neither_coarser():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([1, 2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = log_prob_and_entropy(logits, values, 1.0)
    for x, expected in zip(got, composed(logits, values, 1.0), strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-5)
