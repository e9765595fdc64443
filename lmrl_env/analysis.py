"""Length bias and difficulty bias of algorithms, read off the weights that they give tokens.

Both are exponents of the weight w = -∂L/∂log π(token). Among equally rewarded responses to one
question it goes with |o|^α; among questions the weight of a unit of reward goes with std^β, the
standard deviation of the question's rewards. GRPO has α = β = -1, the two biases that Liu et al.
2025, "Understanding R1-Zero-Like Training", arXiv:2503.20783, section 3.1, find in it; Dr. GRPO has
α = β = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmrl_env.comparison import Comparison
from lmrl_env.rollout import Rollout

Floats = npt.NDArray[np.float64]

LENGTH_BUCKETS = 4
PASS_RATE_BUCKETS = 5


class PowerLaw(NamedTuple):
    """How a weight goes with a quantity.

    Attributes:
        exponent: slope of log weight over log quantity by least squares; None where the quantity
            does not vary, or there is no weight.
        rows: shape (m,), int64, the responses or questions that it was fitted to.
        relative: shape (m,), their weights; 1 is what the law gives at the quantity's geometric
            mean over the batch.
    """

    exponent: float | None
    rows: npt.NDArray[np.int64]
    relative: Floats


def _slope(x: Floats, y: Floats) -> float | None:
    """Return the slope of y over x, each of mean 0; None if x does not vary."""
    return float(x @ y / (x @ x)) if np.abs(x).max(initial=0.0) > 1e-6 else None


def length_bias(
    weights: Floats, batch: Rollout, group_size: int, chosen: npt.NDArray[np.bool_]
) -> PowerLaw:
    """Fit the weight of a token to the response's length, among equal rewards of one question.

    log |wᵢ| = a(question, reward) + α log |oᵢ|

    Each kind of response has its own constant a, which takes up all that comes from the advantage;
    the weights that are returned are without it.

    Args:
        weights: shape (N,), mean over the tokens of each response.
        batch: what they are of.
        group_size: G.
        chosen: shape (N,), bool, the responses to fit; those alone of their kind tell nothing and
            are left out, as are those of weight 0.
    """
    lengths = batch.mask.sum(1)
    (rows,) = np.nonzero(chosen & (weights != 0) & (lengths > 0))
    kinds = np.stack([rows // group_size, batch.rewards[rows]])
    _, kind, count = np.unique(kinds, axis=1, return_inverse=True, return_counts=True)
    rows, kind = rows[count[kind] > 1], kind[count[kind] > 1]

    def centred(values: Floats) -> Floats:
        return values - (np.bincount(kind, values) / np.maximum(np.bincount(kind), 1))[kind]

    length, weight = np.log(lengths[rows]), np.log(np.abs(weights[rows]))
    alpha = _slope(centred(length), centred(weight))
    slope = alpha or 0.0
    mean_length = np.log(np.maximum(lengths, 1)).mean()
    logs = centred(weight - slope * length) + slope * (length - mean_length)
    return PowerLaw(alpha, rows, np.exp(logs))


def difficulty_bias(
    weights: Floats, batch: Rollout, group_size: int, length_exponent: float | None
) -> PowerLaw:
    """Fit the weight of a unit of reward to the spread of the rewards, among questions.

    d(q) = Σᵢ wᵢ |oᵢ|^-α (Rᵢ - R̄) / Σᵢ (Rᵢ - R̄)²,   log d(q) = b + β log std(q)

    d is the slope of weight over reward within the question's group: a baseline, which adds the
    same to all its responses and has no expected gradient, does not change it.

    Args:
        weights: shape (N,), mean over the tokens of each response.
        batch: what they are of; questions whose rewards are equal are left out, as are those
            where a larger reward has no larger weight.
        group_size: G.
        length_exponent: α, which takes the lengths out of the weights; where it is None and
            lengths differ, lengths and difficulty cannot be told apart, and there is no β.
    """
    lengths = np.maximum(batch.mask.sum(1), 1)
    if length_exponent is None and np.ptp(lengths) > 0:
        return PowerLaw(None, np.zeros(0, dtype=np.int64), np.zeros(0))
    weights = (weights * lengths ** -(length_exponent or 0.0)).reshape(-1, group_size)
    rewards = batch.rewards.reshape(-1, group_size)
    std = rewards.std(1)
    spread = rewards - rewards.mean(1, keepdims=True)
    slope = (weights * spread).mean(1) / np.where(std > 1e-6, std, np.inf) ** 2
    (rows,) = np.nonzero(slope > 0)
    x, y = np.log(std[rows]), np.log(slope[rows])
    if not len(rows):
        return PowerLaw(None, rows, y)
    return PowerLaw(_slope(x - x.mean(), y - y.mean()), rows, np.exp(y - y.mean()))


def report(
    comparison: Comparison, names: Sequence[str], batch: Rollout, group_size: int
) -> dict[str, Any]:
    """Return all figures of a comparison, as JSON can hold them.

    Right and wrong are responses that ended by themselves; those that the budget cut off are
    neither, though their rewards and weights count in their question's difficulty. A bucket, of
    lengths or of pass rates, is named by its upper bound; its weight is a mean, or None.

    Args:
        comparison: of F algorithms.
        names: F of them.
        batch: what was compared on.
        group_size: G.
    """
    lengths = batch.mask.sum(1)
    right = batch.correct & batch.terminated
    wrong = ~batch.correct & batch.terminated
    outcomes = {"right": right, "wrong": wrong}
    pass_rates = batch.correct.reshape(-1, group_size).mean(1)
    ended = lengths[right | wrong] if (right | wrong).any() else lengths
    shares = np.arange(1, LENGTH_BUCKETS + 1) / LENGTH_BUCKETS
    length_bounds = np.unique(np.quantile(ended, shares, method="inverted_cdf"))
    rate_bounds = np.arange(1, PASS_RATE_BUCKETS + 1) / PASS_RATE_BUCKETS

    def figures(law: PowerLaw, quantity: Floats, bounds: Floats) -> dict[str, Any]:
        bucket = np.digitize(quantity[law.rows], bounds[:-1], right=True)
        parts = [law.relative[bucket == b] for b in range(len(bounds))]
        return {
            "exponent": law.exponent,
            "buckets": [float(part.mean()) if len(part) else None for part in parts],
            "rows": law.rows.tolist(),
            "relative_weight": law.relative.tolist(),
        }

    files = []
    for f, name in enumerate(names):
        token_weights = comparison.weights[f].astype(np.float64)
        scale = np.abs(token_weights).sum() / max(1, batch.mask.sum())
        weights = token_weights.sum(1) / np.maximum(lengths, 1)
        both = length_bias(weights, batch, group_size, right | wrong)
        difficulty = difficulty_bias(weights, batch, group_size, both.exponent)
        files.append(
            {
                "name": name,
                "gradient_norm": float(comparison.norms[f]),
                "cosines": [None if np.isnan(c) else float(c) for c in comparison.cosines[f]],
                "length": {
                    key: figures(
                        length_bias(weights, batch, group_size, chosen), lengths, length_bounds
                    )
                    for key, chosen in outcomes.items()
                },
                "difficulty": figures(difficulty, pass_rates, rate_bounds),
                "mean_token_weight": (weights / scale).tolist() if scale else weights.tolist(),
            }
        )
    return {
        "on_policy": comparison.on_policy,
        "logprob_gap": comparison.logprob_gap,
        "responses": {
            "length": lengths.tolist(),
            "outcome": np.select([right, wrong], ["right", "wrong"], "truncated").tolist(),
        },
        "pass_rates": pass_rates.tolist(),
        "length_buckets": length_bounds.tolist(),
        "pass_rate_buckets": rate_bounds.tolist(),
        "files": files,
    }
