"""The tutorial: it runs from the first cell to the last, and says what its outputs say."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"


def printed(notebook):
    """Return what the cells print, joined."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def figures(text):
    """Return angles of the two estimators, in degrees, and accuracy before and after, in %."""
    right, wrong = re.findall(r"angle to ∇J +(\S+)°", text)
    before, after = re.search(r"accuracy (\d+)% before, (\d+)% after", text).groups()
    return float(right), float(wrong), int(before), int(after)


@pytest.mark.slow
def test_the_tutorial_runs_and_its_committed_outputs_are_what_it_says():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    committed = printed(notebook)
    NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(TUTORIAL.parent)}}
    ).execute()
    for text in (committed, printed(notebook)):
        right, wrong, before, after = figures(text)
        assert right < 1e-6 < 1 < wrong
        assert before + 15 < after
    # what no machine may change: texts up to the sampled responses aside
    assert (
        committed.partition("advantages")[0].splitlines()[:8]
        == (printed(notebook).partition("advantages")[0].splitlines()[:8])
    )


def test_the_tutorial_has_fifteen_cells_with_outputs_and_is_small():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    assert len(notebook.cells) == 15
    assert all(cell.outputs for cell in notebook.cells[3:] if cell.cell_type == "code")
    assert TUTORIAL.stat().st_size < 100_000
