"""The paper's recipe: its commands, and the random model that stands for the 7B one."""

from __future__ import annotations

import shlex

import pytest
import torch
from click.testing import CliRunner
from paper.scripts import load, parse

from lmrl_env.cli.eval import eval_command
from lmrl_env.cli.export import export_command
from lmrl_env.policy import load_model
from lmrl_env.tokenizer import load_tokenizer

recipe = load("paper/recipe")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random"
    recipe.make_model(folder)
    return folder


def printed():
    result = CliRunner().invoke(recipe.main, ["--scale", "paper", "--dry-run"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    return {lines[i][2:]: shlex.split(lines[i + 1]) for i in (0, 2, 4)}


def test_the_training_command_has_the_papers_settings(monkeypatch):
    command = printed()["train"]
    settings = parse(command[command.index("algos/dr_grpo.py") :], monkeypatch)
    assert settings["prompts_per_step"] * settings["group_size"] == 8 * 128
    assert settings["updates_per_step"] == 8 and settings["epochs"] == 1
    assert (settings["lr"], settings["warmup_steps"], settings["adam_beta2"]) == (1e-6, 0, 0.95)
    assert (settings["clip_eps_low"], settings["clip_eps_high"]) == (0.2, 0.2)
    assert settings["max_new_tokens"] == 3000 and settings["questions"] == "math-lvl3to5"
    assert settings["gradient_checkpointing"] and settings["dtype"] == "bfloat16"


def test_the_other_commands_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "recipe").mkdir(parents=True)
    commands = printed()
    evaluation = eval_command.make_context("eval", commands["evaluate"][2:]).params
    assert evaluation["temperature"] == 0 and evaluation["max_new_tokens"] == 3000
    assert evaluation["models"][1] == "runs/recipe/checkpoints/step-16"
    assert export_command.make_context("export", commands["export"][2:]).params["step"] == "best"


def test_the_tokenizer_is_as_wide_as_the_real_one_and_reads_the_template(model):
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.vocab_size == 151_665
    ids = tokenizer.encode(r"<|im_start|>user" + "\nπ<|im_end|>")
    assert ids[0] == 151_663 and ids[-1] == 151_664
    assert tokenizer.decode(ids) == "<|im_start|>user\nπ<|im_end|>"


def test_the_random_model_answers_and_ends(model):
    tokenizer, policy = load_tokenizer(str(model)), load_model(str(model))
    with torch.no_grad():
        logits = policy(torch.tensor([tokenizer.encode("a question")])).logits[0, -1]
    probs = logits[: tokenizer.vocab_size].softmax(0)
    assert 0.005 < probs[tokenizer.eos_token_ids[0]] < 0.2
    answers = [i for i in range(256, 264) if r"\boxed" in tokenizer.decode([i])]
    assert len(answers) == 8 and 0.05 < probs[answers].sum() < 0.9
