from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.errors import ConfigurationError
from lmrl_env.scores import bootstrap_means, interval, majority_at_k, pass_at_k


def mean_over_subsets(n, k, value):
    """Return the mean of a value over all k-subsets of range(n), by listing them."""
    values = [Fraction(value(subset)) for subset in combinations(range(n), k)]
    return float(sum(values) / len(values))


@pytest.mark.parametrize("n", range(1, 11))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            listed = mean_over_subsets(n, k, lambda subset, c=c: min(subset) < c)
            assert pass_at_k(n, c, k) == listed


def test_pass_at_k_is_exact_where_floats_would_cancel():
    # 1 - C(9999, 1) / C(10000, 1); and k = n - 1 of which one sample is right: it is missed once
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(1000, 1, 999) == 0.999
    assert 1 - pass_at_k(2000, 1000, 1000) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses_numbers_out_of_range(n, c, k):
    with pytest.raises(ConfigurationError, match=f"pass@{k} of {n} samples of which {c}"):
        pass_at_k(n, c, k)


def plurality(votes, right):
    """Return the share of right answers among the most frequent ones, from the definition."""
    is_right = {vote for vote, r in zip(votes, right, strict=True) if r}

    def value(subset):
        counts = Counter(votes[i] for i in subset if votes[i] is not None)
        winners = [vote for vote in counts if counts[vote] == max(counts.values())]
        return Fraction(sum(vote in is_right for vote in winners), max(1, len(winners)))

    return value


@settings(max_examples=150)
@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=8), st.data())
def test_majority_at_k_is_the_mean_over_all_subsets(votes, data):
    right_answers = data.draw(st.sets(st.sampled_from("abcd")))
    right = [vote in right_answers for vote in votes]
    scores = majority_at_k(votes, right)
    for k, score in enumerate(scores, start=1):
        listed = mean_over_subsets(len(votes), k, plurality(votes, right))
        assert score == pytest.approx(listed, abs=1e-15)


def test_a_tie_is_shared_and_no_vote_scores_nothing():
    assert majority_at_k(["4", "5"], [True, False]) == [0.5, 0.5]
    assert majority_at_k([None, "4"], [False, True]) == [0.5, 1.0]
    assert majority_at_k([None, None], [False, False]) == [0.0, 0.0]
    # three answers of two votes each; the right one wins a third of the full tie
    assert majority_at_k(list("aabbcc"), [True] * 2 + [False] * 4)[-1] == 1 / 3


def test_a_large_majority_wins_more_often_the_more_samples_vote():
    scores = majority_at_k(["a"] * 12 + ["b"] * 8, [True] * 12 + [False] * 8)
    assert scores[0] == 0.6 and scores[-1] == 1.0
    assert all(later >= earlier for earlier, later in zip(scores[::2], scores[2::2], strict=False))


def test_the_bootstrap_has_mean_and_variance_of_resampled_questions():
    values = np.array([0.0, 0.25, 0.25, 1.0, 0.5])
    means = bootstrap_means(values, resamples=200_000, seed=1)
    # a mean of 5 draws with replacement from these values
    assert means.mean() == pytest.approx(values.mean(), abs=5 * 0.15 / 200_000**0.5)
    assert means.var() == pytest.approx(values.var() / 5, rel=0.02)


def test_the_bootstrap_of_two_values_is_binomial():
    # 3 of 10 questions are right: resampled counts are binomial(10, 0.3)
    means = bootstrap_means([1.0] * 3 + [0.0] * 7, resamples=100_000, seed=0)
    counts = np.bincount(np.rint(10 * means).astype(int), minlength=11)
    expected = [
        0.0282475249, 0.121060821, 0.2334744405, 0.266827932, 0.200120949, 0.1029193452,
        0.036756909, 0.009001692, 0.0014467005, 0.000137781, 0.0000059049,
    ]  # fmt: skip
    np.testing.assert_allclose(counts / 100_000, expected, atol=0.006)


def test_numbers_of_one_question_are_resampled_together():
    values = np.random.default_rng(0).random(40)
    means = bootstrap_means(np.column_stack([values, 1 - values, values]), resamples=300)
    np.testing.assert_allclose(means[:, 0] + means[:, 1], 1)
    np.testing.assert_array_equal(means[:, 0], means[:, 2])
    assert means[:, 0].std() > 0.01


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    values = np.random.default_rng(0).random(30)
    first, again, other = (bootstrap_means(values, resamples=700, seed=s) for s in (3, 3, [3, 1]))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(first) == 700


@pytest.mark.parametrize("kind", ["normal", "right or wrong"])
def test_a_95_percent_interval_covers_the_truth_95_percent_of_the_time(kind):
    random = np.random.default_rng(5)
    covered = 0
    for i in range(1000):
        values = random.normal(0.3, 1, 80) if kind == "normal" else random.random(80) < 0.3
        low, high = interval(bootstrap_means(values, resamples=600, seed=i))
        covered += low <= 0.3 <= high
    assert 920 <= covered <= 980


def test_an_interval_of_another_level_leaves_its_share_outside():
    means = np.random.default_rng(0).normal(size=100_000)
    low, high = interval(means, level=0.8)
    assert np.mean((means < low) | (means > high)) == pytest.approx(0.2, abs=1e-4)
    assert np.mean(means < low) == pytest.approx(0.1, abs=1e-4)


def test_no_question_has_no_interval():
    with pytest.raises(ConfigurationError, match="0 questions"):
        bootstrap_means([])
