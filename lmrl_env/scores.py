"""Scores of sampled answers: pass@k, majority@k, and confidence intervals over questions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from fractions import Fraction
from math import comb

import numpy as np
import numpy.typing as npt

from lmrl_env.errors import ConfigurationError

_RESAMPLES_AT_ONCE = 500


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that at least one of k samples is right, without bias.

    pass@k = 1 - C(n - c, k) / C(n, k)

    It is computed in whole numbers and rounded once. Chen et al. 2021, arXiv:2107.03374.

    >>> pass_at_k(n=4, c=1, k=2)
    0.5

    Args:
        n: samples that were drawn.
        c: how many of them are right, 0 to n.
        k: 1 to n.

    Raises:
        ConfigurationError: if c or k is out of its range.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ConfigurationError(
            f"pass@{k} of {n} samples of which {c} are right: expected 0 <= c <= n and "
            "1 <= k <= n; draw more samples, or lower k"
        )
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))


def majority_at_k(votes: Sequence[Hashable | None], right: Sequence[bool]) -> list[float]:
    """Return for each k how often the most frequent answer of k samples is right.

    majority@k = mean over all k-subsets of (right answers among the most frequent ones) / (number
    of the most frequent ones)

    So a tie is shared, and a subset in which no sample answers scores 0. All C(n, k) subsets are
    counted, exactly, by how often the most frequent answer occurs. After the majority vote of
    Wang et al. 2022, arXiv:2203.11171.

    >>> majority_at_k(["4", "4", "5"], [True, True, False])
    [0.6666666666666666, 0.6666666666666666, 1.0]

    Args:
        votes: n answers; those that are equal are one answer, and None is no vote.
        right: n; an answer is right if it is so anywhere.

    Returns:
        n numbers; the first is of k = 1.
    """
    n = len(votes)
    counts = Counter(vote for vote in votes if vote is not None)
    is_right = {vote for vote, r in zip(votes, right, strict=True) if r}
    totals = [Fraction(0)] * (n + 1)
    for top in range(1, max(counts.values(), default=0) + 1):
        frequent = [vote for vote in counts if counts[vote] >= top]
        rest = n - sum(counts[vote] for vote in frequent)
        # (size of the subset, answers that occur `top` times) -> (subsets, right ones summed)
        ways = {(size, 0): (comb(rest, size), 0) for size in range(rest + 1)}
        for vote in frequent:
            ways = _with_answer(ways, counts[vote], top, vote in is_right)
        for (size, tied), (_, right_ones) in ways.items():
            if tied:
                totals[size] += Fraction(right_ones, tied)
    return [float(totals[k] / comb(n, k)) for k in range(1, n + 1)]


def _with_answer(
    ways: dict[tuple[int, int], tuple[int, int]], count: int, top: int, is_right: bool
) -> dict[tuple[int, int], tuple[int, int]]:
    """Extend subsets by at most ``top`` of the samples that gave one more answer."""
    extended: dict[tuple[int, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
    choices = [comb(count, taken) for taken in range(top + 1)]
    for (size, tied), (subsets, right_ones) in ways.items():
        for taken, choice in enumerate(choices):
            is_top = taken == top
            key = size + taken, tied + is_top
            old_subsets, old_right = extended[key]
            gained = right_ones + subsets * (is_top and is_right)
            extended[key] = old_subsets + choice * subsets, old_right + choice * gained
    return extended


def bootstrap_means(
    values: npt.ArrayLike, *, resamples: int = 10_000, seed: int | Sequence[int] = 0
) -> npt.NDArray[np.float64]:
    """Return the means of resampled questions, drawn with replacement.

    Efron 1979, "Bootstrap Methods: Another Look at the Jackknife". Differences of two models on
    the same questions are values too: their intervals are those of a paired comparison.

    Args:
        values: shape (Q,) or (Q, M): M numbers of each of Q questions, resampled together.
        resamples: B.
        seed: of the draws.

    Returns:
        Shape (B,) or (B, M), float64.

    Raises:
        ConfigurationError: if there is no question.
    """
    values = np.asarray(values, dtype=np.float64)
    questions = len(values)
    if not questions:
        raise ConfigurationError("0 questions: a confidence interval needs at least one")
    # To draw one of several questions with the same values is to draw those values as often.
    rows, counts = np.unique(values, axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    sizes = [
        min(_RESAMPLES_AT_ONCE, resamples - i) for i in range(0, resamples, _RESAMPLES_AT_ONCE)
    ]
    draws = (random.multinomial(questions, counts / questions, size=size) for size in sizes)
    return np.concatenate([draw @ rows for draw in draws]) / questions


def interval(
    means: npt.NDArray[np.float64], level: float = 0.95
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the two ends of a percentile interval.

    Where all values are equal, all right or all wrong say, it has no width, however few they are.

    >>> low, high = interval(np.arange(101.0), level=0.5)
    >>> float(low), float(high)
    (25.0, 75.0)

    Args:
        means: shape (B, ...), of ``bootstrap_means``.
        level: share of the means that lie within.
    """
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
