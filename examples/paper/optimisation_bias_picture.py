"""The picture of ``optimisation_bias.py``: curves, tails, control, and what enumeration says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claim import curves, draw
from drift import WORLDS
from matplotlib.figure import Figure

STEPS_OF = ("dr_grpo", "grpo_without_length", "grpo_without_std", "grpo")
ENDS = ("dr_grpo", "grpo")
OTHERS = ("cispo", "dapo", "gspo", "lite_ppo", "ppo", "reinforce_pp", "rloo")
COLORS = {"grpo": "C3", "dr_grpo": "C0", "grpo_without_std": "C1", "grpo_without_length": "C2"}
COLORS |= dict(zip(OTHERS, ("C1", "C2", "C4", "C5", "C6", "C7", "C8"), strict=True))

Runs = dict[str, list[Path]]
"""Folders, one a seed, by algorithm."""


def efficiency(folders: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return right answers per 1,000 generated tokens, over steps."""
    steps, right = curves(folders, "reward/accuracy")
    return steps, 1000 * right / curves(folders, "length/mean")[1]


def bins(steps: np.ndarray, values: np.ndarray, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return means over so many steps; nan where a run has none.

    >>> bins(np.array([1, 2, 3, 4]), np.array([[1.0, 3.0, 5.0, 7.0]]), 2)
    (array([1.5, 3.5]), array([[2., 6.]]))
    """
    whole = len(steps) // width * width
    shaped = values[:, :whole].reshape(len(values), -1, width)
    return steps[:whole].reshape(-1, width).mean(axis=1), np.nanmean(shaped, axis=2)


def panel(axes: Any, runs: Runs, key: str, title: str, unit: str) -> None:
    """Draw a metric of several algorithms over training."""
    for name, folders in runs.items():
        found = efficiency(folders) if key == "efficiency" else curves(folders, key)
        draw(axes, *bins(*found), name, COLORS[name])
    axes.set(title=title, ylabel=unit, xlabel="step")


def tail_panel(axes: Any, tails: Mapping[str, Any], kind: str, title: str) -> None:
    """Draw the expected tail sentences over training."""
    for name, of_name in tails.items():
        values = np.array(of_name[kind])
        draw(axes, 10 * np.arange(values.shape[1]), values, name, COLORS[name])
    axes.set(title=title, ylabel="tail sentences", xlabel="step")


def bars(axes: Any, values: Mapping[str, tuple[float, float]], title: str, unit: str) -> None:
    """Draw a pair of figures, after wrong and after right, for each algorithm."""
    names = list(values)
    for i, (kind, color) in enumerate((("wrong", "0.2"), ("right", "0.7"))):
        rows = np.arange(len(names)) - 0.2 + 0.4 * i
        axes.barh(rows, [values[name][i] for name in names], 0.38, color=color, label=kind)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)


CURVES = (
    ("reward/mean", "reward", "mean reward"),
    ("length/mean", "length, all answers", "tokens"),
    ("length/incorrect", "length, wrong (ended)", "tokens"),
    ("length/correct", "length, right", "tokens"),
    ("length/truncated_fraction", "cut off by the budget", "share of answers"),
    ("efficiency", "token efficiency", "right answers per 1,000 tokens"),
)
SHORT = (CURVES[0], CURVES[2], CURVES[5])


def curve_rows(axes: Any, main: Runs, others: Runs) -> None:
    """Draw two rows of the main comparison and one of the others."""
    for place, (key, title, unit) in zip(axes[:2].flat, CURVES, strict=True):
        panel(place, main, key, title, unit)
    for place, (key, title, unit) in zip(axes[2], SHORT, strict=True):
        panel(place, {name: main[name] for name in ENDS} | others, key, f"others: {title}", unit)
    axes[0, 0].legend(fontsize=8)
    axes[2, 0].legend(fontsize=8, ncols=2)


def tail_rows(axes: Any, others: Runs, tails: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a row of the tails in the main runs, and one of the control and of all algorithms."""
    of_main = {name: tails["tiny"][name] for name in STEPS_OF}
    rest = {name: tails["tiny"][name] for name in (*ENDS, *others)}
    tail_panel(axes[0, 0], of_main, "wrong", "tails after wrong results")
    tail_panel(axes[0, 1], of_main, "right", "tails after right results")
    tail_panel(axes[0, 2], rest, "wrong", "others: tails after wrong results")
    for place, kind in zip(axes[1], ("wrong", "right"), strict=False):
        tail_panel(place, tails["coin"], kind, f"control, coin: tails after {kind} results")
    drawn = (*axes[0], *axes[1, :2])
    limits = np.array([place.get_ylim() for place in drawn])
    for place in drawn:
        place.set_ylim(limits.min(), limits.max())
    changes = {}
    for name, of_name in tails["tiny"].items():
        wrong, right = (np.array(of_name[kind]) for kind in ("wrong", "right"))
        changes[name] = ((wrong[:, -1] - wrong[:, 0]).mean(), (right[:, -1] - right[:, 0]).mean())
    bars(axes[1, 2], changes, "the runs: change of the tails", "tail sentences")


def picture_of(
    main: Runs, others: Runs, tails: Mapping[str, Mapping[str, Any]],
    exact: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> Figure:  # fmt: skip
    """Draw curves, tails and control where they are known, and what the enumeration says."""
    rows = 6 if tails else 4
    figure = Figure(figsize=(13, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3)
    curve_rows(axes, main, others)
    if tails:
        tail_rows(axes[3:5], others, tails)
    for place, world in zip(axes[-1], WORLDS, strict=True):
        drifts = {name: (d["wrong"], d["right"]) for name, d in exact[world].items()}
        bars(place, drifts, f"exact: {world}", "sentences per unit of update")
        place.set_xlim(-0.06, 0.06)
    axes[-1, -1].legend(title="after a result that is", fontsize=8, loc="center right")
    return figure
