from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from algos.dr_grpo import Args, main
from lmrl_env.batch_plan import BatchPlan
from lmrl_env.engines.local import LocalEngine
from lmrl_env.errors import ConfigurationError
from lmrl_env.policy import Policy, TokenBatch, load_model
from lmrl_env.rollout import Rollout
from lmrl_env.tokenizer import TINY_MODEL, load_tokenizer

ROOT = Path(__file__).parents[1]
SMALL = {
    "questions": "arithmetic:size=40",
    "prompts_per_step": 2,
    "group_size": 2,
    "max_new_tokens": 64,
    "eval_questions": 4,
    "eval_every": 2,
    "lr": 1e-3,
    "device": "cpu",
}
KEYS = (
    "step reward/mean length/mean length/correct length/incorrect length/truncated_fraction "
    "reward/zero_variance_groups policy/entropy policy/approx_kl policy/clip_fraction_low "
    "policy/clip_fraction_high policy/grad_norm mismatch/logprob_abs_mean mismatch/logprob_abs_p99 "
    "mismatch/k3 mismatch/effective_sample_size throughput/sample_tokens_per_s "
    "throughput/step_seconds time/sample time/verify time/train time/sync"
).split()


def train(run_dir, **kwargs):
    main(Args(**{**SMALL, "run_dir": str(run_dir), **kwargs}))
    return rows(run_dir)


