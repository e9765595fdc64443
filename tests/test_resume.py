"""Runs that were killed, stopped or damaged go on as if nothing had happened."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from test_checkpoint import largest_file
from test_run import SMALL, rows, timeless

from algos.dr_grpo import Args, main
from lmrl_env.errors import ConfigurationError, RunFolderError
from lmrl_env.resumption import Resumption
from lmrl_env.run_folder import RunFolder

STEPS = 4
SETTINGS = {
    **SMALL,
    "max_new_tokens": 32,
    "eval_questions": 2,
    "steps": STEPS,
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
}
FORKS = multiprocessing.get_context("forkserver")  # imports the libraries once
FORKS.set_forkserver_preload(["algos.dr_grpo", "test_resume"])


def train(folder, **kwargs):
    resumed = {"resume": str(folder)} if (folder / "config.json").exists() else {}
    main(Args(**{**SETTINGS, "run_dir": str(folder), **resumed, **kwargs}))
    return rows(folder)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Leave out the curves, which take half of the time of such short runs."""
    monkeypatch.setattr("lmrl_env.run.plot_curves", lambda *args: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmrl_env.run.plot_curves", lambda *args: None)
        train(folder)
    return folder


def final(folder):
    """Return all that a run leaves but times: the last checkpoint by checksums, rows, samples."""
    checkpoint = folder / "checkpoints" / f"step-{STEPS}" / "checksums.json"
    return checkpoint.read_text(), timeless(rows(folder)), (folder / "samples.jsonl").read_text()


def signal_within(place: str, call: int, number: int) -> None:
    """Make a function send a signal to its own process at the end of a certain call."""
    module, name = place.split(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), iter(range(1, 10**9))

    def function(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, function)


def train_until_signalled(place, call, number, folder, output, kwargs):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    importlib.import_module("lmrl_env.run").plot_curves = lambda *args: None
    signal_within(place, call, number)
    train(Path(folder), **kwargs)


def child(place, call, number, folder, **kwargs):
    """Train in a process of its own until it is signalled; return exit status and output."""
    output = folder.with_suffix(".txt")
    arguments = (place, call, number, str(folder), str(output), kwargs)
    process = FORKS.Process(target=train_until_signalled, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode, output.read_text()


KILLS = {  # benchmarks/kill_matrix.py tries random moments
    "sampling, before any checkpoint": ("lmrl_env.engines.local:LocalEngine.generate", 3),
    "training": ("lmrl_env.updates:Updates.backward", 3),
    "checkpoint, model written": ("lmrl_env.training_state:save_model", 2),
    "checkpoint, old one half deleted": ("pathlib:Path.rename", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_run_that_was_killed_ends_as_the_uninterrupted_one(finished, tmp_path, moment):
    folder = tmp_path / "run"
    status, output = child(*KILLS[moment], signal.SIGKILL, folder)
    assert status == -signal.SIGKILL, output
    train(folder)
    assert final(folder) == final(finished)
    assert not list(folder.rglob("*.partial"))


STOPS = {
    "the model is loaded": ("lmrl_env.run_setup:load_model", 1, 0),
    "it samples": ("lmrl_env.engines.local:LocalEngine.generate", 5, 2),
    "a checkpoint is written": ("lmrl_env.training_state:save_model", 1, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", STOPS)
def test_sigterm_ends_a_run_with_its_work_saved(finished, tmp_path, moment):
    folder = tmp_path / "run"
    place, call, step = STOPS[moment]
    status, output = child(place, call, signal.SIGTERM, folder, checkpoint_every=2)
    assert status == 0 and "Traceback" not in output
    assert "SIGTERM: ending after this step" in output and f"--resume {folder}" in output
    assert max((row["step"] for row in rows(folder)), default=0) == step
    assert step == 0 or (folder / "checkpoints" / f"step-{step}").is_dir()
    train(folder, checkpoint_every=2)
    assert final(folder) == final(finished)


def back_to(folder, step):
    """Make a run one that has no later checkpoint."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def test_a_batch_sampled_ahead_is_part_of_the_checkpoint(tmp_path):
    kwargs = {"async_depth": 1, "keep_checkpoints": 0}
    train(tmp_path / "whole", **kwargs)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    back_to(tmp_path / "run", 2)
    train(tmp_path / "run", **kwargs)
    assert [row["sampling/staleness"] for row in rows(tmp_path / "run")[1:]] == [0, 1, 1, 1]
    assert final(tmp_path / "run") == final(tmp_path / "whole")


def copy(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(finished, tmp_path, capsys):
    folder = copy(finished, tmp_path)
    os.truncate(folder / "checkpoints/step-4/trainer/optimizer.safetensors", 1000)
    train(folder)
    output = capsys.readouterr().out
    assert "step-4 is damaged: trainer/optimizer.safetensors (1000 bytes) is truncated" in output
    assert final(folder) == final(finished)
    (resumed,) = json.loads((folder / "config.json").read_text())["resumed"]
    assert resumed["step"] == 3 and "optimizer.safetensors" in resumed["damaged"][0]


def test_a_run_without_an_intact_checkpoint_is_not_begun_again_by_itself(finished, tmp_path):
    folder = copy(finished, tmp_path)
    for path in folder.glob("checkpoints/*/model.safetensors"):
        path.unlink()
    before = rows(folder)
    with pytest.raises(RunFolderError, match="no checkpoint is intact"):
        train(folder)
    assert rows(folder) == before


def test_what_changes_at_a_resumption_is_told_and_remembered(finished, tmp_path, capsys):
    folder = copy(finished, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["ranks"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    train(folder, steps=5, lr=1e-4)
    output = capsys.readouterr().out
    assert "changed: --steps 4 → 5" in output and "changed: --lr 0.001 → 0.0001" in output
    assert "from here on not the same bit for bit: ranks 2 → 1" in output
    train(folder, steps=6, lr=1e-4)
    config = json.loads((folder / "config.json").read_text())
    assert [(each["step"], each["changed"]) for each in config["resumed"]] == [
        (4, {"steps": [4, 5], "lr": [1e-3, 1e-4]}),
        (5, {"steps": [5, 6]}),
    ]
    assert config["steps"] == 6 and config["ranks"] == 1


@pytest.mark.parametrize(
    "setting", [{"group_size": 4}, {"seed": 1}, {"questions": "arithmetic:size=50"}]
)
def test_the_settings_of_another_run_are_refused(finished, tmp_path, setting):
    folder = copy(finished, tmp_path)
    before = (folder / "config.json").read_text()
    ((name, value),) = setting.items()
    with pytest.raises(ConfigurationError, match=f"cannot go on with --{name.replace('_', '-')}"):
        train(folder, steps=5, dry_run=True, **setting)
    message = f"--resume cannot go on with --{name.replace('_', '-')} {value} (the run: "
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        train(folder, **setting)
    assert (folder / "config.json").read_text() == before


def test_fewer_steps_than_were_taken_are_refused(finished, tmp_path):
    folder = copy(finished, tmp_path)
    before = (folder / "config.json").read_text()
    with pytest.raises(ConfigurationError, match=r"--steps 3: the run in .* has taken 4 already"):
        train(folder, steps=3)
    assert (folder / "config.json").read_text() == before


def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_by_name(finished, tmp_path):
    folder = copy(finished, tmp_path)
    back_to(folder, 3)
    message = r"cannot write .*step-4\.partial/model\.safetensors: .*File too large"
    with pytest.raises(RunFolderError, match=message), largest_file(1_000_000):
        train(folder)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert "step-3" in names and not names & {"step-4", "step-4.partial"}
    train(folder)
    assert final(folder) == final(finished)


def test_tensorboard_has_each_point_of_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    train(folder, steps=3, tracker="tensorboard")
    back_to(folder, 2)
    train(folder, steps=4, tracker="tensorboard")
    events = EventAccumulator(str(folder / "lmrl_env"))
    events.Reload()
    points = events.Scalars("reward/mean")
    assert [point.step for point in points] == [1, 2, 3, 4]
    expected = [row["reward/mean"] for row in rows(folder)[1:]]
    assert [point.value for point in points] == pytest.approx(expected)


def test_wandb_goes_on_with_the_run_of_the_same_id(finished, tmp_path, monkeypatch):
    options = []

    class Tracking(Resumption):
        def tracker_options(self, tracker):
            options.append(super().tracker_options("wandb"))
            return {}

    monkeypatch.setattr("lmrl_env.run.Resumption", Tracking)
    folder = tmp_path / "run"
    train(folder, steps=1, tracker="tensorboard")
    train(folder, steps=2, tracker="tensorboard")
    assert options[0] == options[1] and options[0]["wandb"]["resume"] == "allow"
    assert options[0]["wandb"]["id"] != json.loads((finished / "config.json").read_text())["run_id"]


def test_a_run_in_use_is_refused(finished, tmp_path):
    folder = copy(finished, tmp_path)
    (folder / ".lock").unlink()
    holder = os.fork()
    if holder == 0:
        held = RunFolder(folder)
        held.lock()
        (folder / "locked").touch()
        signal.pause()
    deadline = time.monotonic() + 60
    while not (folder / "locked").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        with pytest.raises(RunFolderError, match=f"is in use by process {holder} on"):
            train(folder)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def train_as_a_rank(folder, output, environment, steps):
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    train(Path(folder), steps=steps)


def train_with_two_ranks(folder, steps):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    output = folder.with_suffix(".txt")
    processes = [
        FORKS.Process(
            target=train_as_a_rank,
            args=(str(folder), str(output), {**common, "RANK": r, "LOCAL_RANK": r}, steps),
        )
        for r in "01"
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
    assert [process.exitcode for process in processes] == [0, 0], output.read_text()
    return output.read_text()


@pytest.mark.slow
def test_two_ranks_go_on_with_the_run_of_one(finished, tmp_path):
    folder = copy(finished, tmp_path)
    back_to(folder, 2)
    output = train_with_two_ranks(folder, steps=3)
    assert "from here on not the same bit for bit: ranks 1 → 2" in output
    output = train_with_two_ranks(folder, steps=4)
    assert output.count("not the same bit for bit") == 1  # that of before
    mine, alone = (timeless(rows(each))[-1] for each in (folder, finished))
    assert mine.keys() == alone.keys()
    for key, expected in alone.items():
        if expected is not None:  # a mean over nothing
            expected = pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert mine[key] == expected, key


def test_a_run_with_nothing_sampled_ahead_says_that_it_goes_on_otherwise(
    finished, tmp_path, capsys
):
    train(copy(finished, tmp_path), steps=5, async_depth=1)
    said = capsys.readouterr().out
    assert "not the same bit for bit: no batch had been sampled ahead" in said
