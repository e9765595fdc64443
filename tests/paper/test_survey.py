"""The scripts on the survey's findings: what they compute, by hand, and the runs they start."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from paper.scripts import dry_run, load, parse

from lmrl_env.exact import TabularPolicy, TokenMDP, enumerate_trajectories

survey = load("paper/survey")
clip_higher = load("paper/clip_higher")
std_choices = load("paper/std_choices")
granularity = load("paper/loss_granularity")
overlong = load("paper/overlong_filtering")
ratios = load("paper/sequence_ratios")


def write_run(folder, **metrics):
    """Write a run's rows from the values of its metrics by step."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step} | dict(zip(metrics, values, strict=True))) + "\n"
            for step, values in enumerate(zip(*metrics.values(), strict=True))
        )
    )


@pytest.mark.parametrize("scale", ["tiny", "paper"])
@pytest.mark.parametrize("script", [clip_higher, std_choices, granularity, overlong])
def test_the_runs_of_a_dry_run_parse(script, scale, tmp_path, monkeypatch):
    commands = dry_run(script, "--scale", scale, "--runs-dir", str(tmp_path), "--seeds", "1")
    settings = [parse(command, monkeypatch) for command in commands]
    assert len({command[1] for command in commands}) == len(commands)
    if scale == "paper":
        assert all(own["prompts_per_step"] == 128 and own["lr"] == 1e-6 for own in settings)
        assert all(own["updates_per_step"] == 8 for own in settings)


def test_the_ratios_at_the_papers_scale_are_those_of_four_algorithms(tmp_path, monkeypatch):
    commands = dry_run(ratios, "--scale", "paper", "--runs-dir", str(tmp_path), "--seeds", "1")
    bounds = [parse(command, monkeypatch)["clip_eps_high"] for command in commands]
    assert bounds == [0.2, 0.28, 4e-4, 0.2]


def test_the_last_third_of_training_is_the_last_third_of_the_steps(tmp_path):
    write_run(tmp_path / "a", entropy=[None, 9, 9, 9, 9, 1, 3])
    assert survey.last_third([tmp_path / "a"], "entropy").tolist() == [2.0]


def test_without_a_std_every_pass_rate_weighs_the_same():
    weights = [std_choices.exact_weight("none", p) for p in (0.05, 0.5, 0.9)]
    assert weights == pytest.approx([7 / 8] * 3)


@pytest.mark.parametrize("choice", ["group", "none"])
def test_the_exact_weight_is_the_expectation_over_all_groups(choice):
    p, weight = 0.8, 0.0
    for bits in range(2**8):
        rewards = torch.tensor([float(bits >> i & 1) for i in range(8)])
        prob = math.prod(p if r else 1 - p for r in rewards.tolist())
        score = (rewards - p) / (p * (1 - p))  # of each response, per unit of the gradient of p
        advantages = std_choices.advantages(choice, rewards)
        weight += prob * float((advantages * score).mean())
    assert std_choices.exact_weight(choice, p) == pytest.approx(weight, rel=1e-6)


def test_the_exact_weight_by_the_batchs_std_is_the_mean_of_sampled_batches():
    rewards = (np.random.default_rng(0).random((16, 8 * 3000)) < 0.9).astype(float)
    sampled = std_choices.measured_weights(rewards)["batch"].mean()
    assert std_choices.exact_weight("batch", 0.9) == pytest.approx(sampled, rel=0.03)


@pytest.mark.parametrize(("choice", "ratio"), [("group", 1), ("batch", 1), ("none", 2)])
def test_only_without_a_std_do_rewards_of_minus_one_and_one_double_the_weight(choice, ratio):
    wide = std_choices.exact_weight(choice, 0.7, -1.0, 1.0)
    assert wide / std_choices.exact_weight(choice, 0.7) == pytest.approx(ratio, rel=1e-3)


