"""What to divide advantages by: the group's std, the batch's, or nothing, by difficulty and range.

Claims of the survey (LitePPO, arXiv:2508.08221): dividing by the std of the group harms on easy
questions, whose std is near 0, so that gradients explode, and does no harm on hard ones; the std
of the batch is the sturdier; with rewards of -1 and 1 batch statistics gain. The weight that a
question of a pass rate gets is exact, from the binomial distribution of a group's rewards; beside
it stand the weights and gradients of sampled batches, and short runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from claim import Job, Options, Verdict, claim_options, curves, draw, interval, train, write
from matplotlib.figure import Figure
from scipy.stats import binom
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

CHOICES = {"group": "dapo", "batch": "lite_ppo", "none": "dr_grpo"}
COLORS = {"group": "C4", "batch": "C7", "none": "C0"}
LABELS = {"group": "group std", "batch": "batch std", "none": "no std"}
PASS_RATES = np.linspace(0.01, 0.99, 99)
GROUP, GROUPS = 8, 16
BATCHES = 6
STEPS = 15
DATA = {
    "tiny": {"easy": "arithmetic:level=1", "medium": "arithmetic:level=2",
             "hard": "arithmetic:level=3"},
    "paper": {"easy": "math-12k:level=1", "medium": "math-12k:level=3", "hard": "math-12k:level=5"},
}  # fmt: skip


def advantages(choice: str, rewards: torch.Tensor, group_size: int = GROUP) -> torch.Tensor:
    """Return the advantages of a choice, shape (N,), by its algorithm file."""
    return functions(CHOICES[choice]).compute_advantages(rewards, group_size)


def exact_weight(choice: str, p: float, low: float = 0.0, high: float = 1.0) -> float:
    """Return the factor c of E[1/N Σᵢ Aᵢ ∇log π(oᵢ)] = c ∇p, all questions of pass rate p.

    With k of a group's G responses right, each right one has the advantage A₁ and each wrong one
    A₀, so that c = E[(k A₁ / p - (G - k) A₀ / (1 - p)) / G]. For the std of the batch the
    expectation goes over the number of right ones in the other groups too.

    Args:
        choice: ``group``, ``batch`` or ``none``.
        p: pass rate, above 0 and below 1.
        low: reward of a wrong response.
        high: reward of a right one.
    """
    k = np.arange(GROUP + 1)
    span = high - low
    deviation = {1: span * (1 - k / GROUP), 0: -span * k / GROUP}
    inverse_std = np.ones(GROUP + 1)
    if choice == "group":
        std = span * np.sqrt(k * (GROUP - k) / (GROUP * (GROUP - 1)))
        inverse_std = 1 / (std + 1e-4)
    if choice == "batch":
        n = GROUP * GROUPS
        others = np.arange(n - GROUP + 1)
        right = k[:, None] + others
        std = span * np.sqrt(right * (n - right) / (n * (n - 1)))
        inverse_std = (binom.pmf(others, n - GROUP, p) / (std + 1e-4)).sum(1)
    each = (k * deviation[1] / p - (GROUP - k) * deviation[0] / (1 - p)) / GROUP
    return float((binom.pmf(k, GROUP, p) * each * inverse_std).sum())


def measured_weights(rewards: np.ndarray) -> dict[str, np.ndarray]:
    """Return estimates of the weight of each question, from batches cut out of many responses.

    Args:
        rewards: shape (questions, draws), 0 or 1; draws are a multiple of ``GROUP``, each
            ``GROUP`` of which make a batch with those of the other questions.

    Returns:
        For each choice the weight of each question, shape (questions,), nan at pass rates 0 and 1;
        and ``pass_rate``.
    """
    rate = rewards.mean(1)
    inside = np.where((rate > 0) & (rate < 1), rate * (1 - rate), np.nan)
    found: dict[str, np.ndarray] = {"pass_rate": rate}
    for choice in CHOICES:
        weights = []
        for batch in np.split(rewards, rewards.shape[1] // GROUP, axis=1):
            own = advantages(choice, torch.from_numpy(batch.reshape(-1))).numpy()
            weights.append((own.reshape(batch.shape) * (batch - rate[:, None])).mean(1) / inside)
        found[choice] = np.mean(weights, axis=0)
    return found


def batches(learner: Learner) -> dict[str, Any]:
    """Return what sampled batches say: rewards, largest advantages, gradient norms."""
    loss: Callable[..., Any] = functions("dr_grpo").policy_loss
    norms: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    largest: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    rewards = []
    for seed in range(BATCHES):
        batch = learner.sample(seed)
        rewards.append(batch.rewards.reshape(GROUPS, GROUP))
        old = learner.logprobs(batch)
        for choice in CHOICES:
            own = advantages(choice, torch.from_numpy(batch.rewards))
            largest[choice].append(float(own.abs().max()))
            gradient = learner.backward(batch, range(len(own)), own, old, loss)
            norms[choice].append(float(gradient.norm()))
    groups = np.concatenate(rewards)
    relative = {c: np.array(norms[c]) / np.array(norms["none"]) for c in CHOICES}
    return {
        "pass_rate": float(groups.mean()),
        "groups_of_equal_rewards": float((groups.std(1) == 0).mean()),
        "largest_advantage": {choice: float(np.max(own)) for choice, own in largest.items()},
        "gradient_over_no_std": {
            choice: interval(own.tolist()) for choice, own in relative.items()
        },
        "norm_largest_over_median": {
            choice: float(np.max(own) / np.median(own)) for choice, own in norms.items()
        },
    }


def weights_on_model(model: str, questions: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights of 16 questions, each from 64 responses."""
    learner = Learner(model, questions, {**flags, "group_size": 64}, groups=GROUPS)
    found = measured_weights(learner.sample(0).correct.reshape(GROUPS, 64).astype(float))
    return {name: [None if np.isnan(x) else float(x) for x in v] for name, v in found.items()}


