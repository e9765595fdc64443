"""What samples say: scores with intervals by question set, over sets, and between models."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from lmrl_env.quantities import plain_number
from lmrl_env.samples import Sample, SampleStatus
from lmrl_env.scores import bootstrap_means, interval, majority_at_k, pass_at_k

Floats = npt.NDArray[np.float64]


def by_set(samples: Iterable[Sample]) -> dict[str, dict[str, list[Sample]]]:
    """Return the samples to each question of each set."""
    sets: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        questions = sets.setdefault(sample.set, {})
        questions.setdefault(sample.question_id, []).append(sample)
    return sets


def summarise(samples: Iterable[Sample], seed: int = 0) -> dict[str, Any]:
    """Summarise the samples of one model.

    Args:
        samples: of one or several sets.
        seed: of the bootstrap.

    Returns:
        ``sets``: for each set the numbers of questions and of samples; ``accuracy``, which is the
        mean over questions of the share of right samples, that is avg@n; ``score``, the same of
        the verifier's scores; ``pass@k`` and ``majority@k`` for k = 1, 2, 4, ... and n, without
        the latter where a right sample names no answer that could be counted; each as ``value``
        with the ends ``low`` and ``high`` of its 95% bootstrap interval over questions; mean
        ``tokens`` of right, wrong (ended, and anything but right) and truncated responses;
        ``formatted``, the share of samples in which the verifier found an answer to judge; and
        counts by ``status``. ``mean_over_sets`` weighs all sets alike, ``mean_over_questions``
        all questions; their intervals resample the questions within each set.
    """
    sets = by_set(samples)
    summaries, values, means, sizes = {}, [], [], []
    for label, questions in sets.items():
        n = min(map(len, questions.values()))
        names, rows = _question_scores(questions, n)
        resampled = bootstrap_means(rows, seed=_seed(seed, label))
        summaries[label] = {
            "questions": len(questions),
            "samples_per_question": n,
            **_with_intervals(names, rows.mean(0), resampled),
            **_shares(questions),
        }
        sizes.append(len(questions))
        values.append(rows[:, 0].mean())
        means.append(resampled[:, 0])
    averages = {}
    for name, weights in (("mean_over_sets", [1] * len(sizes)), ("mean_over_questions", sizes)):
        value = np.average(values, weights=weights)
        mean = np.average(means, axis=0, weights=weights)
        averages[name] = _with_intervals(["accuracy"], value[None], mean[:, None])["accuracy"]
    return {"sets": summaries, **averages}


def compare(
    base: Iterable[Sample], other: Iterable[Sample], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return by how much a model is more accurate than another on the questions of both.

    The intervals are of the paired bootstrap: a question is drawn with both models' samples.

    Args:
        base: samples of the one.
        other: samples of the other.
        seed: of the bootstrap.

    Returns:
        For each set that both were asked, and for ``mean_over_sets`` where there are several, the
        number of common ``questions``, the ``difference`` of accuracy and the ends of its 95%
        interval.
    """
    theirs, ours = by_set(base), by_set(other)
    differences, table = [], {}
    for label in [label for label in theirs if label in ours]:
        common = [question for question in theirs[label] if question in ours[label]]
        if not common:
            continue
        gained = np.array([_accuracy(ours[label][q]) - _accuracy(theirs[label][q]) for q in common])
        resampled = bootstrap_means(gained, seed=_seed(seed, label))
        differences.append((gained.mean(), resampled))
        table[label] = _difference(len(common), gained.mean(), resampled)
    if len(differences) > 1:
        values, means = zip(*differences, strict=True)
        asked = sum(int(row["questions"]) for row in table.values())
        table["mean_over_sets"] = _difference(asked, np.mean(values), np.mean(means, axis=0))
    return table


def _question_scores(questions: Mapping[str, Sequence[Sample]], n: int) -> tuple[list[str], Floats]:
    """Return names of scores, and the scores of each question, shape (Q, M)."""
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    names = ["accuracy", "score", *(f"pass@{k}" for k in ks)]
    has_votes = all(
        _vote(sample) is not None
        for samples in questions.values()
        for sample in samples
        if sample.status == "correct"
    )
    if has_votes:
        names += [f"majority@{k}" for k in ks]
    rows = []
    for samples in questions.values():
        right = [sample.status == "correct" for sample in samples]
        row = [_accuracy(samples), float(np.mean([sample.score for sample in samples]))]
        row += [pass_at_k(len(samples), sum(right), k) for k in ks]
        if has_votes:
            majority = majority_at_k([_vote(sample) for sample in samples], right)
            row += [majority[k - 1] for k in ks]
        rows.append(row)
    return names, np.array(rows)


def _accuracy(samples: Sequence[Sample]) -> float:
    return sum(sample.status == "correct" for sample in samples) / len(samples)


def _vote(sample: Sample) -> Any:
    """Return what a sample votes for: its number if it is a plain one, else its text."""
    if sample.extracted is None:
        return None
    text = "".join(sample.extracted.replace("$", "").split())
    number = plain_number(sample.extracted)
    return text or None if number is None else number


_KIND = {"correct": "right", "truncated": "truncated"}


def _shares(questions: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Return lengths, the formatted share and counts by status."""
    samples = [sample for group in questions.values() for sample in group]
    counts = Counter(sample.status for sample in samples)
    lengths: dict[str, list[int]] = {"right": [], "wrong": [], "truncated": []}
    for sample in samples:
        if sample.tokens is not None and sample.status is not None:
            lengths[_KIND.get(sample.status, "wrong")].append(sample.tokens)
    return {
        "tokens": {kind: float(np.mean(of)) if of else None for kind, of in lengths.items()},
        "formatted": (counts["correct"] + counts["wrong"]) / len(samples),
        "status": {status: counts[status] for status in get_args(SampleStatus)},
    }


def _with_intervals(
    names: Sequence[str], values: Floats, resampled: Floats
) -> dict[str, dict[str, float]]:
    low, high = interval(resampled)
    return {
        name: {"value": float(values[i]), "low": float(low[i]), "high": float(high[i])}
        for i, name in enumerate(names)
    }


def _difference(questions: int, value: Any, resampled: Floats) -> dict[str, float]:
    low, high = interval(resampled)
    return {
        "questions": questions,
        "difference": float(value),
        "low": float(low),
        "high": float(high),
    }


def _seed(seed: int, label: str) -> list[int]:
    """Return a seed of the set, so that sets are resampled independently."""
    return [seed, zlib.crc32(label.encode())]
