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


RIGHT, WRONG, BOTH = "#0072B2", "#D55E00", "#444444"  # Okabe and Ito's, told apart by all eyes


def plot_comparison(figures: Mapping[str, Any], path: Path, title: str) -> None:
    """Draw what algorithms do with one batch: angles and norms, length bias, difficulty bias.

    Args:
        figures: as ``analysis.report`` returns them.
        path: of the PNG.
        title: over the picture.
    """
    from matplotlib.figure import Figure

    files = figures["files"]
    width = max(8.0, 1.8 * len(files))
    figure: Any = Figure(figsize=(width, 10.5), layout="constrained")
    figure.suptitle(title)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.2, 1.0))
    _draw_gradients(top.subplots(1, 2, width_ratios=(1.4, 1.0)), files)
    panels = bottom.subplots(2, len(files), sharex="row", sharey="row", squeeze=False)
    lengths, pass_rates = figures["responses"]["length"], figures["pass_rates"]
    for axes, file in zip(panels[0], files, strict=True):
        axes.set_title(file["name"], fontsize=10, fontweight="bold")
        _draw_law(axes, file["length"]["right"], lengths, "right α = ", RIGHT, "o", 6)
        _draw_law(axes, file["length"]["wrong"], lengths, "wrong α = ", WRONG, ".", 3)
        axes.set_xlabel("length (tokens)", fontsize=8)
    for axes, file in zip(panels[1], files, strict=True):
        _draw_law(axes, file["difficulty"], pass_rates, "β = ", BOTH, "o", 6)
        axes.set_xlabel("pass rate", fontsize=8)
        axes.set_xlim(0, 1)
    names = ("length bias:\nweight of a token", "difficulty bias:\nweight of a question")
    for row, name in zip(panels, names, strict=True):
        row[0].set_ylabel(name, fontsize=9)
        row[0].set_ylim(0, max(1.2, *(axes.dataLim.y1 for axes in row)) * 1.35)
        for axes in row:
            axes.axhline(1, color="black", linewidth=0.8, alpha=0.4, zorder=0)
            axes.tick_params(labelsize=8)
            axes.legend(fontsize=8, loc="upper right", handletextpad=0, frameon=False)
    figure.savefig(path, dpi=120)


def _draw_law(
    axes: Any,
    law: Mapping[str, Any],
    quantity: Sequence[float],
    name: str,
    colour: str,
    marker: str,
    size: float,
) -> None:
    exponent = "–" if law["exponent"] is None else f"{law['exponent']:z.2f}"
    x = [quantity[row] for row in law["rows"]]
    axes.plot(
        x, law["relative_weight"], marker, color=colour, markersize=size, alpha=0.5,
        markerfacecolor="none" if marker == "o" else None, label=name + exponent,
    )  # fmt: skip


def _draw_gradients(axes: Any, files: Sequence[Mapping[str, Any]]) -> None:
    names = [file["name"] for file in files]
    cosines = [[float("nan") if c is None else c for c in file["cosines"]] for file in files]
    least = min([0.9, *(c for row in cosines for c in row if c == c)])
    axes[0].imshow(cosines, vmin=least, vmax=1, cmap="cividis")
    for i, file in enumerate(files):
        for j, cosine in enumerate(file["cosines"]):
            text = "–" if cosine is None else f"{cosine:.3f}"
            dark = cosine is not None and cosine < (1 + least) / 2
            colour = "white" if dark else "black"
            axes[0].text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axes[0].set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_title("cosine of the angle between gradients", fontsize=10)
    norms = [file["gradient_norm"] for file in files]
    axes[1].plot(norms, names, "o", color=BOTH)
    for norm, name in zip(norms, names, strict=True):
        axes[1].annotate(
            f"{norm:.3g}", (norm, name), (6, 5), textcoords="offset points", fontsize=8
        )
    if min(norms) > 0:
        axes[1].set_xscale("log")
    axes[1].margins(x=0.15)
    axes[1].invert_yaxis()
    axes[1].grid(alpha=0.3)
    axes[1].set_title("norm of the gradient", fontsize=10)
