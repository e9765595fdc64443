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
