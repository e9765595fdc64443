"""Values of the divergence estimators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmrl_env.kl import k1, k2, k3

F64 = {"dtype": torch.float64}


def test_values_are_those_by_hand():
    # π/π_ref = 1, 2, 1/4, so that π_ref/π = 1, 1/2, 4.
    x = torch.tensor([[0.0, math.log(2), -math.log(4)]], **F64)
    assert k1(x).tolist() == [[0.0, math.log(2), -math.log(4)]]
    assert k2(x)[0].tolist() == pytest.approx([0, math.log(2) ** 2 / 2, math.log(4) ** 2 / 2])
    expected = [0, 1 / 2 - 1 + math.log(2), 4 - 1 - math.log(4)]
    assert k3(x)[0].tolist() == pytest.approx(expected)


def test_derivatives_are_those_by_hand():
    x = torch.tensor([0.0, math.log(2), -math.log(4)], **F64, requires_grad=True)
    for estimator, expected in (
        (k1, [1, 1, 1]),
        (k2, [0, math.log(2), -math.log(4)]),
        (k3, [0, 1 - 1 / 2, 1 - 4]),
    ):
        (gradient,) = torch.autograd.grad(estimator(x).sum(), x)
        assert gradient.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("x", [1e-4, -1e-4, 3e-6])
def test_k3_keeps_its_digits_near_zero_in_float32(x):
    # x²/2 - x³/6; exp(-x) - 1 would have lost them all.
    assert k3(torch.tensor(x)).item() == pytest.approx(x**2 / 2 - x**3 / 6, abs=2e-11)


@given(st.floats(-20, 20))
def test_k2_and_k3_are_never_negative_and_all_are_zero_at_equal_policies(x):
    value = torch.tensor(x, **F64)
    assert k2(value) >= 0 and k3(value) >= 0
    assert k1(value * 0) == k2(value * 0) == k3(value * 0) == 0


@given(st.lists(st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)), min_size=2, max_size=5))
def test_under_the_policy_the_means_of_k1_and_k3_are_the_divergence(weights):
    policy = [a / sum(a for a, _ in weights) for a, _ in weights]
    reference = [b / sum(b for _, b in weights) for _, b in weights]
    divergence = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    p = torch.tensor(policy, **F64)
    x = p.log() - torch.tensor(reference, **F64).log()
    for estimator in (k1, k3):
        assert (p * estimator(x)).sum().item() == pytest.approx(divergence, abs=1e-12)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_are_kept_and_the_input_is_left_alone(estimator, dtype):
    x = torch.full((2, 3), 0.5, dtype=dtype)
    result = estimator(x)
    assert result.shape == (2, 3) and result.dtype == dtype
    assert (x == 0.5).all()
