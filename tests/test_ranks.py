"""Several ranks do the work of one: the nine algorithms, sharded modules, and a rank that dies.

The whole matrix is in ``benchmarks/bench_ranks.py``.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from algos_files import NAMES, ROOT
from rank_program import compare, launch, read

STEPS = 3
JOBS = {name: f"{name},float32,{STEPS}" for name in NAMES}
LONG_JOB = "dr_grpo,float64,10"
SHARDED_JOBS = [f"{name},float32,{STEPS},sharded" for name in ("dr_grpo", "ppo", "grpo")]
OOM_JOB = f"grpo,float32,{STEPS},oom"
EXTRA_JOBS = {1: [LONG_JOB], 2: [LONG_JOB, *SHARDED_JOBS, OOM_JOB, "fully_shard"], 4: []}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test of each launch waits
BY_RANKS = {1: NAMES, 2: NAMES, 4: ("dapo", "grpo", "lite_ppo", "ppo")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function from a number of ranks to the folder of what they trained, once."""

    @functools.cache
    def folder(ranks: int) -> Path:
        path = tmp_path_factory.mktemp(f"ranks{ranks}")
        launch(ranks, str(path), *(JOBS[name] for name in BY_RANKS[ranks]), *EXTRA_JOBS[ranks])
        return path

    return folder


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks in (2, 4) for name in BY_RANKS[ranks]]
)
def test_ranks_train_every_algorithm_as_one_rank_does(ranks, name, trained):
    job = JOBS[name]
    assert read(trained(1), job)["world_sizes"] == [1]
    assert read(trained(ranks), job)["world_sizes"] == [ranks]
    gap = compare((trained(1), job), (trained(ranks), job))
    assert gap.steps == STEPS and gap.gradient_norm > 1e-3
    assert gap.gradient <= 1e-6 and gap.metric <= 1e-4, gap


def test_ten_steps_in_float64_agree_to_1e_5(trained):
    gap = compare((trained(1), LONG_JOB), (trained(2), LONG_JOB))
    assert gap.steps == 10 and gap.gradient_norm > 1e-3
    assert gap.gradient <= 1e-10 and gap.metric <= 1e-5, gap


def test_different_runs_are_told_apart(trained):
    gap = compare((trained(1), JOBS["dr_grpo"]), (trained(1), JOBS["lite_ppo"]))
    assert gap.gradient > 1e-2 and gap.metric > 1e-2


def test_a_rank_that_runs_out_of_memory_repeats_the_step_with_the_others(trained):
    gap = compare((trained(1), OOM_JOB.removesuffix(",oom")), (trained(2), OOM_JOB))
    assert gap.gradient <= 1e-6 and gap.metric <= 1e-4, gap


@pytest.mark.parametrize("job", SHARDED_JOBS)
def test_modules_sharded_by_accelerate_train_as_whole_ones_do(job, trained):
    assert read(trained(2), job)["world_sizes"] == [2]
    assert read(trained(2), job)["sharded"] and not read(trained(2), JOBS["ppo"])["sharded"]
    gap = compare((trained(1), job.removesuffix(",sharded")), (trained(2), job))
    assert gap.steps == STEPS
    assert gap.gradient <= 1e-6 and gap.metric <= 1e-4, gap


@pytest.fixture(scope="module", params=[0, 1])
def sharded(request, trained):
    """Return what a rank found of torch's own ``fully_shard``."""
    return json.loads((trained(2) / f"fully_shard.{request.param}.json").read_text())


def test_gradients_of_a_sharded_module_are_clipped_by_the_norm_of_the_whole(sharded):
    assert sharded["world_size"] == 2 and sharded["is sharded"] > 20
    for whole_norm, sharded_norm, whole_after, sharded_after in sharded["norms"]:
        assert sharded_norm == pytest.approx(whole_norm, rel=1e-12) and whole_norm > 1
        assert sharded_after == pytest.approx(whole_after, rel=1e-12)
        assert whole_after == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    "what", ["weights", "optimizer", "other ranks' state", "weights of 0", "after going on"]
)
def test_weights_and_optimiser_of_a_sharded_module_go_out_and_in_whole(what, sharded):
    assert sharded["differences"][what] <= 1e-12


def test_weights_are_streamed_one_tensor_at_a_time(sharded):
    assert sharded["whole tensors alive"] == 1


# --- launches and deaths

FEW = (
    "--env=rank_program:Digits-v0 --questions=arithmetic:size=40 --prompts-per-step=2 "
    "--group-size=2 --max-new-tokens=8 --eval-questions=2 --eval-every=0 --device=cpu"
).split()
FOLDERS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": FOLDERS, "OMP_NUM_THREADS": "1"}


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Return the processes that a launcher has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_a_killed_rank_stops_the_others_with_a_message(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*FEW, "--steps=100000", f"--run-dir={tmp_path / 'run'}"]
    launcher = subprocess.Popen(
        [sys.executable, *command, str(ROOT / "algos/dr_grpo.py"), *flags],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        log = tmp_path / "run" / "metrics.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) > 2):
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.1)
        _, second = ranks_of(launcher)
        os.kill(second, signal.SIGKILL)
        _, errors = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert "Error: rank 0 of 2, in the phase '" in errors
    assert "last seen: rank 1 in '" in errors or "in the same phase" in errors


def test_a_launch_that_silently_runs_one_rank_is_refused(tmp_path):
    text = (ROOT / "examples/accelerate/cpu_ranks.yaml").read_text()
    file = tmp_path / "multi_cpu.yaml"
    file.write_text(text.replace("distributed_type: MULTI_GPU", "distributed_type: MULTI_CPU"))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={file}"]
        + [str(ROOT / "algos/dr_grpo.py"), *FEW, f"--run-dir={tmp_path / 'run'}"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "asked for 2 or more processes and Accelerate runs 1" in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr
