from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROOF, LOOP, VERIFIER, GRADER = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_proofs_of_the_readme_hold():
    names: dict = {}
    exec(PROOF, names)
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_estimator_example_proves_one_and_refutes_the_other(capsys):
    path = ROOT / "examples" / "prove_your_estimator.py"
    spec = importlib.util.spec_from_file_location("prove_your_estimator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    right, wrong = re.findall(r"angle to ∇J +(\S+)°", capsys.readouterr().out)
    assert float(right) < 1e-6 < 1 < float(wrong)


def test_the_gym_loop_of_the_readme_runs(capsys):
    exec(LOOP.replace("num_envs=64", "num_envs=2"), {})
    assert " [0." in capsys.readouterr().out  # what random tokens earn


def test_the_grader_of_the_readme_grades(capsys):
    exec(GRADER, {})
    assert capsys.readouterr().out == "['correct', 'timeout']\n"


TRAIN = [
    *("--steps=1", "--prompts-per-step=1", "--group-size=2", "--max-new-tokens=48"),
    *("--eval-questions=2", "--questions=arithmetic:size=40", "--device=cpu"),
]


def train_in(folder, env_id):
    """Train for a step as the README says, from the folder that holds the user's module."""
    subprocess.run(
        [sys.executable, str(ROOT / "algos/dr_grpo.py"), "--env", env_id, "--run-dir=run", *TRAIN],
        cwd=folder,
        env=ENVIRONMENT,
        check=True,
    )
    samples = (folder / "run" / "samples.jsonl").read_text().splitlines()
    return [json.loads(sample) for sample in samples]


@pytest.mark.slow
def test_the_verifier_of_the_readme_trains(tmp_path):
    (tmp_path / "checking.py").write_text(VERIFIER)
    samples = train_in(tmp_path, "checking:Checking-v0")
    assert {sample["verifier_status"] for sample in samples} <= {"wrong", "correct", "truncated"}


@pytest.mark.slow
def test_the_custom_verifier_example_trains(tmp_path):
    (tmp_path / "custom_verifier.py").write_text(
        (ROOT / "examples" / "custom_verifier.py").read_text()
    )
    assert len(train_in(tmp_path, "custom_verifier:BriefMath-v0")) == 2


def test_the_gym_loop_example_plays_to_the_end(capsys):
    spec = importlib.util.spec_from_file_location("gym_loop", ROOT / "examples" / "gym_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    assert "of 8 answers were right" in capsys.readouterr().out


@pytest.mark.slow
def test_a_built_wheel_holds_the_tiny_model_and_no_algorithms(tmp_path):
    source = tmp_path / "source"  # a build leaves files in the tree that it builds
    skipped = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=skipped)
    subprocess.run(
        [*(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"), "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for file in (
        "assets/gallery.html",
        "assets/tiny/model.safetensors",
        "assets/tiny/tokenizer.json",
        "py.typed",
    ):
        assert f"lmrl_env/{file}" in names
    assert not any(name.startswith(("algos/", "tests/", "examples/")) for name in names)
