"""Overlong filtering by budget: does leaving truncated responses out of the loss help?

Claims of the survey (DAPO, arXiv:2503.14476, section 3.4; LitePPO, arXiv:2508.08221): a truncated
response may be right but unfinished, so that punishing it is noise. Leaving it out of the loss
helps under a tight budget (8k tokens) and does nothing under a loose one (20k). DAPO's other means
is a punishment that grows over the last tokens of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claim import Job, Options, Verdict, claim_options, curves, draw, interval, train, write
from matplotlib.figure import Figure
from survey import by_seed, last_third, outcome, seeded, settings

BUDGETS = {"tiny": {"tight": 56, "loose": 96}, "paper": {"tight": 1000, "loose": 3000}}
CACHE = {"tiny": 16, "paper": 500}
WAYS = {"kept, reward 0": "kept", "filtered": "filtered", "punished": "punished"}
COLORS = {"kept, reward 0": "C3", "filtered": "C0", "punished": "C1"}
KEYS = {
    "reward/accuracy": "share of right answers in training",
    "length/truncated_fraction": "share of truncated responses",
    "length/mean": "mean length, tokens",
}


def jobs(options: Options) -> list[Job]:
    """Return DAPO's runs without refills, which would hide groups of truncated responses."""
    found = []
    for budget, tokens in BUDGETS[options.scale].items():
        flags = settings(options, max_new_tokens=tokens, max_refills=0)
        for way in WAYS.values():
            own = {
                "overlong_filter": True if way == "filtered" else None,
                "overlong_cache": CACHE[options.scale] if way == "punished" else 0,
            }
            found += seeded(f"overlong-{budget}-{way}", "dapo", options.seeds, flags | own)
    return found


def measure(folders: Mapping[str, Path], budget: str, seeds: int) -> dict[str, Any]:
    """Return figures by way of treating truncated responses, differences from ``kept`` by seed."""
    runs = {name: by_seed(folders, f"overlong-{budget}-{way}", seeds) for name, way in WAYS.items()}
    final = {name: curves(own, "eval/accuracy")[1][:, -1] for name, own in runs.items()}
    start = curves(runs["filtered"], "length/truncated_fraction")[1][:, 0]
    return {
        name: {key: interval(last_third(own, key)) for key in KEYS}
        | {
            "truncated_at_first": interval(start),
            "accuracy": interval(final[name]),
            "accuracy_gain": interval(final[name] - final["kept, reward 0"]),
            "training_gain": interval(
                last_third(own, "reward/accuracy")
                - last_third(runs["kept, reward 0"], "reward/accuracy")
            ),
        }
        for name, own in runs.items()
    }


def judge(figures: Mapping[str, Any], scale: str, seeds: int) -> Verdict:
    """Return the verdict: the gain by filtering under either budget, by interval over seeds."""
    gains = {budget: figures[budget]["filtered"]["training_gain"] for budget in figures}
    helps, nothing = gains["tight"].low > 0, gains["loose"].low <= 0 <= gains["loose"].high
    measured = "; ".join(
        f"{BUDGETS[scale][budget]} tokens, where "
        f"{100 * own['filtered']['truncated_at_first'].mean:.2g}% are truncated at first: "
        f"filtering changes the share of right answers in the last third of training by "
        f"{gains[budget]} (held out, at the end, {own['filtered']['accuracy_gain']}), the "
        f"punishment by {own['punished']['training_gain']}; truncated then: "
        + ", ".join(
            f"{name} {100 * way['length/truncated_fraction'].mean:.2g}%"
            for name, way in own.items()
        )
        for budget, own in figures.items()
    )
    return Verdict(
        "survey: DAPO 3.4, LitePPO",
        "Leaving truncated responses out of the loss helps under a tight budget and does nothing "
        "under a loose one.",
        measured + ".",
        outcome(helps, nothing) if helps else "does not hold",
        "A filtered response loses its gradient, so that nothing but the right answers teaches the "
        "policy to finish in time: more stay truncated, and as many are right. The punishment is "
        "the test of whether to finish in time is what is to be learned: its last "
        f"{CACHE[scale]} tokens, as many under either budget, are where "
        "right answers end under the tight one, and it then unlearns these with the truncated.",
        f"{seeds} seeds a budget and way",
    )


def plot(folders: Mapping[str, Path], seeds: int) -> Figure:
    """Draw accuracy, truncation and length over training, a row a budget."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    rows = figure.subplots(2, 3, sharex=True)
    for row, budget in zip(rows, ("tight", "loose"), strict=True):
        for axes, (key, label) in zip(row, KEYS.items(), strict=True):
            for name, way in WAYS.items():
                own = by_seed(folders, f"overlong-{budget}-{way}", seeds)
                draw(axes, *curves(own, key), name, COLORS[name])
            axes.set_title(f"{budget} budget", fontsize=10)
            axes.set_ylabel(label)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
    figure.axes[0].legend(title="truncated responses", fontsize=8)
    return figure


@claim_options(seeds=3)
def main(options: Options) -> None:
    """Train under a tight and a loose budget, with three ways of treating truncated responses."""
    folders = train(options, jobs(options))
    figures = {budget: measure(folders, budget, options.seeds) for budget in BUDGETS[options.scale]}
    write(
        options, "overlong_filtering", "Overlong filtering by budget",
        judge(figures, options.scale, options.seeds), figures, plot(folders, options.seeds),
    )  # fmt: skip


if __name__ == "__main__":
    main()
