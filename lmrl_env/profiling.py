"""``--profile``: a trace of a few steps, their operators, and the time ledger as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from lmrl_env.durable import write_text
from lmrl_env.ledger import PARTS, PREFIX

WARM_UP = 2
"""Steps before those that are traced."""


def trace_steps(steps: int, folder: Path) -> profile:
    """Return a profiler that writes ``trace.json.gz`` and ``operators.txt`` when it has its steps.

    Args:
        steps: that are traced, after ``WARM_UP`` others; its ``step`` ends one.
        folder: of the run.
    """

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        on_gpu = ProfilerActivity.CUDA in supported_activities()
        sort_by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=sort_by, row_limit=30)
        write_text(folder / "operators.txt", table)

    return profile(
        schedule=schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1), on_trace_ready=write
    )


def write_ledger(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write ``ledger.json`` and ``ledger.png``: seconds by part, a stacked bar a step.

    Args:
        rows: of ``metrics.jsonl``.
        folder: of the run.
    """
    from matplotlib.figure import Figure

    timed = [row for row in rows if f"{PREFIX}other" in row]
    seconds = [
        {"step": row["step"], **{part: row[PREFIX + part] for part in PARTS}} for row in timed
    ]
    write_text(folder / "ledger.json", json.dumps(seconds, indent=2) + "\n")
    figure: Any = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    steps, bottoms = [row["step"] for row in seconds], [0.0] * len(seconds)
    for index, part in enumerate(PARTS):
        heights = [row[part] for row in seconds]
        color = "0.7" if part == "other" else f"C{index}" if index < 10 else "k"
        axes.bar(steps, heights, 1.0, bottom=bottoms, label=part, color=color)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "ledger.png", dpi=120)
