"""Token-level against sequence-level loss: what should a response's length do to its weight?

Claim of the survey (LitePPO, arXiv:2508.08221; DAPO, arXiv:2503.14476, section 3.3): the mean over
all tokens of a batch suits base models, the mean over responses of their tokens' means suits
aligned ones. The runs are DAPO's and GRPO's with everything else the same. Beside them, on sampled
batches: the weight that tokens get by their response's length, the angle to Dr. GRPO's mean
gradient, whose direction is that of the objective, and the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from claim import Job, Options, Verdict, claim_options, curves, draw, interval, train, write
from matplotlib.figure import Figure
from survey import (
    Learner,
    by_seed,
    checkpoint_of,
    functions,
    late,
    outcome,
    seeded,
    settings,
    trained_model,
)

LOSSES = {"token": "dapo", "sequence": "grpo"}
COLORS = {"token": "C1", "sequence": "C3", "constant": "C0"}
BATCHES = 8
STEPS = 15
LEVEL = {"tiny": "arithmetic:level=3", "paper": "math-12k"}


def jobs(options: Options, model: str | None, start: str) -> list[Job]:
    """Return the runs from one starting point, the two files differing in the divisor alone."""
    flags = settings(options) | ({"model": model} if model else {})
    as_grpo = {"max_refills": 0, "overlong_cache": 0, "clip_eps_high": 0.2}
    token = seeded(f"granularity-{start}-token", "dapo", options.seeds, flags | as_grpo)
    return token + seeded(f"granularity-{start}-sequence", "grpo", options.seeds, flags)


def token_weights(lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Return the weight of a token of each response per unit of advantage; the mean token has 1.

    >>> token_weights(np.array([1, 3]))["sequence"].tolist()
    [2.0, 0.6666666666666666]
    """
    tokens, responses = lengths.sum(), len(lengths)
    return {
        "token": np.ones(responses),
        "sequence": tokens / responses / lengths,
    }


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the angle between two gradients, degrees."""
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    return float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))


def short_runs(learner: Learner, seeds: int) -> dict[str, np.ndarray]:
    """Return accuracies over training by loss, shape (seeds, steps)."""
    compute = functions("grpo").compute_advantages
    return {
        name: np.array([
            learner.train(compute, functions(file).policy_loss, steps=STEPS, seed=seed)
            for seed in range(seeds)
        ])
        for name, file in LOSSES.items()
    }  # fmt: skip


def gradients(learner: Learner) -> dict[str, Any]:
    """Return what the losses' gradients on sampled batches are, from one starting point."""
    found: dict[str, list[torch.Tensor]] = {"token": [], "sequence": [], "constant": []}
    lengths, shares = [], []
    for seed in range(BATCHES):
        batch = learner.sample(seed)
        rewards, old = torch.from_numpy(batch.rewards), learner.logprobs(batch)
        advantages = functions("grpo").compute_advantages(rewards, learner.group_size)
        for name, file in (*LOSSES.items(), ("constant", "dr_grpo")):
            loss = functions(file).policy_loss
            got = learner.backward(batch, range(len(rewards)), advantages, old, loss)
            found[name].append(got)
        lengths.append(batch.response_lengths)
        shares.append(batch.correct.mean())
    means = {name: torch.stack(own).mean(0) for name, own in found.items()}
    return {
        "accuracy": interval(shares),
        "lengths": np.concatenate(lengths).tolist(),
        "length_spread": float(np.std(np.log(np.concatenate(lengths)))),
        "losses": {
            name: {
                "degrees_to_constant": angle(means[name], means["constant"]),
                "noise_over_signal": float(
                    (torch.stack(own).var(0).sum().sqrt() / means[name].norm()).item()
                ),
            }
            for name, own in found.items()
        },
    }


