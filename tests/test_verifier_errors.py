"""What becomes of responses whose verifier timed out or crashed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from algos_files import ALGORITHMS, NAMES, each
from test_batches import make_rollout

from lmrl_env import distributed, make_token_vector_env
from lmrl_env.batch_plan import BatchPlan
from lmrl_env.errors import GradingError
from lmrl_env.evaluation import outcome_metrics
from lmrl_env.run import Run
from lmrl_env.types import BatchTotals
from lmrl_env.wrappers import VerifierReward

STATUSES = ["correct", "timeout", "wrong", "correct", "truncated", "crash", "wrong", "correct"]


def make_batch(statuses=STATUSES, group_size=2):
    batch = make_rollout(
        [3] * (len(statuses) // group_size), [4] * len(statuses), group_size=group_size
    )
    rewards = np.array([float(status == "correct") for status in statuses])
    return batch._replace(verifier_status=list(statuses), rewards=rewards)


@pytest.fixture
def accelerator():
    made = distributed.make_accelerator("cpu", "float32", None, ".")
    yield made
    distributed.shutdown(made)


# --- counted


def test_the_share_of_every_status_is_logged_and_truncated_stands_apart(accelerator):
    metrics = outcome_metrics(accelerator, make_batch())
    shares = {key: value for key, value in metrics.items() if key.startswith("verifier/")}
    assert shares == {
        "verifier/correct": 3 / 8,
        "verifier/wrong": 2 / 8,
        "verifier/unparseable": 0,
        "verifier/timeout": 1 / 8,
        "verifier/crash": 1 / 8,
        "verifier/truncated": 1 / 8,
    }
    half = outcome_metrics(accelerator, make_batch(), counted=np.arange(8) < 4)
    assert half["verifier/timeout"] == 1 / 4 and half["verifier/crash"] == 0


def test_without_a_verifier_there_is_nothing_to_count(accelerator):
    metrics = outcome_metrics(accelerator, make_batch([""] * 4))
    assert not any(key.startswith("verifier/") for key in metrics)


def test_the_mean_score_of_each_verifier_is_logged_over_what_it_graded(accelerator):
    scores = [{"right": 1.0, "brief": None}, {"right": 0.0, "brief": None}] * 2
    batch = make_batch(["correct", "wrong"] * 2)._replace(scores=scores)
    metrics = outcome_metrics(accelerator, batch, counted=np.array([True, True, True, False]))
    assert metrics["score/right"] == pytest.approx(2 / 3)
    assert metrics["score/brief"] is None
    assert not any(key.startswith("score/") for key in outcome_metrics(accelerator, make_batch()))


# --- dropped


def test_the_whole_group_of_a_response_without_a_verdict_is_dropped():
    batch = make_batch()
    assert batch.has_verifier_error.tolist() == [False, True] + [False] * 3 + [True, False, False]
    dropped = batch.drop_groups(batch.has_verifier_error, 2)
    assert dropped.kept.tolist() == [False, False, True, True, False, False, True, True]
    assert (dropped.mask[dropped.kept] == batch.mask[dropped.kept]).all()
    assert batch.kept.all() and dropped.rewards is batch.rewards


def make_plan(accelerator, groups, group_size=2):
    return BatchPlan(
        accelerator, questions=groups, group_size=group_size, updates=1, epochs=1,
        max_tokens=1000, seed=0,
    )  # fmt: skip


def test_totals_count_what_is_kept_and_never_nothing(accelerator):
    plan, batch = make_plan(accelerator, 4), make_batch()
    dropped = batch.drop_groups(batch.has_verifier_error, 2)
    rows = np.arange(8)
    assert plan.totals(batch, rows) == BatchTotals(8, 8 * 4, batch.mask.shape[1])
    assert plan.totals(dropped, rows) == BatchTotals(4, 4 * 4, batch.mask.shape[1])
    assert plan.totals(dropped, rows[:2]) == BatchTotals(1, 1, batch.mask.shape[1])


def objective(name, batch, accelerator, logprobs, old_logprobs):
    """Return the loss and its gradient as the training loop computes them for a batch."""
    algorithm, rows = ALGORITHMS[name], np.arange(len(batch.rewards))
    plan = make_plan(accelerator, len(rows) // 2)
    mask = torch.from_numpy(batch.mask)
    if name == "ppo":
        rewards = torch.from_numpy(batch.token_rewards)
        values = rewards.flip(1) / 3  # any that a row alone decides
        advantages, _ = algorithm.compute_advantages(rewards, values, mask)
    elif name == "lite_ppo":
        advantages = plan.advantages(batch.rewards, batch.kept, algorithm.compute_advantages)
    elif name == "reinforce_pp":
        advantages = plan.advantages(batch.token_rewards, batch.kept, algorithm.compute_advantages)
    else:
        advantages = algorithm.compute_advantages(torch.from_numpy(batch.rewards), 2)
    leaf = logprobs.clone().requires_grad_()
    loss, _ = algorithm.policy_loss(leaf, old_logprobs, advantages, mask, plan.totals(batch, rows))
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


@each(*NAMES)
def test_dropping_groups_equals_a_batch_that_never_had_them(name, accelerator):
    random = torch.Generator().manual_seed(0)
    batch = make_batch()
    shape = batch.mask.shape
    logprobs = -torch.rand(shape, generator=random, dtype=torch.float64)
    old = logprobs + 0.1 * torch.rand(shape, generator=random, dtype=torch.float64)
    dropped = batch.drop_groups(batch.has_verifier_error, 2)
    rows = np.flatnonzero(dropped.kept)
    loss, gradient = objective(name, dropped, accelerator, logprobs, old)
    alone, expected = objective(name, batch.take(rows), accelerator, logprobs[rows], old[rows])
    assert loss == pytest.approx(alone, rel=1e-12) and loss != 0
    assert torch.allclose(gradient[rows], expected, rtol=1e-12)
    assert expected.any() and not gradient[~dropped.kept].any()


def test_a_batch_of_which_every_group_is_dropped_has_advantages_of_zero(accelerator):
    batch = make_batch(["crash"] * 4)
    kept = batch.drop_groups(batch.has_verifier_error, 2).kept
    compute = ALGORITHMS["lite_ppo"].compute_advantages
    assert make_plan(accelerator, 2).advantages(batch.rewards, kept, compute).tolist() == [0] * 4


def test_dapo_refills_groups_that_were_dropped():
    dapo, batch = ALGORITHMS["dapo"], make_batch()
    assert dapo.informative_groups(batch, 2) == 3  # all but group 2, truncated and crash
    dropped = batch.drop_groups(batch.has_verifier_error, 2)
    assert dapo.informative_groups(dropped, 2) == 2
    chosen = dapo.choose_groups(dropped, 3, 2)
    assert chosen.question_ids.tolist() == [1, 1, 3, 3, 0, 0]


# --- in a run


def make_failing_envs(num_envs=1, **kwargs):
    envs = make_token_vector_env(num_envs, **kwargs)
    verifier = "scripted_scores:fails_for_some_questions"
    return VerifierReward(envs, verifier, truncated_reward=None)


gym.register(id="Failing-v0", vector_entry_point=make_failing_envs, kwargs={"template": "none"})
SMALL = {
    "env": "Failing-v0", "questions": "arithmetic:size=60", "steps": 1, "prompts_per_step": 6,
    "group_size": 2, "max_new_tokens": 8, "eval_questions": 6, "device": "cpu", "engine": "local",
    "eval_every": 0, "checkpoint_every": 0,
}  # fmt: skip


SETTINGS = {"dapo": {"overlong_cache": 2, "max_refills": 1}, "reinforce_pp": {"kl_coef": 0.1}}


def train(name, folder, **settings):
    algorithm = ALGORITHMS[name]
    algorithm.main(algorithm.Args(**SMALL | {"run_dir": str(folder)} | settings))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["dapo", "reinforce_pp"])
def test_a_run_that_drops_groups_trains_on_the_others(name, tmp_path, capsys):
    start, row = train(name, tmp_path / "run", on_verifier_error="drop", **SETTINGS.get(name, {}))
    assert 0 < row["verifier/crash"] < 1 and start["eval/verifier/crash"] > 0
    assert all(np.isfinite(value) for value in row.values() if value is not None)
    assert row["policy/grad_norm"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning: step") == 1
    share = f"crash {start['eval/verifier/crash']:.1%}"
    assert (
        f"step 0: the verifier did not finish on many held-out responses (timeout 0.0%, {share})"
        in said
    )


@pytest.mark.parametrize(("choice", "kept"), [("zero", 8), ("drop", 4), ("stop", 8)])
def test_the_flag_chooses_what_becomes_of_a_batch(choice, kept, accelerator):
    run = SimpleNamespace(
        args=SimpleNamespace(on_verifier_error=choice, group_size=2), accelerator=accelerator
    )
    judged = make_batch(["correct", "wrong", "unparseable", "truncated"])
    assert Run.settle_verifier_errors(run, judged).kept.all()
    if choice == "stop":
        message = "'timeout' for response 1 to question 0, gold answer '': ''; correct the verifier"
        with pytest.raises(GradingError, match=message):
            Run.settle_verifier_errors(run, make_batch())
    else:
        assert Run.settle_verifier_errors(run, make_batch()).kept.sum() == kept


def test_a_run_may_be_stopped_by_the_first_response_without_a_verdict(tmp_path):
    message = r"--on-verifier-error stop: the verifier's status is 'crash' for response \d+ to "
    with pytest.raises(GradingError, match=message):
        train("dr_grpo", tmp_path / "run", on_verifier_error="stop")
