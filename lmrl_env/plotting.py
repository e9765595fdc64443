"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("accuracy", {"eval/accuracy": "held-out", "reward/mean": "training reward"}),
    ("response length (tokens)", {"length/correct": "right", "length/incorrect": "wrong"}),
    ("truncated share", {"length/truncated_fraction": "truncated"}),
    ("entropy (nats per token)", {"policy/entropy": "entropy"}),
)


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw accuracy, lengths, truncation and entropy over the steps of a run.

    Args:
        rows: of ``metrics.jsonl``.
        path: of the PNG.
        title: over the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, series) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for key, label in series.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                marker = "o" if key.startswith("eval/") else None
                axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_runs(groups: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Draw the panels of several runs: a line for each group, a band over its runs.

    A line is the mean over the runs that have the number at that step; its band reaches from the
    least to the greatest of them.

    Args:
        groups: by name, such as that of the algorithm, the rows of each run's ``metrics.jsonl``.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(12, 10), layout="constrained")
    panels = [
        (f"{title}: {label}" if len(series) > 1 else title, key)
        for title, series in PANELS
        for key, label in series.items()
    ]
    for axes, (title, key) in zip(figure.subplots(3, 2).flat, panels, strict=True):
        for i, (name, runs) in enumerate(sorted(groups.items())):
            steps, least, mean, greatest = band(runs, key)
            if steps:
                label = f"{name}, {len(runs)} runs" if len(runs) > 1 else name
                axes.plot(steps, mean, color=f"C{i % 10}", label=label)
                axes.fill_between(steps, least, greatest, color=f"C{i % 10}", alpha=0.2, lw=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    names: dict[str, Any] = {}
    for axes in figure.axes:
        names |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if names:
        figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)


def band(
    runs: Sequence[Sequence[Mapping[str, Any]]], key: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return steps, and the least, the mean and the greatest of a number over runs.

    >>> band([[{"step": 0, "x": 1.0}], [{"step": 0, "x": 3.0}, {"step": 1, "x": 5.0}]], "x")
    ([0, 1], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0])

    Args:
        runs: rows of each run's ``metrics.jsonl``.
        key: of the number; rows without it, or with None, do not count.
    """
    values: dict[int, list[float]] = {}
    for rows in runs:
        for row in rows:
            if row.get(key) is not None:
                values.setdefault(row["step"], []).append(row[key])
    steps = sorted(values)
    return (
        steps,
        [min(values[step]) for step in steps],
        [sum(values[step]) / len(values[step]) for step in steps],
        [max(values[step]) for step in steps],
    )
