"""What a run shows while it works: a progress bar and a table of the numbers that matter."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = (
    ("step", "step", "{:d}"),
    ("reward", "reward/mean", "{:.3f}"),
    ("held-out", "eval/accuracy", "{:.1%}"),
    ("right", "length/correct", "{:.1f}"),
    ("wrong", "length/incorrect", "{:.1f}"),
    ("cut", "length/truncated_fraction", "{:.1%}"),
    ("entropy", "policy/entropy", "{:.3f}"),
    ("grad", "policy/grad_norm", "{:.2g}"),
    ("tokens/s", "throughput/sample_tokens_per_s", "{:.0f}"),
)
"""Heading, key of ``metrics.jsonl`` and format; "right", "wrong" are mean lengths in tokens."""

ROWS = 12


class ProgressDisplay:
    """A live table and bar on a terminal; one line a row elsewhere.

    Args:
        steps: in all.
        first_step: already done.
        enabled: False shows nothing, as on ranks other than the first.
    """

    def __init__(self, steps: int, first_step: int, enabled: bool):
        self.console = Console(quiet=not enabled)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("training", total=steps, completed=first_step)
        self._kept: list[Mapping[str, Any]] = []
        self._latest: Mapping[str, Any] | None = None
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._interactive = enabled and self.console.is_terminal
        self._enabled = enabled

    def __enter__(self) -> ProgressDisplay:
        if self._interactive:
            self._live.start()
        elif self._enabled:
            self._print_line([heading for heading, _, _ in COLUMNS])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._interactive:
            self._live.stop()
            self.console.print(self._table())

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a step; those with an evaluation stay in the table."""
        if not self._enabled:
            return
        self._progress.update(self._task, completed=metrics["step"])
        evaluated = "eval/accuracy" in metrics
        if evaluated:
            self._kept.append(metrics)
        self._latest = None if evaluated else metrics
        if self._interactive:
            self._live.update(Group(self._table(), self._progress), refresh=True)
        elif evaluated:
            self._print_line(_cells(metrics))

    def _print_line(self, cells: list[str]) -> None:
        self.console.print(" ".join(f"{cell:>8}" for cell in cells), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(*[heading for heading, _, _ in COLUMNS], box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for metrics in self._kept[-ROWS:]:
            table.add_row(*_cells(metrics))
        if self._latest is not None:
            table.add_row(*_cells(self._latest), style="dim")
        return table


def _cells(metrics: Mapping[str, Any]) -> list[str]:
    values = [(metrics.get(key), form) for _, key, form in COLUMNS]
    return ["" if value is None else form.format(value) for value, form in values]
