"""A run that an error breaks off: what is closed, and what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from test_run import ENVIRONMENT, FLAGS, command, train

import algos.dr_grpo
import lmrl_env.run
from lmrl_env.engines.local import LocalEngine
from lmrl_env.env import TokenVectorEnv
from lmrl_env.errors import EngineError


@pytest.fixture
def closed(monkeypatch):
    """Return what was closed, in order, and leave out the curves."""
    monkeypatch.setattr("lmrl_env.run.plot_curves", lambda *args: None)
    found = []
    for kind in (LocalEngine, TokenVectorEnv):
        original = kind.close
        name = kind.__name__

        def close(self, *args, original=original, name=name, **kwargs):
            found.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "close", close)
    return found


def failing(function, at, error):
    """Return a function that fails at one of its calls, from 1."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise error
        return function(*args, **kwargs)

    return call


def test_an_error_in_the_loop_closes_everything_and_names_the_last_checkpoint(
    tmp_path, monkeypatch, capsys, closed
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    broken = failing(algos.dr_grpo.compute_advantages, 2, ZeroDivisionError("a slip of my own"))
    monkeypatch.setattr(algos.dr_grpo, "compute_advantages", broken)
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError, match="of my own"):
        train(folder, steps=3, checkpoint_every=1, eval_every=0)
    assert closed[0] == "LocalEngine" and closed.count("TokenVectorEnv") >= 2
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = " ".join(capsys.readouterr().out.split())
    assert f"broken off in step 2: the last checkpoint is {folder}/checkpoints/step-1" in said
    assert f"go on with: python {sys.argv[0]} --resume {folder}" in said


def test_an_engine_that_dies_ends_the_run_by_name_and_the_checkpoint_is_kept(
    tmp_path, monkeypatch, capsys, closed
):
    died = failing(lmrl_env.sampling.rollout, 2, EngineError("the engine died"))
    monkeypatch.setattr(lmrl_env.sampling, "rollout", died)
    folder = tmp_path / "run"
    with pytest.raises(EngineError, match="the engine died"):
        train(folder, steps=3, checkpoint_every=1, eval_every=0)
    said = " ".join(capsys.readouterr().out.split())
    assert "broken off in step 2" in said and (folder / "checkpoints/step-1").is_dir()
    assert "LocalEngine" in closed


def test_an_error_before_the_first_step_closes_everything_too(
    tmp_path, monkeypatch, capsys, closed
):
    monkeypatch.setattr("lmrl_env.run.sync_weights", failing(print, 1, EngineError("no sync")))
    with pytest.raises(EngineError, match="no sync"):
        train(tmp_path / "run", steps=1)
    assert closed[0] == "LocalEngine"
    said = " ".join(capsys.readouterr().out.split())
    assert "broken off in step 0: no checkpoint yet; go on with: python" in said


def test_a_run_that_ends_well_says_nothing_of_being_broken_off(tmp_path, capsys, closed):
    train(tmp_path / "run", steps=1, eval_every=0)
    assert "broken off" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_program_ends_with_the_message_and_without_workers(tmp_path):
    verifier = tmp_path / "mine.py"
    verifier.write_text(
        "import gymnasium as gym\n"
        "from lmrl_env.registration import make_token_vector_env\n"
        "from lmrl_env.wrappers import VerifierReward\n"
        "def verify(response, answer, *, question=None):\n"
        "    raise SystemExit('no')\n"
        "def make(num_envs=1, **kwargs):\n"
        "    return VerifierReward(make_token_vector_env(num_envs, **kwargs), 'mine:verify')\n"
        "gym.register(id='Mine-v0', vector_entry_point='mine:make')\n"
    )
    flags = ["--env=mine:Mine-v0", "--on-verifier-error=stop", "--steps=2", "--run-dir=run"]
    result = subprocess.run(
        command(*FLAGS, *flags),
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("Error: --on-verifier-error stop: the verifier's status is")
    said = " ".join(result.stdout.split())
    assert re.search(r"broken off in step 1: no checkpoint yet; go on with: python \S+ --re", said)
    workers = [
        pid
        for pid in os.listdir("/proc")
        if pid.isdigit() and str(tmp_path) in _environment(pid) and pid != str(os.getpid())
    ]
    assert not workers


def _environment(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""