def rows(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def timeless(logged):
    """Return rows without what a clock measured."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))}
        for row in logged
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(folder, steps=4, checkpoint_every=2, save_batch=str(folder / "batch.safetensors"))
    return folder


def test_a_run_leaves_the_folder_that_the_readme_describes(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "checkpoints"} <= names
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert (finished / "checkpoints" / "step-4" / "model.safetensors").is_file()
    config = json.loads((finished / "config.json").read_text())
    assert config["ranks"] == 1 and config["lr"] == 1e-3 and config["algorithm"] == "dr_grpo"
    assert config["env_spec"]["kwargs"]["group_size"] == 2


def test_metrics_have_a_row_a_step_behind_the_evaluation_of_the_start(finished):
    logged = rows(finished)
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4]
    assert all(set(KEYS) <= set(row) for row in logged[1:])
    assert ["eval/accuracy" in row for row in logged] == [True, False, True, False, True]
    for row in logged[1:]:
        assert row["policy/approx_kl"] == 0.0  # one update a batch: the policy is the rollout's
        assert row["policy/clip_fraction_low"] == row["policy/clip_fraction_high"] == 0.0
    assert all(row["mismatch/logprob_abs_mean"] < 1e-4 for row in logged[1:])


def test_samples_tell_prompt_response_answer_reward_and_finish_reason(finished):
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 2
    for sample in samples:
        assert sample["prompt"].endswith("Assistant: <think>")
        assert sample["finish_reason"] in ("stop", "length")
        assert sample["reward"] in (0.0, 1.0)
        assert sample["answer"] and isinstance(sample["response"], str)


def test_the_first_batch_is_saved_where_it_was_asked_for(finished):
    batch, metadata = Rollout.load(finished / "batch.safetensors")
    assert len(batch.rewards) == 4 and metadata["group_size"] == 2
    assert batch.rewards.mean() == rows(finished)[1]["reward/mean"]


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(finished, tmp_path):
    again = train(tmp_path / "again", steps=4, checkpoint_every=0)
    assert timeless(again) == timeless(rows(finished))
    assert [p.name for p in (tmp_path / "again" / "checkpoints").iterdir()] == ["step-4"]
    other = train(tmp_path / "other", steps=4, seed=1)
    assert timeless(other) != timeless(again)


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(finished, tmp_path):
    folder = tmp_path / "run"
    train(folder, steps=2)
    resumed = train(folder, steps=4, resume=str(folder))
    assert timeless(resumed) == timeless(rows(finished))


def test_a_run_that_was_killed_while_it_logged_is_resumed(finished, tmp_path):
    folder = tmp_path / "run"
    train(folder, steps=2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 3, "reward/me')
    resumed = train(folder, steps=4, resume=str(folder))
    assert timeless(resumed) == timeless(rows(finished))


def test_a_run_without_a_checkpoint_is_resumed_from_the_start(finished, tmp_path):
    folder = tmp_path / "run"
    train(folder, steps=1)
    shutil.rmtree(folder / "checkpoints")
    resumed = train(folder, steps=4, resume=str(folder))
    assert timeless(resumed) == timeless(rows(finished))


def test_a_resumed_run_leaves_the_first_batch_alone(tmp_path):
    file = tmp_path / "batch.safetensors"
    train(tmp_path / "run", steps=1, save_batch=str(file))
    before = file.read_bytes()
    train(tmp_path / "run", steps=2, save_batch=str(file), resume=str(tmp_path / "run"))
    assert file.read_bytes() == before


def test_a_model_whose_own_sampling_settings_are_invalid_is_trained_and_saved(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY_MODEL, model)
    settings = json.loads((model / "generation_config.json").read_text())
    settings |= {"do_sample": False, "temperature": 0.6}
    (model / "generation_config.json").write_text(json.dumps(settings))
    train(tmp_path / "run", steps=1, model=str(model))
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "model.safetensors").is_file()


def test_a_budget_of_two_tokens_is_enough_to_run(tmp_path):
    assert train(tmp_path / "run", steps=1, max_new_tokens=2)[1]["length/mean"] <= 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "--steps 0: expected at least 1"),
        ({"eval_questions": 0}, "--eval-questions 0: expected at least 1"),
        ({"seed": -1}, "--seed -1: expected at least 0"),
        ({"epochs": 0}, "--epochs 0: expected at least 1"),
        ({"tis_cap": 0.0}, "--tis-cap 0.0: expected above 0"),
        ({"clip_eps_low": 1.5}, "--clip-eps-low 1.5: expected at least 0 and at most 1"),
        ({"group_size": 1}, "--group-size 1: expected at least 2"),
        ({"env": "NoSuch-v0"}, "--env 'NoSuch-v0' cannot be made"),
        ({"env": "no_such_module:Env-v0"}, "--env 'no_such_module:Env-v0' cannot be made"),
        ({"env": "CartPole-v1"}, "--env 'CartPole-v1' cannot be made"),
        ({"tracker": "no_such_tracker"}, "pip install no_such_tracker"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, kwargs, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        train(tmp_path / "run", **{"steps": 1, **kwargs})


def test_metrics_go_to_tensorboard_too(tmp_path):
    train(tmp_path / "run", steps=1, tracker="tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_mixed_precision_samples_and_trains(tmp_path):
    logged = train(tmp_path / "run", steps=1, dtype="bfloat16")
    assert logged[1]["mismatch/logprob_abs_mean"] < 0.01
    assert all(
        tensor.dtype == torch.float32
        for tensor in load_file(tmp_path / "run/checkpoints/step-1/model.safetensors").values()
    )


def test_several_updates_and_epochs_move_the_policy_off_the_sampling_policy(tmp_path):
    logged = train(tmp_path / "run", steps=1, updates_per_step=2, epochs=2, lr=3e-2)
    assert logged[1]["policy/approx_kl"] > 0


def test_the_first_optimiser_step_takes_its_old_logprobs_from_its_own_forward(
    tmp_path, monkeypatch
):
    several = {"steps": 2, "updates_per_step": 2, "epochs": 2}
    score, scored = BatchPlan.score, []

    def counted(self, batch, forward, rows=None):
        scored.append(len(rows))
        return score(self, batch, forward, rows)

    monkeypatch.setattr(BatchPlan, "score", counted)
    own = train(tmp_path / "own", **several)
    assert scored == [2, 2]  # of the 4 responses of each batch

    def score_all(self, policy, batch, temperature, minibatches):
        return score(self, batch, lambda tokens: policy(tokens, temperature=temperature)[0])

    monkeypatch.setattr(BatchPlan, "old_logprobs", score_all)
    scored_before = train(tmp_path / "all", **several)
    for row, other in zip(timeless(own), timeless(scored_before), strict=True):
        numbers, others = ({k: v for k, v in r.items() if v is not None} for r in (row, other))
        assert numbers == pytest.approx(others, rel=1e-4, abs=1e-6)


def test_a_forward_with_gradient_and_entropy_has_the_numbers_of_one_without():
    policy = Policy(load_model("tiny"), load_tokenizer("tiny").vocab_size)
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 7, 1, 5])
    tokens = TokenBatch(
        torch.randint(1, 400, (2, 9), generator=random),
        torch.tensor([9, 9]),
        torch.tensor([0, 0, 1, 1]),
        torch.randint(1, 400, (4, 7), generator=random) * (torch.arange(7) < lengths[:, None]),
        lengths,
    )
    trained, _ = policy(tokens, temperature=0.7, with_entropy=True)
    with torch.no_grad():
        scored, _ = policy(tokens, temperature=0.7)
    assert trained.requires_grad and torch.equal(trained.detach(), scored)


def test_a_checkpoint_is_a_model_to_start_from(finished, tmp_path):
    model = str(finished / "checkpoints" / "step-4")
    logged = train(tmp_path / "run", steps=1, model=model)
    assert logged[0]["eval/length/mean"] == rows(finished)[-1]["eval/length/mean"]


def test_a_folder_that_holds_a_run_is_not_overwritten(finished):
    with pytest.raises(ConfigurationError, match=re.escape(f"--resume {finished}")):
        train(finished, steps=1)


def command(*arguments):
    return [sys.executable, str(ROOT / "algos" / "dr_grpo.py"), *arguments]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FLAGS = [
    f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items() if key != "eval_every"
]


@pytest.mark.slow
def test_ctrl_c_ends_the_run_cleanly_with_a_checkpoint(tmp_path):  # SIGTERM: test_resume.py
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(*FLAGS, "--steps=100000", f"--run-dir={folder}", "--eval-every=0"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    last = rows(folder)[-1]["step"]
    assert (folder / "checkpoints" / f"step-{last}" / "trainer" / "optimizer.safetensors").is_file()
    assert f"--resume {folder}" in output


@pytest.mark.slow
def test_two_ranks_under_torchrun_do_what_one_does(finished, tmp_path):
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    subprocess.run(
        [*torchrun, *command(*FLAGS, "--steps=2", f"--run-dir={folder}", "--eval-every=2")[1:]],
        env={**ENVIRONMENT, "MASTER_PORT": "29611"},
        check=True,
        timeout=240,
    )
    assert json.loads((folder / "config.json").read_text())["ranks"] == 2
    for mine, alone in zip(timeless(rows(folder)), timeless(rows(finished)), strict=False):
        assert mine.keys() == alone.keys()
        for key, value in mine.items():
            expected = alone[key]
            if expected is not None:  # a mean over nothing
                expected = pytest.approx(expected, rel=1e-3, abs=1e-5)
            assert value == expected, key


def test_errors_end_the_program_with_their_message_alone(tmp_path):
    result = subprocess.run(
        command("--prompts-per-step=0", f"--run-dir={tmp_path / 'run'}"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: --prompts-per-step 0 is not a multiple")


def test_help_explains_every_flag():
    shown = subprocess.run(
        command("--help"), env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout
    for flag in (
        "env model engine questions steps prompts-per-step group-size max-new-tokens temperature "
        "lr warmup-steps weight-decay adam-beta2 max-grad-norm updates-per-step epochs "
        "clip-eps-low clip-eps-high tis-cap entropy-coef seed eval-every eval-questions "
        "checkpoint-every run-dir resume save-batch tracker device dtype"
    ).split():
        assert f"--{flag} " in shown


def test_one_batch_ahead_is_sampled_by_weights_of_one_step_before(tmp_path):
    logged = train(tmp_path / "run", steps=3, async_depth=1)
    assert [row["sampling/staleness"] for row in logged[1:]] == [0.0, 1.0, 1.0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tis_cap"] == 5.0
    again = train(tmp_path / "again", steps=3, async_depth=1)
    assert timeless(again) == timeless(logged)
    assert logged[3]["mismatch/logprob_abs_mean"] > 1e-3  # samples of older weights


def test_without_a_batch_ahead_samples_are_those_of_the_newest_weights(finished):
    assert all(row["sampling/staleness"] == 0 for row in rows(finished)[1:])


@pytest.mark.parametrize("async_depth", [0, 1])
def test_the_engine_sleeps_while_its_batch_is_trained_on_unless_it_samples_then(
    tmp_path, monkeypatch, async_depth
):
    did = []
    for name in ("sleep", "wake", "generate", "update_weights"):
        original = getattr(LocalEngine, name)

        def noted(self, *args, original=original, name=name, **kwargs):
            did.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(LocalEngine, name, noted)
    stepped = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *args, **kwargs: did.append("step") or stepped(*args)
    )
    train(tmp_path / "run", steps=2, eval_every=0, async_depth=async_depth)
    if async_depth:
        assert "sleep" not in did
        return
    asleep = False
    for name in did:
        asleep = name == "sleep" or (asleep and name != "wake")
        assert asleep == (name in ("sleep", "step")), did
    assert did.count("sleep") == 2