def test_a_question_that_is_always_solved_has_no_weight_to_measure():
    rewards = np.tile([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], (2, 1))
    rewards[0] = 1.0
    found = std_choices.measured_weights(rewards)
    assert np.isnan(found["group"][0]) and found["pass_rate"].tolist() == [1.0, 7 / 8]
    assert found["none"][1] == pytest.approx(1.0)


def test_a_token_of_a_long_response_weighs_less_at_the_sequence_level():
    weights = granularity.token_weights(np.array([2, 6, 4]))
    assert weights["token"].tolist() == [1, 1, 1]
    assert weights["sequence"] == pytest.approx([2, 2 / 3, 1])


def test_the_angle_of_orthogonal_gradients_is_a_right_one():
    assert granularity.angle(torch.tensor([1.0, 0]), torch.tensor([0, 2.0])) == pytest.approx(90)


def test_variances_of_ratios_by_hand():
    gaps = torch.tensor([[math.log(2), math.log(2)], [0.0, 0.0]]).double()
    mask = torch.tensor([[True, True], [True, False]])
    got = ratios.variances(gaps, mask, torch.tensor([0.5, 0.5]).double())
    # products 4 and 1, geometric means 2 and 1; tokens 2, 2 of weight 1/4 each and 1 of 1/2
    assert got == pytest.approx({"product": 2.25, "geometric": 0.25, "token": 0.25})


def test_the_variance_of_the_whole_ratio_is_its_second_moment_less_one():
    seed, horizon = 3, 3
    mdp = TokenMDP(3, horizon, reward=lambda *_: 0.0)
    old, new = TabularPolicy(mdp, seed), TabularPolicy(mdp, seed)
    new.logits.data += ratios.NOISE * TabularPolicy(mdp, seed + 10_000).logits.data
    ways, moved = (enumerate_trajectories(mdp, policy) for policy in (old, new))
    second = float((moved.probs**2 / ways.probs).sum())
    assert ratios.exact_variances(horizon, seed)["product"] == pytest.approx(second - 1)


def test_buckets_of_length_hold_all_rows():
    mask = torch.arange(8) < torch.tensor([1, 1, 2, 3, 5, 6, 7, 8])[:, None]
    buckets = ratios.by_length(torch.zeros(8, 8), mask)
    assert [bucket["length"] for bucket in buckets] == [1, 2.5, 5.5, 7.5]


def test_clip_higher_is_judged_by_the_interval_over_seeds():
    def figures(gain, spread):
        value = clip_higher.interval([gain - spread, gain, gain + spread])
        keys = ("entropy_above_0.2", "policy/clip_fraction_high", "accuracy")
        return {name: dict.fromkeys(keys, value) for name in clip_higher.BOUNDS}

    clear, unclear = figures(0.1, 0.001), figures(0.1, 0.2)
    assert clip_higher.judge({"base model": clear, "trained model": clear}, 3).holds == "holds"
    assert clip_higher.judge({"base model": unclear, "trained model": clear}, 3).holds == "partly"
    neither = {"base model": unclear, "trained model": unclear}
    assert clip_higher.judge(neither, 3).holds == "does not hold"


@pytest.fixture(scope="module")
def learner():
    flags = {"group_size": 4, "max_new_tokens": 16}
    return survey.Learner("tiny", "arithmetic:size=50", flags, groups=2)


def test_a_learner_scores_its_own_samples_as_its_engine_did(learner):
    batch = learner.sample(seed=1)
    gap = learner.logprobs(batch) - torch.from_numpy(batch.sampling_logprobs)
    assert gap.abs().max() < 1e-4


def test_a_learners_gradients_of_parts_sum_to_that_of_the_whole(learner):
    batch, loss = learner.sample(seed=2), survey.functions("dr_grpo").policy_loss
    old, advantages = learner.logprobs(batch), torch.linspace(-1, 1, 8)
    whole = learner.backward(batch, range(8), advantages, old, loss)
    parts = [learner.backward(batch, range(i, i + 4), advantages, old, loss) for i in (0, 4)]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-3, atol=1e-7)