def jobs(options: Options) -> list[Job]:
    """Return the runs at the paper's scale, on easy and on hard questions."""
    found = []
    for data in ("easy", "hard"):
        flags = settings(options) | {"questions": DATA[options.scale][data]}
        for choice, file in CHOICES.items():
            as_grpo = {"max_refills": 0, "overlong_cache": 0, "clip_eps_high": 0.2}
            own = flags | (as_grpo if file == "dapo" else {})
            found += seeded(f"std-{data}-{choice}", file, options.seeds, own)
    return found


def short_runs(learner: Learner, seeds: int) -> dict[str, np.ndarray]:
    """Return accuracies over training by choice, shape (seeds, steps), of one and the same loss."""
    loss = functions("dr_grpo").policy_loss
    return {
        choice: np.array([
            learner.train(functions(file).compute_advantages, loss, steps=STEPS, seed=seed)
            for seed in range(seeds)
        ])
        for choice, file in CHOICES.items()
    }  # fmt: skip


def compare(shares: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return accuracies in the last third of training, and their differences from no std."""
    mean = {choice: late(values) for choice, values in shares.items()}
    return {
        choice: {
            "late": interval(mean[choice].tolist()),
            "late_above_none": interval((mean[choice] - mean["none"]).tolist()),
            "curve": shares[choice].tolist(),
        }
        for choice in CHOICES
    }


def judge(figures: Mapping[str, Any], seeds: int) -> Verdict:
    """Return the verdict: group std below no std on easy data, and level with it on hard data."""
    runs, sampled = figures["runs"], figures["batches"]
    easy = runs["easy"]["group"]["late_above_none"]
    hard = runs["hard"]["group"]["late_above_none"]
    harmful, harmless = easy.high < 0, hard.high >= 0
    told = "; ".join(
        f"{where} ({100 * own['pass_rate']:.0f}% right, "
        f"{100 * own['groups_of_equal_rewards']:.0f}% of groups equal): gradient "
        f"{own['gradient_over_no_std']['group'].mean:.2g} × (group) and "
        f"{own['gradient_over_no_std']['batch'].mean:.2g} × (batch) that without std, largest "
        f"advantage {own['largest_advantage']['group']:.2g} and "
        f"{own['largest_advantage']['batch']:.2g}"
        for where, own in sampled.items()
    )
    return Verdict(
        "survey: LitePPO",
        "Dividing by the group's std harms on easy data, where it is near 0, and not on hard data; "
        "batch statistics gain with rewards of -1 and 1.",
        f"Accuracy in the last third of training, group std less none: easy {easy}, hard {hard}; "
        f"batch std less none: easy {runs['easy']['batch']['late_above_none']}, hard "
        f"{runs['hard']['batch']['late_above_none']}. Sampled batches: {told}. The exact weight "
        "of a question at a pass rate of 95% over one at 50% is "
        f"{figures['exact_ratio']['group']:.2f} by group std, "
        f"{figures['exact_ratio']['batch']:.2f} by batch std "
        "if the whole batch has that rate, and 1 without.",
        outcome(harmful, harmless) if harmful else "does not hold",
        "No advantage can exceed (G-1)/√G = 2.47 by the group's std, whatever the pass rate, and a "
        "group of equal rewards has the gradient 0: with two rewards nothing explodes. What grows "
        "on easy data is the weight of the rare failure, and it grows more by the std of a batch "
        "that is easy as a whole, whose advantages are bounded by √N only. Range: by any std the "
        "weights under -1/1 are those under 0/1 (exact), and without one they double, which Adam "
        "takes out again: the scale of rewards alone cannot tell the choices apart.",
        f"{seeds} seeds a run, {BATCHES} batches a gradient",
    )


def plot(figures: Mapping[str, Any]) -> Figure:
    """Draw weights by pass rate, gradients by data, and the runs."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    weights, norms = axes[0]
    for choice in CHOICES:
        weights.plot(100 * PASS_RATES, figures["exact"][choice], color=COLORS[choice],
                     label=f"{LABELS[choice]}, exact")  # fmt: skip
        for own in figures["weights"].values():
            measured = [np.nan if w is None else w for w in own[choice]]
            if choice != "batch":  # whose batch mixes pass rates, which the curve does not
                weights.plot(100 * np.array(own["pass_rate"]), measured, ".", color=COLORS[choice],
                             alpha=0.4)  # fmt: skip
    weights.set_xlabel("pass rate of the question, %")
    weights.set_ylabel("weight of the question")
    weights.set_title("weight c of ∇p; dots: 16 questions of 64 responses, each model and level")
    weights.set_ylim(0, 5)
    places = np.arange(len(figures["batches"]))
    for number, choice in enumerate(CHOICES):
        own = [batch["gradient_over_no_std"][choice].mean for batch in figures["batches"].values()]
        norms.bar(places + 0.27 * (number - 1), own, 0.27, color=COLORS[choice],
                  label=LABELS[choice])  # fmt: skip
    norms.set_xticks(places, [name.replace(", ", "\n") for name in figures["batches"]])
    norms.set_ylabel("gradient norm / that without std")
    for panel, data in zip(axes[1], ("easy", "hard"), strict=True):
        for choice in CHOICES:
            values = np.array(figures["runs"][data][choice]["curve"])
            steps = np.arange(values.shape[1]) + 1
            draw(panel, steps, values, LABELS[choice], COLORS[choice])
        panel.set_title(f"runs on {data} data")
        panel.set_xlabel("step")
        panel.set_ylabel("share of right answers in training")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


@claim_options(seeds=3)
def main(options: Options) -> None:
    """Compare three divisors of advantages: exactly, on sampled batches, and in short runs."""
    trained = trained_model(options, "std")
    checkpoint = checkpoint_of(options, trained)
    runs = [] if options.is_tiny else jobs(options)
    if options.dry_run:
        train(options, [trained, *runs])
    folders = train(options, [trained, *runs])
    flags = settings(options, group_size=GROUP)
    figures: dict[str, Any] = {
        "exact": {c: [exact_weight(c, p) for p in PASS_RATES] for c in CHOICES},
        "exact_ratio": {c: exact_weight(c, 0.95) / exact_weight(c, 0.5) for c in CHOICES},
        "range_ratio": {
            c: exact_weight(c, 0.8, -1.0, 1.0) / exact_weight(c, 0.8) for c in CHOICES
        },
        "batches": {}, "weights": {}, "runs": {},
    }  # fmt: skip
    for start, model in {"base": str(trained.flags["model"]), "trained": checkpoint}.items():
        for data, questions in DATA[options.scale].items():
            learner = Learner(model, questions, flags, groups=GROUPS)
            figures["batches"][f"{start}, {data}"] = batches(learner)
            figures["weights"][f"{start}, {data}"] = weights_on_model(model, questions, flags)
            if options.is_tiny and (start, data) in (("trained", "easy"), ("base", "hard")):
                figures["runs"][data] = compare(short_runs(learner, options.seeds))
    for data in () if options.is_tiny else ("easy", "hard"):
        own = {c: by_seed(folders, f"std-{data}-{c}", options.seeds) for c in CHOICES}
        figures["runs"][data] = compare(
            {c: curves(found, "reward/accuracy")[1] for c, found in own.items()}
        )
    write(
        options, "std_choices", "What to divide advantages by", judge(figures, options.seeds),
        figures, plot(figures),
    )  # fmt: skip


if __name__ == "__main__":
    main()
