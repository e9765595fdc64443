from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import make_rollout

from lmrl_env.errors import ConfigurationError
from lmrl_env.importance import mismatch_metrics, reweight, truncated_importance_weights

log = math.log
F64 = {"dtype": torch.float64}

# π_old/π_engine is 1, 3, 1/2 | 5, 1/4, 2.
SAMPLING = torch.tensor([[1 / 2, 1 / 4, 1 / 2], [1 / 8, 1 / 2, 1 / 4]], **F64).log()
OLD = torch.tensor([[1 / 2, 3 / 4, 1 / 4], [5 / 8, 1 / 8, 1 / 2]], **F64).log()


def test_weights_are_the_ratios_of_old_to_sampling_probability_up_to_the_cap():
    weights = truncated_importance_weights(OLD, SAMPLING, 2.0)
    expected = torch.tensor([[1, 2, 1 / 2], [2, 1 / 4, 2]], **F64)
    assert torch.allclose(weights, expected, rtol=1e-12)
    weights = truncated_importance_weights(OLD, SAMPLING, 4.0)
    assert weights[0, 1].item() == pytest.approx(3) and weights[1, 0].item() == pytest.approx(4)


def test_the_weight_of_a_sequence_is_the_ratio_of_its_actions_together_up_to_the_cap():
    mask = torch.tensor([[True, True, True], [True, False, True]])
    weights = truncated_importance_weights(OLD, SAMPLING, 9.0, level="sequence", mask=mask)
    expected = torch.tensor([[3 / 2] * 3, [9.0] * 3], **F64)
    assert torch.allclose(weights, expected, rtol=1e-12)
    weighted = reweight(torch.ones(2, **F64), OLD, SAMPLING, 1e9, level="sequence", mask=mask)
    assert torch.allclose(weighted[1], torch.tensor([10.0] * 3, **F64), rtol=1e-12)


def test_what_stands_where_nothing_was_an_action_does_not_weigh():
    mask = torch.tensor([[True, True, False]])
    foreign = torch.tensor([[0.0, 0.0, torch.inf]], **F64)
    gap = torch.full((1, 3), log(2), **F64)
    weights = truncated_importance_weights(gap, gap * 0 - foreign, 9.0, level="sequence", mask=mask)
    assert torch.allclose(weights, torch.full((1, 3), 4.0, **F64))


def test_a_sequence_without_a_mask_is_refused():
    with pytest.raises(ConfigurationError, match="without a mask"):
        reweight(torch.ones(2, **F64), OLD, SAMPLING, 2.0, level="sequence")


def test_no_gradient_goes_through_the_weights():
    old = OLD.clone().requires_grad_()
    assert not truncated_importance_weights(old, SAMPLING, 2.0).requires_grad
    assert not reweight(torch.ones(2, **F64), old, SAMPLING, 2.0).requires_grad


def test_advantages_of_responses_and_of_tokens_are_multiplied_token_by_token():
    by_response = reweight(torch.tensor([2.0, -1.0], **F64), OLD, SAMPLING, 2.0)
    expected = torch.tensor([[2, 4, 1], [-2, -1 / 4, -2]], **F64)
    assert torch.allclose(by_response, expected, rtol=1e-12)
    advantages = torch.tensor([[1.0, 2, 3], [4, 5, 6]], **F64)
    by_token = reweight(advantages, OLD, SAMPLING, 2.0)
    expected = torch.tensor([[1, 4, 3 / 2], [8, 5 / 4, 12]], **F64)
    assert torch.allclose(by_token, expected, rtol=1e-12)
    assert advantages.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_square_batch_is_not_taken_for_advantages_of_tokens():
    zeros = torch.zeros(2, 2)
    weighted = reweight(torch.tensor([1.0, -1.0]), zeros, zeros, 2.0)
    assert weighted.tolist() == [[1, 1], [-1, -1]]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def batch_of(mask, sampling_logprobs):
    mask = np.asarray(mask, dtype=bool)
    batch = make_rollout([3], [mask.shape[1]] * len(mask), len(mask))
    sampling = np.asarray(sampling_logprobs, dtype=np.float32)
    return batch._replace(mask=mask, sampling_logprobs=sampling)


def test_mismatch_is_measured_over_action_tokens_as_by_hand(accelerator):
    # Action tokens: π_engine/π_old = 1, 2, 1/4, so that w = 1, 1/2, 4.
    sampling = [[-1.0, -1.0, -9.0], [-1.0, -5.0, -5.0]]
    old = torch.tensor([[-1.0, -1 - log(2), 3.0], [-1 + log(4), 0.0, 0.0]])
    batch = batch_of([[1, 1, 0], [1, 0, 0]], sampling)
    k3 = [0, 1 / 2 - 1 + log(2), 4 - 1 - log(4)]
    assert mismatch_metrics(accelerator, batch, old) == pytest.approx(
        {
            "mismatch/logprob_abs_mean": (log(2) + log(4)) / 3,
            "mismatch/logprob_abs_p99": log(4),
            "mismatch/k3": sum(k3) / 3,
            "mismatch/effective_sample_size": (11 / 2) ** 2 / (3 * (1 + 1 / 4 + 16)),
        },
        rel=1e-5,
    )


def test_the_99th_percentile_is_that_of_sorted_gaps(accelerator):
    gaps = np.random.default_rng(0).permutation(np.arange(1, 201)).reshape(4, 50) / 1000
    batch = batch_of(np.ones((4, 50)), np.where(np.arange(50) % 2, gaps, -gaps))
    found = mismatch_metrics(accelerator, batch, torch.zeros(4, 50))
    assert found["mismatch/logprob_abs_p99"] == pytest.approx(0.198)


def test_equal_policies_have_no_mismatch_and_a_batch_without_actions_has_no_figures(accelerator):
    same = batch_of([[1, 1]], [[-1.0, -2.0]])
    found = mismatch_metrics(accelerator, same, torch.tensor([[-1.0, -2.0]]))
    assert list(found.values()) == [0.0, 0.0, 0.0, 1.0]
    none = mismatch_metrics(accelerator, batch_of([[0, 0]], [[-1.0, -2.0]]), torch.zeros(1, 2))
    assert none.keys() == found.keys() and set(none.values()) == {None}


@given(gaps=st.lists(st.floats(-3, 3), min_size=1, max_size=12))
@settings(max_examples=30)
def test_the_effective_sample_size_is_a_share(accelerator, gaps):
    found = mismatch_metrics(
        accelerator, batch_of([[1] * len(gaps)], [gaps]), torch.zeros(1, len(gaps))
    )
    share = found["mismatch/effective_sample_size"]
    assert 1 / len(gaps) - 1e-6 <= share <= 1 + 1e-6
