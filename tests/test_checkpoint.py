from __future__ import annotations

import os
import random
import re
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lmrl_env import durable
from lmrl_env.checkpoint import Checkpoints
from lmrl_env.durable import find_damage, naming, whole_folder, write_text
from lmrl_env.errors import ConfigurationError, RunFolderError
from lmrl_env.random_states import random_states, seed_generators, set_random_states
from lmrl_env.resumption import changed_arithmetic, changed_settings, refuse_another_run
from lmrl_env.run_folder import RunFolder

FILES = ("model.safetensors", "trainer/optimizer.safetensors")


def write(checkpoints: Checkpoints, step: int) -> Path:
    with checkpoints.write(step) as partial:
        for name in FILES:
            (partial / name).write_bytes(f"{name} of {step}".encode() * 9)
    return checkpoints.folder(step)


@pytest.fixture
def checkpoints(tmp_path):
    found = Checkpoints(tmp_path / "checkpoints")
    for step in (2, 10):
        write(found, step)
    return found


@contextmanager
def largest_file(size: int):
    """Let no file grow beyond a number of bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_newest_checkpoint_is_that_of_the_greatest_number(checkpoints):
    assert checkpoints.steps == [2, 10]
    assert checkpoints.recover() == (10, [])


def test_without_a_checkpoint_there_is_nothing_to_recover(tmp_path):
    assert Checkpoints(tmp_path / "none").recover() == (None, [])


@settings(max_examples=20)
@given(st.sampled_from(FILES), st.floats(0, 0.999), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(tmp_path_factory, name, place, bit):
    folder = write(Checkpoints(tmp_path_factory.mktemp("bits")), 1)
    assert find_damage(folder) is None
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    damage = find_damage(folder)
    assert damage is not None and name in damage


def test_a_truncated_file_is_named_with_its_size_and_the_checkpoint_before_is_taken(checkpoints):
    file = checkpoints.folder(10) / "trainer" / "optimizer.safetensors"
    os.truncate(file, 5)
    step, (damaged,) = checkpoints.recover()
    assert step == 2 and checkpoints.steps == [2]
    assert "step-10 is damaged: trainer/optimizer.safetensors (5 bytes)" in damaged
    assert (checkpoints.path / "step-10.damaged" / "model.safetensors").exists()
    write(checkpoints, 10)  # there is room for a new one of that name
    assert checkpoints.recover() == (10, [])


@pytest.mark.parametrize("name", (*FILES, "checksums.json"))
def test_a_missing_file_is_named(checkpoints, name):
    (checkpoints.folder(10) / name).unlink()
    step, (damaged,) = checkpoints.recover()
    assert step == 2 and name in damaged


def test_where_all_checkpoints_are_damaged_nothing_is_started_and_nothing_is_moved(checkpoints):
    for step in (2, 10):
        (checkpoints.folder(step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunFolderError, match="no checkpoint is intact") as caught:
        checkpoints.recover()
    assert "step-2: model.safetensors" in str(caught.value)
    assert "step-10: model.safetensors" in str(caught.value)
    assert checkpoints.steps == [2, 10]


def test_what_was_half_written_is_no_checkpoint_and_is_removed(checkpoints):
    folder = checkpoints.path / "step-11.partial"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    assert checkpoints.steps == [2, 10]
    assert checkpoints.recover() == (10, [])
    assert not folder.exists()


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    done: list[str] = []
    real_sync, real_rename = durable.sync, Path.rename

    def sync(path):
        done.append(path.name)
        real_sync(path)

    def rename(path, target):
        done.append(f"renamed to {target.name}")
        return real_rename(path, target)

    monkeypatch.setattr(durable, "sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    write(Checkpoints(tmp_path / "checkpoints"), 3)
    synced = done[: done.index("renamed to step-3")]
    names = {"step-3.partial", "trainer", "model.safetensors", "optimizer.safetensors"}
    assert {*names, "checksums.json"} == set(synced)
    assert done[-2:] == ["checkpoints", tmp_path.name]  # the name itself


def test_an_error_while_a_checkpoint_is_written_leaves_nothing_of_it(checkpoints):
    with pytest.raises(ZeroDivisionError), checkpoints.write(11) as partial:
        (partial / "model.safetensors").write_bytes(b"half")
        _ = 1 / 0
    assert sorted(path.name for path in checkpoints.path.iterdir()) == ["step-10", "step-2"]


def test_a_full_disk_is_named_with_the_file_and_leaves_older_checkpoints_intact(checkpoints):
    with (
        pytest.raises(RunFolderError, match=r"cannot write .*step-11\.partial/big\.safetensors"),
        largest_file(1000),
        checkpoints.write(11) as partial,
        naming(partial / "big.safetensors"),
    ):
        save_file({"x": torch.zeros(1000)}, partial / "big.safetensors")
    assert checkpoints.recover() == (10, [])
    assert not (checkpoints.path / "step-11.partial").exists()


@settings(max_examples=50)
@given(
    st.sets(st.integers(0, 30), max_size=6),
    st.integers(0, 4),
    st.dictionaries(st.integers(0, 30), st.sampled_from([0.25, 0.5, 0.75])),
)
def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path_factory, steps, keep, accuracies):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("kept"))
    for step in steps:
        checkpoints.folder(step).mkdir()
    checkpoints.prune(keep, accuracies)
    kept = set(checkpoints.steps)
    newest = set(sorted(steps, reverse=True)[:keep] if keep else steps)
    evaluated = steps & accuracies.keys()
    assert newest <= kept <= steps
    if keep and evaluated:
        best = max(accuracies[step] for step in evaluated)
        assert min(step for step in evaluated if accuracies[step] == best) in kept
    assert len(kept) <= (keep + 1 if keep else len(steps))


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "config.json"
    write_text(file, "old")
    with (
        pytest.raises(RunFolderError, match=re.escape(f"cannot write {file}")),
        largest_file(10),
    ):
        write_text(file, "new" * 1000)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_row_that_cannot_be_written_is_named_with_its_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_row({"step": 0})
    with (
        pytest.raises(RunFolderError, match=r"cannot write .*metrics\.jsonl"),
        largest_file(20),
    ):
        folder.append_row({"step": 1, "reward/mean": 0.5})
    folder.keep_rows(0)  # what a resumed run does with the half-written row
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def in_a_child(action) -> int:
    """Return the exit status of a function in a process of its own."""
    child = os.fork()
    if child == 0:
        os._exit(action())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_process_is_kept_out_of_the_folder_of_a_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()

    def intrude() -> int:
        try:
            RunFolder(tmp_path / "run").lock()
        except RunFolderError as error:
            return 7 if f"in use by process {os.getppid()} on" in str(error) else 8
        return 0

    assert in_a_child(intrude) == 7
    folder.unlock()
    assert in_a_child(intrude) == 0


def test_the_lock_of_a_process_that_was_killed_is_open(tmp_path):
    child = os.fork()
    if child == 0:
        held = RunFolder(tmp_path / "run")
        held.lock()
        (tmp_path / "locked").touch()
        signal.pause()
    deadline = time.monotonic() + 30
    while not (tmp_path / "locked").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RunFolderError, match=f"in use by process {child} on"):
        folder.lock()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    folder.lock()
    folder.unlock()


def draws() -> list[float]:
    return [
        *torch.randn(3).tolist(),
        *np.random.randn(3).tolist(),  # an odd number: one Gaussian is kept for the next call
        *(random.gauss(0, 1) for _ in range(3)),
        random.random(),
    ]


@settings(max_examples=20)
@given(st.integers(0, 2**40), st.integers(0, 3))
def test_generators_go_on_from_their_saved_states(seed, before):
    seed_generators(seed)
    for _ in range(before):
        draws()
    saved = random_states()
    expected = draws()
    seed_generators(0)
    of_ranks = {name: torch.stack([torch.zeros_like(s), s]) for name, s in saved.items()}
    set_random_states({name: states[1] for name, states in of_ranks.items()})
    assert draws() == expected


CONFIG = {"algorithm": "grpo", "model": "tiny", "lr": 1e-3, "group_size": 8, "run_dir": "a"}


def test_changed_settings_are_named_but_not_the_place_of_the_run():
    now = {**CONFIG, "lr": 1e-4, "run_dir": "b", "a_later_flag": 1}
    assert changed_settings(CONFIG, now) == {"lr": (1e-3, 1e-4)}


def test_settings_of_another_run_are_refused_with_the_way_on():
    changed = changed_settings(CONFIG, {**CONFIG, "group_size": 4, "model": "mine"})
    message = "--model mine (the run: tiny), --group-size 4 (the run: 8): leave that out, or start"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        refuse_another_run(changed, "runs/a/checkpoints/step-3")
    refuse_another_run({"lr": (1, 2)}, "runs/a/checkpoints/step-3")


def test_what_sums_in_another_order_is_named():
    before = {"ranks": 2, "hardware": "x", "versions": {"torch": "2.12"}}
    now = {"ranks": 1, "hardware": "x", "versions": {"torch": "2.13"}}
    assert changed_arithmetic(before, before) == []
    assert changed_arithmetic(before, now) == [
        "ranks 2 → 1, which sum in another order",
        "torch 2.12 → 2.13",
    ]


def test_a_folder_is_not_put_over_another_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(RunFolderError, match="cannot write"), whole_folder(tmp_path / "there"):
        pass
    assert (tmp_path / "there" / "file").exists()
