"""Held-out accuracy during training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import VectorEnv

from lmrl_env.distributed import all_sum
from lmrl_env.env import unwrap
from lmrl_env.groups import has_signal
from lmrl_env.rollout import Rollout, response_seeds, rollout
from lmrl_env.verifiers import Status

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmrl_env.engines.engine import Engine

STATUSES = (*get_args(Status), "truncated")
"""What ``verifier_status`` can be."""


def evaluate(
    envs: VectorEnv[Any, Any, Any],
    engine: Engine,
    accelerator: Accelerator,
    *,
    questions: int,
    temperature: float,
    seed: int,
) -> dict[str, float | None]:
    """Sample one response to each of a fixed choice of held-out questions.

    The questions and the seeds are the same at every call, so that curves compare like with like.

    Args:
        envs: over the held-out questions, ``group_size=1``; all ranks' slots together number at
            least ``questions``.
        engine: samples.
        accelerator: of this rank.
        questions: how many, at most the size of the set.
        temperature: of the samples.
        seed: of the samples.

    Returns:
        ``eval/*`` metrics over all ranks.
    """
    env = unwrap(envs)
    index = accelerator.process_index * env.num_envs + np.arange(env.num_envs)
    order = np.random.default_rng(0).permutation(len(env.prompts))[:questions]
    seeds = response_seeds(seed, 0, accelerator.num_processes * env.num_envs)[index]
    batch = rollout(
        envs,
        engine,
        question_ids=order[index % len(order)],
        seeds=seeds,
        temperature=temperature,
    )
    metrics = outcome_metrics(accelerator, batch, counted=index < len(order))
    accuracy = metrics.pop("reward/accuracy")
    return {"eval/accuracy": accuracy, "eval/questions": len(order)} | {
        f"eval/{key}": value for key, value in metrics.items()
    }


def outcome_metrics(
    accelerator: Accelerator, batch: Rollout, group_size: int = 1, *, counted: Any = True
) -> dict[str, float | None]:
    """Return reward, accuracy and lengths over all ranks; None is a mean over nothing.

    ``length/incorrect`` is of responses that ended by themselves and are not correct: those that
    the budget cut off are counted by ``length/truncated_fraction`` alone. Groups of equal rewards,
    from which group-relative advantages learn nothing, are ``reward/zero_variance_groups``. Where a
    verifier is in the environment, ``verifier/STATUS`` is the share of each of its statuses, and
    ``verifier/truncated`` that of responses which it did not see. ``score/NAME`` is the mean of
    what each of several verifiers scored.

    Args:
        accelerator: of this rank.
        batch: of this rank.
        group_size: G; 1 leaves groups out.
        counted: shape (N,), bool: rows that count.
    """
    counted = np.broadcast_to(counted, batch.rewards.shape)
    correct, length = batch.correct, batch.response_lengths
    incorrect = ~correct & batch.terminated
    statuses = STATUSES if any(batch.verifier_status) else ()
    sums = all_sum(
        accelerator,
        [
            (values * chosen * counted).sum()
            for values, chosen in (
                (1, counted),
                (1, correct),
                (1, incorrect),
                (1, batch.truncated),
                (batch.rewards, counted),
                (length, counted),
                (length, correct),
                (length, incorrect),
                *((1, np.array(batch.verifier_status) == status) for status in statuses),
            )
        ],
    ).tolist()
    n, right, wrong, cut, reward, tokens, right_tokens, wrong_tokens, *by_status = sums
    metrics = {
        "reward/mean": reward / n,
        "reward/accuracy": right / n,
        "length/mean": tokens / n,
        "length/correct": right_tokens / right if right else None,
        "length/incorrect": wrong_tokens / wrong if wrong else None,
        "length/truncated_fraction": cut / n,
    }
    for status, count in zip(statuses, by_status, strict=True):
        metrics[f"verifier/{status}"] = count / n
    metrics |= _score_metrics(accelerator, batch, counted)
    if group_size > 1:
        equal = ~has_signal(torch.from_numpy(batch.rewards), group_size).numpy()
        zeros, groups = all_sum(accelerator, [equal.sum(), len(equal)]).tolist()
        metrics["reward/zero_variance_groups"] = zeros / groups
    return metrics


def _score_metrics(
    accelerator: Accelerator, batch: Rollout, counted: npt.NDArray[np.bool_]
) -> dict[str, float | None]:
    """Return the mean of each verifier's scores over the responses that it graded, of all ranks."""
    metrics: dict[str, float | None] = {}
    for name in batch.scores[0]:  # all rows, on all ranks, have the same names
        known = [
            score
            for row, counts in zip(batch.scores, counted, strict=True)
            if counts and (score := row[name]) is not None
        ]
        total, n = all_sum(accelerator, [sum(known), len(known)]).tolist()
        metrics[f"score/{name}"] = total / n if n else None
    return metrics