def compare(shares: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return accuracies in the last third of training, and their difference by seed."""
    mean = {name: late(values) for name, values in shares.items()}
    return {
        "late": {name: interval(values.tolist()) for name, values in mean.items()},
        "token_minus_sequence": interval((mean["token"] - mean["sequence"]).tolist()),
        "curves": {name: values.tolist() for name, values in shares.items()},
    }


def judge(figures: Mapping[str, Any], seeds: int) -> Verdict:
    """Return the verdict: token level ahead from the base, sequence level from the trained one."""
    base, trained = (figures[s]["runs"]["token_minus_sequence"] for s in ("base", "trained"))
    measured = " ".join(
        f"{start.capitalize()} model: accuracy in the last third of training, token less sequence "
        f"level, {own['runs']['token_minus_sequence']}; the mean gradient of {BATCHES} batches is "
        f"{own['batches']['losses']['token']['degrees_to_constant']:.2g}° (token) and "
        f"{own['batches']['losses']['sequence']['degrees_to_constant']:.2g}° (sequence) from that "
        f"with a constant divisor, at {own['batches']['length_spread']:.2g} of spread of log "
        "length."
        for start, own in figures.items()
    )
    return Verdict(
        "survey: LitePPO, DAPO 3.3",
        "The token-level loss suits base models, the sequence-level loss aligned ones.",
        measured,
        outcome(base.low > 0, trained.high < 0),
        "The two losses differ as far as lengths do within a batch, which the gradients on sampled "
        "batches test without the noise of training: the token-level gradient is nearly the one "
        "of a constant divisor, the sequence-level one is turned by 1/|o|.",
        f"{seeds} seeds a run, {BATCHES} batches a gradient",
    )


def plot(figures: Mapping[str, Any]) -> Figure:
    """Draw accuracy over training from both starting points, and weights by length."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    *runs, weights = figure.subplots(1, 3)
    for axes, start in zip(runs, figures, strict=True):
        for name in LOSSES:
            values = np.array(figures[start]["runs"]["curves"][name])
            draw(axes, np.arange(values.shape[1]) + 1, values, f"{name} level", COLORS[name])
        axes.set_title(f"from the {start} model")
        axes.set_ylabel("share of right answers in training")
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    for start, marker in zip(figures, "ox", strict=True):
        lengths = np.array(figures[start]["batches"]["lengths"])
        chosen = np.sort(np.random.default_rng(0).choice(lengths, 60, replace=False))
        for name, weight in token_weights(lengths).items():
            at = dict(zip(lengths, weight, strict=True))
            weights.plot(chosen, [at[n] for n in chosen], marker, color=COLORS[name], markersize=4,
                         label=f"{name} level, {start}")  # fmt: skip
    weights.set_title("weight of a token; the mean one has 1")
    weights.set_xlabel("length of its response, tokens")
    weights.set_ylabel("relative weight")
    weights.set_yscale("log")
    weights.legend(fontsize=8)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure


@claim_options(seeds=3)
def main(options: Options) -> None:
    """Train with either loss from a base and from a trained model, and compare the gradients."""
    trained = trained_model(options, "granularity")
    checkpoint = checkpoint_of(options, trained)
    base, later = jobs(options, None, "base"), jobs(options, checkpoint, "trained")
    if options.dry_run:
        train(options, [trained] if options.is_tiny else [trained, *base, *later])
    folders = train(options, [trained])
    if not options.is_tiny:
        folders |= train(options, [*base, *later])
    figures = {}
    for start, model in {"base": trained.flags["model"], "trained": checkpoint}.items():
        flags = settings(options)
        learner = Learner(str(model), options.questions or LEVEL[options.scale], flags, groups=8)
        batches = gradients(learner)
        if options.is_tiny:
            shares = short_runs(learner, options.seeds)
        else:
            runs = {n: by_seed(folders, f"granularity-{start}-{n}", options.seeds) for n in LOSSES}
            shares = {n: curves(own, "reward/accuracy")[1] for n, own in runs.items()}
        figures[start] = {"runs": compare(shares), "batches": batches}
    picture = plot(figures)
    verdict = judge(figures, options.seeds)
    write(options, "loss_granularity", "Token-level against sequence-level loss", verdict, figures,
          picture)  # fmt: skip


if __name__ == "__main__":
    main()
