"""What the commands print."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from lmrl_env.tables import Table

PLAIN_WIDTH = 200
"""Columns where the output is no terminal and COLUMNS is not set: a table in a file is whole."""

_BEGINS_NUMBER = ("", *"0123456789+-–")


def print_table(table: Table) -> None:
    """Print a table to the standard output; row by row, as text, where the columns do not fit."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    shown = RichTable(
        box=box.SIMPLE_HEAD, title=table.title or None, title_justify="left", pad_edge=False
    )
    for i, heading in enumerate(table.headings):
        is_number = all(row[i][:1] in _BEGINS_NUMBER for row in table.rows)
        shown.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number)
    for row in table.rows:
        shown.add_row(*map(escape, row))
    unlimited = console.options.update(max_width=10**6)
    if Measurement.get(console, unlimited, shown).minimum <= console.width:
        console.print(shown)
    else:
        console.print(table.title, style="italic", markup=False, highlight=False)
        for row in table.rows:
            cells = zip(table.headings[1:], row[1:], strict=True)
            text = ", ".join(f"{heading} {cell}" for heading, cell in cells if cell)
            console.print(f"{row[0]}: {text}", markup=False, highlight=False)
    for note in table.notes:
        console.print(note, style="dim", markup=False, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON to the standard output."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def warn(text: str) -> None:
    """Print a warning to the standard error, in red where colours are shown."""
    click.secho(f"Warning: {text}", fg="red", bold=True, err=True)
