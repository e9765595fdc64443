"""Exploration of base models (section 2.1, Fig. 3 middle).

Every base model explores: at every temperature at least one of eight responses is right for some
questions, so that reinforcement learning finds something to reinforce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from bases import (
    COLORS,
    PAPER_MODELS,
    Evaluation,
    accuracy,
    base_models,
    evaluate,
    percent,
    question_means,
)
from claim import Interval, Options, Verdict, claim_options, write
from matplotlib.figure import Figure

from lmrl_env.samples import Sample

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
TEMPLATE = {"qa": "none", "text": "r1", "mixed": "r1"}
"""That a base model answers under."""
Curve = dict[float, dict[str, Interval]]


def any_right(samples: Sequence[Sample]) -> float:
    """Return 1 if one of the responses to a question is right, else 0."""
    return float(any(sample.status == "correct" for sample in samples))


def draw_curves(curves: Mapping[str, Curve]) -> Figure:
    """Draw pass@8 and accuracy against temperature, with bands."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("pass@8", "accuracy"), strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            values = np.array([curve[t][key] for t in curve])
            color = COLORS.get(name, f"C{i}")
            axes.plot(list(curve), values[:, 0], "o-", color=color, label=name)
            axes.fill_between(list(curve), values[:, 1], values[:, 2], color=color, alpha=0.2, lw=0)
        axes.set(xlabel="temperature", ylabel=f"{key} (share of questions)", ylim=(0, None))
        axes.set_title(key)
    figure.axes[0].legend(title="base model")
    return figure


@claim_options(seeds=2)
def main(options: Options) -> None:
    """Measure pass@8 of base models against temperature."""
    if options.is_tiny:
        models = {**base_models(options), "mixed": [options.model or "tiny"]}
        flags = {"suite": "arithmetic:level=1", "limit": 64, "n": 8, "max_new_tokens": 96}
    else:
        names = [options.model] if options.model else PAPER_MODELS
        models = {name: [name] for name in names}
        flags = {"suite": "math500", "n": 8, "max_new_tokens": 3000, "dtype": "bfloat16"}
    template = {name: TEMPLATE.get(name, "none" if "Qwen" in name else "r1") for name in models}
    evaluations = {
        (t, kind): Evaluation(
            f"exploration-{options.scale}-{kind}-{t}",
            [m for name, seeds in models.items() if template[name] == kind for m in seeds],
            {**flags, "temperature": t, "template": kind},
        )
        for kind in dict.fromkeys(template.values())
        for t in TEMPERATURES
    }
    samples = evaluate(options, list(evaluations.values()))
    if options.dry_run:
        return
    curves: dict[str, Curve] = {
        name: {
            t: {
                "pass@8": question_means(
                    samples[evaluations[t, template[name]].name], seeds, any_right
                ),
                "accuracy": question_means(
                    samples[evaluations[t, template[name]].name], seeds, accuracy
                ),
            }
            for t in TEMPERATURES
        }
        for name, seeds in models.items()
    }
    lows = [row["pass@8"].low for curve in curves.values() for row in curve.values()]
    best = {
        name: max(curve, key=lambda t: curve[t]["pass@8"].mean) for name, curve in curves.items()
    }
    measured = "; ".join(
        f"{name} ({template[name]} template): pass@8 is {percent(curve[0.2]['pass@8'])} at "
        f"temperature 0.2, {percent(curve[1.0]['pass@8'])} at 1.0, highest at {best[name]}"
        for name, curve in curves.items()
    )
    verdict = Verdict(
        "section 2.1, Fig. 3 middle",
        "Every base model explores: its pass@8 is above 0 at every temperature.",
        measured,
        "holds" if min(lows) > 0 else "partly" if max(lows) > 0 else "does not hold",
        f"The lowest end of all {len(lows)} intervals is {min(lows):.1%}. Below temperature 1 "
        "the eight responses are expected to be less various, above it each less accurate. That "
        "the tiny models mix careful and careless solutions is by construction.",
        f"{options.seeds} pretraining seeds of qa and text, one of mixed; 95% intervals by "
        "bootstrap over questions, 8 responses each",
    )
    rows = ["| base model | temperature | pass@8 | right |", "|---|---|---|---|"]
    rows += [
        f"| {name} | {t} | {percent(row['pass@8'])} | {percent(row['accuracy'])} |"
        for name, curve in curves.items()
        for t, row in curve.items()
    ]
    figures = {"curves": curves, "templates": template}
    title = "Exploration of base models"
    write(options, "exploration", title, verdict, figures, draw_curves(curves), "\n".join(rows))


if __name__ == "__main__":
    main()
