"""Clip-higher against entropy: does a higher upper bound of the ratio keep the policy exploring?

Claims of the survey (DAPO, arXiv:2503.14476, section 3.1; LitePPO, arXiv:2508.08221): clipping
the ratio at 1 + 0.2 keeps unlikely tokens from growing, so that entropy collapses; 1 + 0.28, or
0.32 on a small aligned model, keeps it up. A base model gains little, since it clips little.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claim import Job, Options, Verdict, claim_options, curves, draw, interval, train, write
from matplotlib.figure import Figure
from survey import by_seed, checkpoint_of, last_third, outcome, seeded, settings, trained_model

BOUNDS = {"0.2": 0.2, "0.28 (DAPO)": 0.28, "0.32 (LitePPO)": 0.32, "none": 1e6}
COLORS = {"0.2": "C3", "0.28 (DAPO)": "C0", "0.32 (LitePPO)": "C9", "none": "C7"}
START = {"base model": "base", "trained model": "trained"}
KEYS = {
    "policy/entropy": "entropy, nats a token",
    "policy/clip_fraction_high": "share of tokens clipped above",
    "reward/mean": "reward in training",
}


def jobs(options: Options, model: str, start: str) -> list[Job]:
    """Return the runs from one starting point; eight updates a batch, so that clipping acts."""
    tiny = {"steps": 12, "updates_per_step": 4, "epochs": 2} if options.is_tiny else {}
    flags = settings(options, **tiny, clip_eps_low=0.2)
    flags |= {"model": model} if start == "trained" else {}
    return [
        job
        for bound in BOUNDS.values()
        for job in seeded(
            f"clip-higher-{start}-{bound:g}",
            "grpo",
            options.seeds,
            flags | {"clip_eps_high": bound},
        )
    ]


def measure(folders: Mapping[str, Path], start: str, seeds: int) -> dict[str, Any]:
    """Return figures by bound: of the last third, and entropy's difference from 0.2 by seed."""
    runs = {
        name: by_seed(folders, f"clip-higher-{start}-{bound:g}", seeds)
        for name, bound in BOUNDS.items()
    }
    keys = (*KEYS, "policy/clip_fraction_low", "policy/approx_kl")
    late = {name: {key: last_third(own, key) for key in keys} for name, own in runs.items()}
    kept = {
        name: own["policy/entropy"] - late["0.2"]["policy/entropy"] for name, own in late.items()
    }
    accuracy = {name: curves(own, "eval/accuracy")[1] for name, own in runs.items()}
    return {
        name: {key: interval(values) for key, values in late[name].items()}
        | {"entropy_above_0.2": interval(kept[name])}
        | {"accuracy": interval(accuracy[name][:, -1]), "before": interval(accuracy[name][:, 0])}
        for name in BOUNDS
    }


def judge(figures: Mapping[str, Any], seeds: int) -> Verdict:
    """Return the verdict: clip-higher's entropy against that of 0.2, by interval over seeds."""
    gains = {s: figures[s]["0.28 (DAPO)"]["entropy_above_0.2"] for s in figures}
    wider = {s: figures[s]["0.32 (LitePPO)"]["entropy_above_0.2"] for s in figures}
    free = {s: figures[s]["none"]["entropy_above_0.2"] for s in figures}
    clipped = {s: figures[s]["0.2"]["policy/clip_fraction_high"] for s in figures}
    above = [gain.low > 0 for gain in (*gains.values(), *wider.values())]
    trained = figures["trained model"]
    free_accuracy, bound_accuracy = (trained[bound]["accuracy"] for bound in ("none", "0.2"))
    measured = "; ".join(
        f"{start}: entropy in the last third of training differs from clip 0.2's by {gains[start]} "
        f"nats a token at 0.28, {wider[start]} at 0.32 and {free[start]} without an upper bound, "
        f"where 0.2 clips {100 * clipped[start].mean:.2g}% of the tokens above"
        for start in figures
    )
    return Verdict(
        "survey: DAPO 3.1, LitePPO",
        "A higher upper clip (0.28, 0.32) keeps entropy up, on trained models more than on base "
        "models.",
        measured + ".",
        outcome(*above),
        "Taking the upper bound away altogether is the test of what any bound can do. At so small "
        "a clipped share it does not move entropy clearly either: entropy falls because the policy "
        "learns, and what is held out ends, from the trained model, at an accuracy of "
        f"{free_accuracy} without a bound and {bound_accuracy} with 0.2.",
        f"{seeds} seeds a bound and starting point",
    )


def plot(folders: Mapping[str, Path], seeds: int) -> Figure:
    """Draw entropy, clipped share and reward over training, a row a starting point."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for row, (title, start) in zip(figure.subplots(2, 3, sharex=True), START.items(), strict=True):
        for axes, (key, label) in zip(row, KEYS.items(), strict=True):
            for name, bound in BOUNDS.items():
                own = by_seed(folders, f"clip-higher-{start}-{bound:g}", seeds)
                draw(axes, *curves(own, key), name, COLORS[name])
            axes.set_title(title, fontsize=10)
            axes.set_ylabel(label)
            axes.set_xlabel("step, of 8 updates")
            axes.grid(alpha=0.3)
    figure.axes[0].legend(title="upper clip ε", fontsize=8)
    return figure


@claim_options(seeds=3)
def main(options: Options) -> None:
    """Train with four upper clips, from a base model and from a trained one."""
    trained = trained_model(options, "clip-higher")
    later = jobs(options, checkpoint_of(options, trained), "trained")
    base = jobs(options, "", "base")
    if options.dry_run:
        train(options, [trained, *base, *later])
    folders = train(options, [trained, *base]) | train(options, later)
    figures = {title: measure(folders, start, options.seeds) for title, start in START.items()}
    write(
        options, "clip_higher", "Clip-higher against entropy", judge(figures, options.seeds),
        figures, plot(folders, options.seeds),
    )  # fmt: skip


if __name__ == "__main__":
    main()
