"""The page of benchmarks, rendered from results made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TRL = {
    "R1 prompts": {
        "wall_ratio": 4.25,
        "wall_ratio_range": [4.0, 4.6],
        "wall_seconds": {"lmrl_env": 0.5, "trl": 2.125},
        "floor_share": 0.5,
        "sides": {"lmrl_env": {"above_start_mib": 700.0}, "trl": {"above_start_mib": 1684.0}},
    }
}


@pytest.fixture
def render(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import page

    def from_records(**figures):
        for name, values in figures.items():
            record = {"date": "2026-01-02", "commit": "abc", "hardware": "H", "figures": values}
            (tmp_path / f"{name}.json").write_text(json.dumps(record))
        return page.render(tmp_path)

    yield from_records
    sys.modules.pop("page")


def line_of(page, work):
    return next(line for line in page.splitlines() if line.startswith(f"| {work}"))


def test_a_page_without_results_says_so_on_every_line(render):
    page = render()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "×" in line]
    assert len(rows) > 5
    assert all("not measured here" in row for row in rows)


def test_a_result_stands_in_its_line_with_its_floor_and_its_origin(render):
    page = render(vs_trl=TRL)
    line = line_of(page, "Dr. GRPO step, R1 prompts")
    assert "**4.25 ×** (4.0 to 4.6), 0.50 s against 2.12 s | 50% of the matmul rate" in line
    assert "**700 MiB** against 1,684 MiB" in line_of(page, "peak memory")
    assert "| [vs_trl](results/vs_trl.json) | 2026-01-02 | abc | H |" in page


def test_a_result_of_an_older_form_counts_as_not_measured(render):
    page = render(vs_trl=TRL, local_engine={"speed": 3})
    assert "not measured here" in line_of(page, "the same, 14-token prompts")
    assert "not measured here" in line_of(page, "sampling of the default job | Transformers'")


def test_a_picture_is_shown_where_there_is_one(render, tmp_path):
    assert "vs_trl.png" not in render(vs_trl=TRL)
    (tmp_path / "vs_trl.png").write_bytes(b"")
    assert "![A training step beside TRL's](results/vs_trl.png)" in render(vs_trl=TRL)
