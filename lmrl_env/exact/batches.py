"""The exact distribution of a training batch: groups of responses, and batches of groups."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmrl_env.errors import ConfigurationError
from lmrl_env.exact.mdp import TokenMDP
from lmrl_env.exact.trajectories import Trajectories

MAX_BATCHES = 100_000
"""Most batches that are enumerated."""


class Batches(NamedTuple):
    """Every training batch up to the order of its groups, and of the responses in a group.

    Attributes:
        rows: shape (M, B·G), int64: which trajectories, the G of a group adjacent.
        probs: shape (M,), float64, multinomial.
    """

    rows: Tensor
    probs: Tensor


def enumerate_batches(
    mdp: TokenMDP,
    trajectories: Trajectories,
    *,
    group_size: int,
    questions: int | Sequence[int] = 1,
) -> Batches:
    """Return the distribution of B groups of G independent responses to one question each.

    G draws out of L responses with probabilities p₁, …, p_L are a multiset, in which response l
    stands n_l times, with probability G! · Π_l p_l^{n_l} / n_l!. There are C(L+G-1, G) of them.

    Args:
        mdp: with the probabilities of its questions.
        trajectories: the responses.
        group_size: G, at least 1.
        questions: B, at least 1, how many are drawn independently; or which, if they are fixed.

    Raises:
        ConfigurationError: if there are more than ``MAX_BATCHES`` of them.

    >>> from lmrl_env.exact import TabularPolicy, enumerate_trajectories
    >>> coin = TokenMDP(2, 1, reward=lambda question, tokens, terminated: tokens[0])
    >>> flips = enumerate_trajectories(coin, TabularPolicy(coin, scale=0))
    >>> batches = enumerate_batches(coin, flips, group_size=2)
    >>> batches.rows.tolist(), batches.probs
    ([[0, 0], [0, 1], [1, 1]], tensor([0.2500, 0.5000, 0.2500], dtype=torch.float64))
    """
    drawn = {q: p for q, p in enumerate(mdp.question_probs) if p > 0}
    fixed = Counter([] if isinstance(questions, int) else questions)
    number = questions if isinstance(questions, int) else len(questions)
    if group_size < 1 or number < 1 or fixed.keys() - drawn.keys():
        raise ConfigurationError(
            f"group_size={group_size}, questions={questions}: expected at least 1 each, or a "
            f"list of questions out of {list(drawn)}"
        )
    rows = {q: (trajectories.questions == q).nonzero()[:, 0] for q in fixed or drawn}
    sizes = {q: math.comb(len(own) + group_size - 1, group_size) for q, own in rows.items()}
    if isinstance(questions, int):
        number = math.comb(sum(sizes.values()) + questions - 1, questions)
    else:
        number = math.prod(math.comb(sizes[q] + n - 1, n) for q, n in fixed.items())
    if number > MAX_BATCHES:
        raise ConfigurationError(
            f"questions={questions}, group_size={group_size} and {len(trajectories.probs)} "
            f"trajectories give {number} batches, of which at most {MAX_BATCHES} are enumerated: "
            "take a smaller vocabulary, horizon or batch, or, on-policy, collapsed=True"
        )
    groups = {}
    for q, own in rows.items():
        group, probs = _multisets(trajectories.probs[own], group_size)
        groups[q] = Batches(own[group], probs)
    if isinstance(questions, int):
        choices = torch.cat([group for group, _ in groups.values()])  # (M, G)
        batch, probs = _multisets(
            torch.cat([drawn[q] * probs for q, (_, probs) in groups.items()]), questions
        )
        return Batches(choices[batch].flatten(1), probs)
    parts = []
    for q, n in fixed.items():
        batch, probs = _multisets(groups[q].probs, n)
        parts.append(Batches(groups[q].rows[batch].flatten(1), probs))
    return functools.reduce(_product, parts)


def _product(first: Batches, second: Batches) -> Batches:
    """Return the distribution of two independent batches side by side."""
    left = first.rows.repeat_interleave(len(second.rows), dim=0)
    right = second.rows.repeat(len(first.rows), 1)
    return Batches(torch.cat([left, right], 1), torch.outer(first.probs, second.probs).flatten())


def _multisets(probs: Tensor, size: int) -> Batches:
    """Return the distribution of ``size`` independent draws, their order left out."""
    draws = itertools.combinations_with_replacement(range(len(probs)), size)
    flat = np.fromiter(itertools.chain.from_iterable(draws), dtype=np.int64)
    rows = torch.from_numpy(flat).reshape(-1, size)
    repeats = torch.ones(len(rows), dtype=torch.float64)  # becomes Π n_l!
    run = torch.ones(len(rows), dtype=torch.float64)
    for i in range(1, size):
        run = torch.where(rows[:, i] == rows[:, i - 1], run + 1, 1.0)
        repeats = repeats * run
    return Batches(rows, math.factorial(size) / repeats * probs[rows].prod(dim=1))


class Classes(NamedTuple):
    """Trajectories that only their tokens tell apart, taken together.

    Attributes:
        trajectories: one of each class, with the probability of the class.
        others: another of each class, where it has two.
        class_of: shape (L,), int64: the class of each trajectory.
    """

    trajectories: Trajectories
    others: Trajectories
    class_of: Tensor


def collapse(trajectories: Trajectories) -> Classes:
    """Return the classes of equal question, token rewards, length and termination.

    On-policy every ratio is 1, so that the loss of most estimators depends on the class only, and
    there are far fewer batches of classes than of trajectories.
    """
    keys = zip(
        trajectories.questions.tolist(),
        map(tuple, trajectories.token_rewards.tolist()),
        trajectories.lengths.tolist(),
        trajectories.terminated.tolist(),
        strict=True,
    )
    members: dict[tuple[object, ...], list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    class_of = torch.empty(len(trajectories.probs), dtype=torch.int64)
    for number, rows in enumerate(members.values()):
        class_of[rows] = number
    probs = torch.zeros(len(members), dtype=torch.float64)
    probs.index_add_(0, class_of, trajectories.probs)

    def pick(place: int) -> Trajectories:
        rows = torch.tensor([rows[place] for rows in members.values()])
        states, *tensors = trajectories
        return Trajectories(states, *(tensor[rows] for tensor in tensors))._replace(probs=probs)

    return Classes(pick(0), pick(-1), class_of)
