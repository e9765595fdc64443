from __future__ import annotations

import json
import re
import shutil

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from test_resume import train

from lmrl_env.cli import main
from lmrl_env.errors import ConfigurationError, RunFolderError
from lmrl_env.export import export, model_card
from lmrl_env.policy import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmrl_env.run.plot_curves", lambda *args: None)
        train(folder, steps=3, keep_checkpoints=0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, accuracy in zip(rows, (0.25, None, 0.75, 0.5), strict=True):
        row["eval/accuracy"] = accuracy
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("step", "expected", "accuracies"),
    [
        ("last", 3, ["| step 0 | 25.0% |", "| step 3 | 50.0% |"]),
        ("best", 2, ["| step 0 | 25.0% |", "| step 2 | 75.0% |"]),
        ("1", 1, ["| step 0 | 25.0% |"]),
    ],
)
def test_a_checkpoint_becomes_a_model_with_a_card(run, tmp_path, step, expected, accuracies):
    folder = tmp_path / "my-model"
    result = CliRunner().invoke(main, ["export", str(run), str(folder), "--step", step])
    assert result.exit_code == 0, result.output
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not names & {"trainer", "checksums.json"}
    mine = load_file(folder / "model.safetensors")
    trained = load_file(run / "checkpoints" / f"step-{expected}" / "model.safetensors")
    assert mine.keys() == trained.keys() and all(mine[k].equal(trained[k]) for k in mine)
    assert load_model(str(folder)).num_parameters() > 0
    card = (folder / "README.md").read_text()
    assert f"after {expected} steps of `dr_grpo` in `MathR1-v0`" in card
    assert [line for line in card.splitlines() if line.startswith("| step ")] == accuracies
    for text in ("`arithmetic:size=40`", "| `lr` | 0.001 |", "torch 2", "arXiv:2503.20783"):
        assert text in card


def test_a_checkpoint_can_be_named_by_its_folder(run, tmp_path):
    assert export(run / "checkpoints" / "step-2", tmp_path / "model").name == "step-2"
    assert "after 2 steps" in (tmp_path / "model" / "README.md").read_text()


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    file = copied / "checkpoints" / "step-3" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match=r"step-3 is damaged: model\.safetensors"):
        export(copied, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [("7", "--step 7: "), ("first", "--step first: "), ("07", "expected a number of [1, 2, 3]")],
)
def test_a_step_without_a_checkpoint_is_refused(run, tmp_path, step, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        export(run, tmp_path / "model", step)


def test_a_folder_that_is_there_is_left_alone(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is there already"):
        export(run, tmp_path)
    with pytest.raises(ConfigurationError, match="has no such checkpoint"):
        export(tmp_path, tmp_path / "model")


def test_a_card_names_a_base_model_of_the_hub_but_no_path_of_a_disk(tmp_path):
    config = {"algorithm": "ppo", "env": "E-v0", "questions": "q", "temperature": 1.0}
    card = model_card({**config, "model": "some/model"}, [], 4, "mine")
    assert "base_model: some/model\n" in card and "not measured" in card
    card = model_card({**config, "model": str(tmp_path)}, [], 4, "mine")
    assert "base_model:" not in card and str(tmp_path.parent) not in card
