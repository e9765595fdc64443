from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.engines.sampler import draw_tokens, row_uniforms
from lmrl_env.types import Sampling

# Probabilities 0.1, 0.2, 0.3, 0.4, so that the distribution function steps at 0.1, 0.3, 0.6, 1.
PROBS = [0.1, 0.2, 0.3, 0.4]
HIGHEST = 1 - 2**-53  # the largest float64 that a generator of [0, 1) returns


def draw(logits, uniforms, **sampling):
    logits = torch.as_tensor(logits).expand(len(uniforms), -1)
    tokens, logprobs = draw_tokens(
        logits, torch.tensor(uniforms, dtype=torch.float64), Sampling(1, **sampling)
    )
    return tokens.tolist(), logprobs.exp().tolist()


def test_a_uniform_picks_the_token_in_whose_share_it_falls():
    uniforms = [0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, HIGHEST]
    tokens, probs = draw(np.log(PROBS), uniforms)
    assert tokens == [0, 0, 1, 1, 2, 2, 3, 3]
    assert probs == pytest.approx([PROBS[token] for token in tokens], rel=1e-6)


def test_temperature_divides_the_logits():
    # At temperature 1/2 probabilities are squared: 0.01, 0.04, 0.09, 0.16, of 0.30.
    tokens, probs = draw(np.log(PROBS), [0.03, 0.1, 0.4, 0.5], temperature=0.5)
    assert tokens == [0, 1, 2, 3]
    assert probs == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30], rel=1e-6)


def test_temperature_zero_takes_the_likeliest_token_with_its_untempered_probability():
    tokens, probs = draw(np.log(PROBS), [0.0, 0.5], temperature=0, top_k=1)
    assert tokens == [3, 3]
    assert probs == pytest.approx([0.4, 0.4], rel=1e-6)


def test_top_k_keeps_the_likeliest_tokens_renormalised():
    tokens, probs = draw(np.log(PROBS), [0.0, 0.42, 0.44, HIGHEST], top_k=2)
    assert tokens == [2, 2, 3, 3]
    assert probs == pytest.approx([3 / 7, 3 / 7, 4 / 7, 4 / 7], rel=1e-6)


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    tokens, probs = draw(np.log(PROBS), [0.0, 0.23, HIGHEST], top_p=0.75)  # 0.4 + 0.3 < 0.75
    assert tokens == [1, 2, 3]
    assert probs == pytest.approx([2 / 9, 3 / 9, 4 / 9], rel=1e-6)


def test_top_p_counts_the_mass_that_top_k_leaves():
    # Of 3/7 and 4/7 the latter alone reaches one half.
    assert draw(np.log(PROBS), [0.0], top_k=2, top_p=0.5) == ([3], [pytest.approx(1)])


@settings(max_examples=50)
@given(
    st.lists(st.floats(-30, 30) | st.just(-np.inf), min_size=1, max_size=6),
    st.just(0.0) | st.just(HIGHEST) | st.floats(0, HIGHEST),
)
def test_an_impossible_token_is_never_drawn(logits, uniform):
    logits.insert(0, -np.inf)
    logits.insert(2, 1.0)
    logits.append(-np.inf)
    (token,), (prob,) = draw(logits, [uniform])
    assert np.isfinite(logits[token])
    assert prob > 0


def test_uniforms_depend_on_the_seed_and_not_on_how_many_are_drawn():
    np.testing.assert_array_equal(row_uniforms(7, 5), row_uniforms(7, 9)[:5])
    assert len({row_uniforms(seed, 1)[0] for seed in range(1000)}) == 1000
    assert abs(np.mean([row_uniforms(seed, 1)[0] for seed in range(1000)]) - 0.5) < 0.03
