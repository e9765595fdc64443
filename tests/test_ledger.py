"""The time ledger: its parts sum to the wall time, and ``--profile`` leaves what it promises."""

from __future__ import annotations

import gzip
import json
import threading
import time

import pytest
from test_run import train

from lmrl_env.errors import ConfigurationError
from lmrl_env.ledger import PARTS, PREFIX, lap, shares, spent_on
from lmrl_env.profiling import write_ledger
from lmrl_env.run import Run


@pytest.fixture
def clock(monkeypatch):
    """Return a list of one number, the time in seconds."""
    now = [time.perf_counter()]
    monkeypatch.setattr("lmrl_env.ledger.time.perf_counter", lambda: now[0])
    lap()
    return now


def above_0(seconds):
    return {part: round(each, 6) for part, each in seconds.items() if each}


def test_a_part_inside_another_interrupts_it_and_the_rest_is_other(clock):
    clock[0] += 1
    with spent_on("env"):
        clock[0] += 2
        with spent_on("grading"):
            clock[0] += 4
        clock[0] += 8
    clock[0] += 16
    assert above_0(lap()) == {"env": 10, "grading": 4, "other": 17}
    assert above_0(lap()) == {}


def test_an_evaluation_keeps_its_sampling_and_grading(clock):
    with spent_on("evaluation"), spent_on("env"), spent_on("grading"):
        clock[0] += 3
    assert above_0(lap()) == {"evaluation": 3}


def test_a_part_that_ends_with_an_error_is_closed(clock):
    with pytest.raises(ZeroDivisionError), spent_on("sync"):
        clock[0] += 2
        _ = 1 / 0
    clock[0] += 1
    assert above_0(lap()) == {"sync": 2, "other": 1}


def test_a_lap_may_end_inside_a_part(clock):
    with spent_on("logging"):
        clock[0] += 1
        assert above_0(lap()) == {"logging": 1}
        clock[0] += 2
    assert above_0(lap()) == {"logging": 2}


def test_another_thread_does_not_count(clock):
    def sample():
        with spent_on("sampling"):
            clock[0] += 5

    thread = threading.Thread(target=sample)
    thread.start()
    thread.join()
    assert above_0(lap()) == {"other": 5}


def test_shares_are_told_the_largest_first():
    told = shares({"other": 1.0, "sampling": 6.0, "forward_backward": 2.996, "sync": 0.004})
    assert told == "60% sampling, 30% forward and backward, 10% other"


def test_a_picture_leaves_out_rows_of_runs_without_a_ledger(tmp_path):
    row = {PREFIX + part: 0.5 for part in PARTS}
    write_ledger([{"step": 0}, {"step": 1, **row}], tmp_path)
    assert json.loads((tmp_path / "ledger.json").read_text()) == [
        {"step": 1, **dict.fromkeys(PARTS, 0.5)}
    ]
    assert (tmp_path / "ledger.png").stat().st_size > 0


def test_profile_traces_steps_and_the_parts_of_all_rows_sum_to_the_wall_time(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("lmrl_env.run.plot_curves", lambda *args: None)
    written = []
    write_row = Run._write_row

    def timed(self, metrics):
        write_row(self, metrics)
        written.append(time.perf_counter())

    monkeypatch.setattr(Run, "_write_row", timed)
    logged = train(
        tmp_path / "run",
        steps=3,
        profile=1,
        updates_per_step=2,
        checkpoint_every=1,
        max_new_tokens=16,
    )
    sums = [sum(row[PREFIX + part] for part in PARTS) for row in logged]
    wall = written[-1] - written[0]
    assert sum(sums[1:]) == pytest.approx(wall, rel=0.02)
    for part in ("sampling", "env", "grading", "scoring", "forward_backward", "optimizer", "sync"):
        assert all(row[PREFIX + part] > 0 for row in logged[1:]), part
    assert logged[2][PREFIX + "evaluation"] > 0 and logged[2][PREFIX + "checkpoint"] > 0
    assert all(row[PREFIX + "exchange"] == 0 for row in logged)  # a single rank

    assert "time: " in capsys.readouterr().out
    trace = json.loads(gzip.decompress((tmp_path / "run" / "trace.json.gz").read_bytes()))
    assert any(event["name"] == "aten::mm" for event in trace["traceEvents"] if "name" in event)
    assert "aten::" in (tmp_path / "run" / "operators.txt").read_text()
    steps = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert [row["step"] for row in steps] == [0, 1, 2, 3]


def test_a_profile_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"--profile 2 behind 2 steps.*--steps 3"):
        train(tmp_path / "run", steps=3, profile=2)
