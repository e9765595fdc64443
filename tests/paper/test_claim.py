"""What the paper's scripts share: options, training runs that go on, and the record."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "paper"))

from claim import Job, Options, Verdict, alone, claim_options, train, write

from lmrl_env.gallery import read_claims

PROGRAM = """\
import json, os, sys
from pathlib import Path
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:] if "=" in flag)
folder = Path(flags.get("resume") or flags["run-dir"])
folder.mkdir(exist_ok=True)
with open("calls", "a") as file:
    file.write(" ".join(sys.argv[1:]) + " threads " + os.environ["OMP_NUM_THREADS"] + chr(10))
if Path("broken").exists():
    (folder / "config.json").write_text("{}")
    sys.exit("out of luck")
(folder / "metrics.jsonl").write_text(json.dumps({"step": int(flags["steps"])}))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder to work in, with a program that stands for an algorithm."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def options(**changes):
    paths = {"runs_dir": Path("runs"), "out": Path("out")}
    names = {"model": None, "engine": None, "questions": None}
    return Options(**{"scale": "tiny", "seeds": 1, "jobs": 2, "dry_run": False, **names, **paths}
                   | changes)  # fmt: skip


def jobs(*names):
    Path("runs").mkdir(exist_ok=True)
    return [Job(name, Path("program.py"), {"steps": 3, "lora": True, "x": None}) for name in names]


def calls():
    path = Path("calls")
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_that_stands_whole_is_not_repeated(place):
    folders = train(options(), jobs("a", "b"))
    assert folders == {"a": Path("runs/a"), "b": Path("runs/b")}
    assert "--run-dir=runs/a --steps=3 --lora --engine=local threads 1" in calls()
    train(options(), jobs("a", "b"))
    assert len(calls()) == 2


def test_a_run_that_broke_off_is_named_and_goes_on(place):
    (place / "broken").touch()
    with pytest.raises(click.ClickException, match="the run 'a' ended with 1:\nout of luck"):
        train(options(), jobs("a"))
    (place / "broken").unlink()
    train(options(), jobs("a"))
    assert [call.split()[0] for call in calls()] == ["--run-dir=runs/a", "--resume=runs/a"]


def test_two_scripts_that_share_a_run_train_it_once(place):
    with ThreadPoolExecutor() as pool:
        scripts = [pool.submit(train, options(), jobs("a")) for _ in range(2)]
        assert [script.result() for script in scripts] == [{"a": Path("runs/a")}] * 2
    assert len(calls()) == 1


def test_a_script_does_not_wait_for_ever_for_another_one(place):
    with (
        alone(Path("model")),
        pytest.raises(click.ClickException, match="another script has been making model for 0 s"),
        alone(Path("model"), seconds=0.0),
    ):
        pass


def test_minutes_are_those_of_a_measurement_from_scratch(place):
    train(options(), jobs("a", "b"))
    for name, seconds in (("a", "120.0"), ("b", "240.0")):
        (place / "runs" / name / "seconds.json").write_text(seconds)
    again = options(jobs=2)
    train(again, jobs("a", "b"))
    verdict = Verdict("§1", "It is so.", "It was.", "holds", "Why not.", "1 seed")
    write(again, "one", "One", verdict, {"x": 1}, Figure(), "| a |\n|---|\n| 1 |")
    record = json.loads((place / "out" / "one.json").read_text())
    assert record["minutes"] == 3.0  # two runs at one time
    assert record["jobs"] == 2
    (claim,) = read_claims(place / "out")
    assert claim.tables == "| a |\n|---|\n| 1 |"
    assert claim.picture == Path(place / "out" / "one.png")


def test_a_script_has_options_of_its_own():
    seen = []

    @click.option("--judge", default="none")
    @claim_options(seeds=4)
    def script(options, judge):
        seen.append((options.seeds, options.scale, judge))

    assert CliRunner().invoke(script, ["--judge", "wise"]).exit_code == 0
    assert CliRunner().invoke(script, ["--scale", "paper", "--seeds", "2"]).exit_code == 0
    assert seen == [(4, "tiny", "wise"), (2, "paper", "none")]
