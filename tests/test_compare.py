from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import VOCAB_SIZE, random_model

from lmrl_env import algorithm_files, comparison, policy
from lmrl_env.algorithm_files import checkout_files, load_algorithms
from lmrl_env.analysis import difficulty_bias, length_bias, report
from lmrl_env.batches import micro_batches
from lmrl_env.cli import main
from lmrl_env.cli.compare import load_batch
from lmrl_env.comparison import compare
from lmrl_env.errors import ConfigurationError
from lmrl_env.policy import Policy, load_model
from lmrl_env.rollout import Rollout, response_seeds, rollout
from lmrl_env.tokenizer import TINY_MODEL
from lmrl_env.types import BatchTotals

ALGOS = Path(__file__).parents[1] / "algos"
K = 8


def make_batch(lengths, rewards, group_size, *, terminated=True, seed=0) -> Rollout:
    """Return a batch of random tokens, one prompt of three tokens for each group."""
    random = np.random.default_rng(seed)
    n = len(lengths)
    mask = np.arange(K) < np.asarray(lengths)[:, None]
    prompts = random.integers(0, VOCAB_SIZE, (n // group_size, 3)).astype(np.int32)
    return Rollout(
        prompt_ids=prompts.repeat(group_size, 0),
        prompt_lengths=np.full(n, 3),
        response_ids=np.where(mask, random.integers(0, VOCAB_SIZE, (n, K)), 0).astype(np.int32),
        response_lengths=np.asarray(lengths),
        mask=mask,
        sampling_logprobs=np.where(mask, -random.uniform(1, 3, (n, K)), 0).astype(np.float32),
        rewards=np.asarray(rewards, dtype=np.float64),
        dense_rewards=np.zeros((n, K)),
        terminated=np.broadcast_to(terminated, n).copy(),
        question_ids=np.arange(n) // group_size,
        versions=np.zeros(n, np.int64),
        responses=[""] * n,
        answers=[""] * n,
        verifier_status=[""] * n,
        scores=[{}] * n,
        sample_seconds=0.0,
        env_seconds=0.0,
    )


def algorithms(*names):
    return load_algorithms([ALGOS / f"{name}.py" for name in names])


@pytest.fixture(scope="module")
def random_policy() -> Policy:
    return Policy(random_model("qwen2"), VOCAB_SIZE)


def compare_on_policy(policy, batch, group_size, names, **kwargs):
    kwargs = {"same_policy_gap": math.inf} | kwargs
    return compare(policy, batch, group_size, algorithms(*names), temperature=1.0, **kwargs)


# --- weights, by hand: one question, a right answer of 2 tokens and a wrong one of 4

STANDARDISED = 0.5 / (math.sqrt(0.5) + 1e-4)  # of rewards 1 and 0, whose Bessel std is √½
BY_HAND = {
    "dr_grpo": (0.5 / (2 * K), -0.5 / (2 * K)),
    "ppo": (1 / (2 * K), 0.0),
    "reinforce_pp": (STANDARDISED / (2 * K), -STANDARDISED / (2 * K)),
    "rloo": (1 / 2, -1 / 2),
    "grpo": (STANDARDISED / 2 / 2, -STANDARDISED / 2 / 4),
    "gspo": (STANDARDISED / 2 / 2, -STANDARDISED / 2 / 4),
    "dapo": (STANDARDISED / 6, -STANDARDISED / 6),
    "cispo": (STANDARDISED / 6, -STANDARDISED / 6),
    "lite_ppo": (STANDARDISED / 6, -STANDARDISED / 6),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_token_weighs_what_the_formula_says(name, random_policy):
    batch = make_batch([2, 4], [1, 0], group_size=2)
    (weights,) = compare_on_policy(random_policy, batch, 2, [name]).weights
    right, wrong = BY_HAND[name]
    expected = [[right] * 2 + [0] * 6, [wrong] * 4 + [0] * 4]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_every_file_of_the_checkout_is_weighed_by_hand():
    assert {path.stem for path in checkout_files()} == set(BY_HAND)


# --- gradients

LENGTHS, REWARDS = [2, 5, 8, 1, 3, 3, 7, 4, 6], [1, 0, 0, 0, 1, 1, 0, 0, 0.5]


def gradient_by_backward(policy, algorithm, batch, group_size, on_policy):
    """Return the gradient of the loss of the whole batch at once, by ``loss.backward()``."""
    (micro,) = micro_batches(batch, [np.arange(len(batch.rewards))], group_size, "cpu")
    logprobs, _ = policy(micro.tokens, temperature=1.0)
    old = logprobs.detach() if on_policy else micro.sampling_logprobs
    if algorithm.name == "ppo":
        rewards = torch.zeros(batch.mask.shape)
        rewards[torch.arange(len(rewards)), torch.from_numpy(batch.response_lengths) - 1] = (
            torch.from_numpy(batch.rewards).float()
        )
        mask = torch.from_numpy(batch.mask)
        advantages, _ = algorithm.compute_advantages(rewards, torch.zeros_like(rewards), mask)
    else:
        advantages = algorithm.compute_advantages(torch.from_numpy(batch.rewards), group_size)
    totals = BatchTotals(len(batch.rewards), int(batch.mask.sum()), K)
    loss, _ = algorithm.policy_loss(
        logprobs, old, micro.part(advantages.float()), micro.mask, totals
    )
    policy.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad(set_to_none=True)
    return gradient


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_gradients_are_those_of_backward_however_the_batch_is_cut(
    on_policy, max_tokens, random_policy
):
    batch = make_batch(LENGTHS, REWARDS, group_size=3)
    names = sorted(BY_HAND)
    gap = math.inf if on_policy else 0.0
    result = compare_on_policy(
        random_policy, batch, 3, names, same_policy_gap=gap, max_tokens=max_tokens
    )
    assert result.on_policy == on_policy
    expected = torch.stack(
        [
            gradient_by_backward(random_policy, algorithm, batch, 3, on_policy)
            for algorithm in algorithms(*names)
        ]
    )
    np.testing.assert_allclose(result.norms, expected.norm(dim=1), rtol=1e-6)
    unit = expected / expected.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(result.cosines, unit @ unit.T, atol=1e-6)


def test_logits_and_products_in_chunks_give_the_same_gradients(random_policy, monkeypatch):
    batch = make_batch(LENGTHS, REWARDS, group_size=3)
    names = ["dr_grpo", "grpo", "rloo"]
    whole = compare_on_policy(random_policy, batch, 3, names)
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", 4 * VOCAB_SIZE)
    monkeypatch.setattr(comparison, "PARAMETERS_AT_ONCE", 1000)
    chunked = compare_on_policy(random_policy, batch, 3, names)
    np.testing.assert_allclose(chunked.norms, whole.norms, rtol=1e-9)
    np.testing.assert_allclose(chunked.cosines, whole.cosines, atol=1e-9)


def test_grpo_and_dr_grpo_part_over_lengths_and_agree_where_they_are_equal(random_policy):
    names = ["grpo", "dr_grpo"]
    varied = compare_on_policy(random_policy, make_batch([1, 8, 2, 7], [1, 0, 1, 0], 4), 4, names)
    assert varied.cosines[0, 1] < 0.99
    equal = compare_on_policy(random_policy, make_batch([5] * 4, [1, 0, 1, 1], 4), 4, names)
    np.testing.assert_allclose(equal.cosines, 1, atol=1e-6)
    # Rewards 1 0 1 1 have Bessel std ½; per token GRPO divides by 5, Dr. GRPO by K.
    assert equal.norms[0] / equal.norms[1] == pytest.approx(K / 5 / (0.5 + 1e-4), rel=1e-6)


def test_a_batch_without_signal_has_no_gradient_and_no_angle(random_policy):
    batch = make_batch([2, 3, 4, 5], [1, 1, 0, 0], group_size=2)
    result = compare_on_policy(random_policy, batch, 2, ["grpo", "ppo"])
    assert result.norms[0] == 0 < result.norms[1]
    figures = report(result, ["grpo", "ppo"], batch, 2)
    assert figures["files"][0]["cosines"] == [None, None]
    assert figures["files"][1]["cosines"] == [None, pytest.approx(1)]
    assert figures["files"][0]["length"]["right"]["exponent"] is None
    assert figures["files"][0]["difficulty"] == {
        "exponent": None, "buckets": [None] * 5, "rows": [], "relative_weight": [],
    }  # fmt: skip


def test_the_gap_to_the_engine_is_a_mean_over_action_tokens(random_policy):
    batch = make_batch([2, 4], [1, 0], group_size=2)
    (micro,) = micro_batches(batch, [np.arange(2)], 2, "cpu")
    with torch.no_grad():
        own = random_policy(micro.tokens, temperature=1.0)[0].numpy()
    sampling = np.zeros((2, K), np.float32)
    sampling[:, :4] = own
    sampling[0, 1] += 0.3  # one of six tokens
    batch = batch._replace(sampling_logprobs=sampling)
    result = compare_on_policy(random_policy, batch, 2, ["rloo"], same_policy_gap=0.051)
    assert result.logprob_gap == pytest.approx(0.05, rel=1e-5)
    assert result.on_policy
    result = compare_on_policy(random_policy, batch, 2, ["rloo"], same_policy_gap=0.049)
    assert not result.on_policy
    # Now the ratio of that token is exp(-0.3), and RLOO's weight of a right answer 1/2.
    assert result.weights[0, 0, 1] == pytest.approx(math.exp(-0.3) / 2, rel=1e-5)


def test_inserted_tokens_have_no_weight_and_do_not_count(random_policy):
    batch = make_batch([4, 4], [1, 0], group_size=2)
    batch.mask[0, 1:3] = False
    batch.sampling_logprobs[0, 1:3] = 0
    result = compare_on_policy(random_policy, batch, 2, ["grpo"])
    right, wrong = BY_HAND["grpo"]
    expected = [[right, 0, 0, right] + [0] * 4, [wrong] * 4 + [0] * 4]
    np.testing.assert_allclose(result.weights[0], expected, rtol=1e-6)
    assert report(result, ["grpo"], batch, 2)["responses"]["length"] == [2, 4]
    law = length_bias(
        np.array([1 / 2, 1 / 4]), batch._replace(rewards=np.ones(2)), 2, np.ones(2, bool)
    )
    assert law.exponent == pytest.approx(-1)


# --- the two biases


def weights_for(lengths, rewards, alpha, beta, group_size, baselines):
    """Return |o|^α · (std^β (R - mean) + baseline) for each response."""
    groups = np.asarray(rewards, dtype=float).reshape(-1, group_size)
    std = groups.std(1, keepdims=True)
    unit = np.where(std > 0, std, 1.0) ** beta * (groups - groups.mean(1, keepdims=True))
    return (unit + np.asarray(baselines)[:, None]).ravel() * np.asarray(lengths, float) ** alpha


exponents = st.floats(-2, 2)


@settings(max_examples=40)
@given(exponents, exponents, st.permutations([1, 2, 3, 5, 8, 7, 6, 4, 5, 3, 1, 2]))
def test_both_exponents_are_found_whatever_the_pass_rates(alpha, beta, lengths):
    rewards = [1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    batch = make_batch(lengths, rewards, group_size=6)
    weights = weights_for(lengths, rewards, alpha, beta, 6, baselines=[0.0, 0.0])
    chosen = np.ones(12, bool)
    assert length_bias(weights, batch, 6, chosen).exponent == pytest.approx(alpha, abs=1e-9)
    found = difficulty_bias(weights, batch, 6, alpha).exponent
    assert found == pytest.approx(beta, abs=1e-9)


@settings(max_examples=20)
@given(exponents, st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=2))
def test_a_baseline_does_not_change_the_difficulty_bias(beta, baselines):
    rewards = [1, 0, 0, 0, 1, 1, 0, 0]
    batch = make_batch([4] * 8, rewards, group_size=4)
    weights = weights_for([4] * 8, rewards, 0.0, beta, 4, baselines)
    assert difficulty_bias(weights, batch, 4, None).exponent == pytest.approx(beta, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "alpha", "beta"),
    [("grpo", -1, -1), ("gspo", -1, -1), ("dapo", 0, -1), ("cispo", 0, -1)]
    + [(name, 0, 0) for name in ("dr_grpo", "rloo", "lite_ppo", "reinforce_pp")],
)
def test_each_algorithm_has_the_exponents_of_its_formula(name, alpha, beta, random_policy):
    lengths = [2, 5, 8, 1, 3, 3, 7, 4, 6, 2, 5, 4]
    rewards = [1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1]
    batch = make_batch(lengths, rewards, group_size=4)
    result = compare_on_policy(random_policy, batch, 4, [name])
    (file,) = report(result, [name], batch, 4)["files"]
    assert file["length"]["right"]["exponent"] == pytest.approx(alpha, abs=1e-5)
    assert file["length"]["wrong"]["exponent"] == pytest.approx(alpha, abs=1e-5)
    assert file["difficulty"]["exponent"] == pytest.approx(beta, abs=1e-3)  # eps beside the std


def test_relative_weights_are_in_units_of_the_mean_length_and_the_mean_std(random_policy):
    lengths = [2, 8, 4, 4, 2, 8, 4, 4]  # of geometric mean 4
    batch = make_batch(lengths, [1, 1, 0, 0, 1, 0, 0, 0], group_size=4)
    result = compare_on_policy(random_policy, batch, 4, ["grpo"])
    (file,) = report(result, ["grpo"], batch, 4)["files"]
    right, difficulty = file["length"]["right"], file["difficulty"]
    assert right["rows"] == [0, 1]  # the right answer to the second question is the only one
    assert right["relative_weight"] == pytest.approx([2, 0.5])
    assert right["buckets"] == [pytest.approx(2), None, pytest.approx(0.5)]  # up to 2, 4 and 8
    # Stds are 1/2 and √3/4, whose geometric mean m is √(√3/8); weights are m / std.
    mean = math.sqrt(math.sqrt(3) / 8)
    assert difficulty["relative_weight"] == pytest.approx([mean * 2, mean * 4 / 3**0.5], rel=1e-4)
    assert difficulty["buckets"][1] == pytest.approx(mean * 4 / 3**0.5, rel=1e-4)  # rate 1/4
    assert difficulty["buckets"][2] == pytest.approx(mean * 2, rel=1e-4)  # rate 1/2


def test_truncated_responses_are_neither_right_nor_wrong(random_policy):
    lengths, rewards = [2, 4, 8, 3, 6, 8], [1, 1, 1, 0, 0, 0]
    ended = np.array([True, True, False, True, True, False])
    batch = make_batch(lengths, rewards, group_size=6, terminated=ended)
    result = compare_on_policy(random_policy, batch, 6, ["grpo"])
    figures = report(result, ["grpo"], batch, 6)
    outcomes = ["right", "right", "truncated", "wrong", "wrong", "truncated"]
    assert figures["responses"]["outcome"] == outcomes
    (file,) = figures["files"]
    assert file["length"]["right"]["rows"] == [0, 1]
    assert file["length"]["wrong"]["rows"] == [3, 4]
    assert figures["length_buckets"][-1] == 6
    assert figures["pass_rates"] == [0.5]  # they count as the verifier says


def test_where_lengths_do_not_vary_there_is_no_exponent():
    batch = make_batch([4] * 4, [1, 1, 0, 0], group_size=4)
    law = length_bias(np.array([1.0, 1, -1, -1]), batch, 4, np.ones(4, bool))
    assert law.exponent is None
    np.testing.assert_allclose(law.relative, 1)


# --- algorithm files

OWN = """
from dataclasses import dataclass
import torch
from beside import HALF

@dataclass
class Args:
    seed: "int" = 0

def compute_advantages(rewards, group_size):
    {advantages}

def policy_loss(logprobs, old_logprobs, advantages, mask, totals, *, power=2.0):
    {loss}
"""


def write_own(folder, advantages="return rewards - HALF", loss=None, name="own"):
    loss = loss or "return -(logprobs * advantages[:, None] * mask).sum() / totals.tokens, {}"
    folder.mkdir(exist_ok=True)
    (folder / "beside.py").write_text("HALF = 0.5\n")
    path = folder / f"{name}.py"
    path.write_text(OWN.format(advantages=advantages, loss=loss))
    return path


def test_a_file_of_ones_own_is_compared(tmp_path, random_policy):
    batch = make_batch([2, 4], [1, 0], group_size=2)
    own = load_algorithms([write_own(tmp_path)])
    (weights,) = compare(random_policy, batch, 2, own, temperature=1.0).weights
    np.testing.assert_allclose(weights[:, 0], [0.5 / 6, -0.5 / 6], rtol=1e-6)


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path):
    files = [write_own(tmp_path / "a"), write_own(tmp_path / "b"), ALGOS / "rloo.py"]
    names = [algorithm.name for algorithm in load_algorithms(files)]
    assert names == [str(files[0]), str(files[1]), "rloo"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"advantages": "return rewards[0 / 0]"}, r"own fails in line 11: ZeroDivisionError: "),
        (
            {"advantages": "return rewards[:1]"},
            r"returns shape \(1,\): expected .*\(2,\).*\(2, 8\)",
        ),
        ({"advantages": "return None"}, r"returns shape \(\): expected"),
        ({"loss": "return logprobs.sum() * (mask.sum() / 0), {}"}, "gradient is not finite"),
        ({"loss": "return logprobs.detach().sum(), {}"}, "own fails: RuntimeError: "),
        ({"loss": "return 1"}, "own fails: TypeError: "),
    ],
)
def test_a_file_that_fails_is_named(own, message, tmp_path, random_policy):
    batch = make_batch([2, 4], [1, 0], group_size=2)
    own = load_algorithms([write_own(tmp_path, **own)])
    with pytest.raises(ConfigurationError, match=message):
        compare(random_policy, batch, 2, own, temperature=1.0)


def test_files_that_cannot_be_loaded_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"no algorithm file 'nowhere\.py'"):
        load_algorithms(["nowhere.py"])
    (tmp_path / "empty.py").write_text("def policy_loss(): ...")
    with pytest.raises(ConfigurationError, match=r"empty\.py' has no compute_advantages: expected"):
        load_algorithms([tmp_path / "empty.py"])
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigurationError, match=r"broken fails: SyntaxError: .*line 1"):
        load_algorithms([tmp_path / "broken.py"])
    with pytest.raises(ConfigurationError, match="each of them once"):
        load_algorithms([ALGOS / "rloo.py", ALGOS / ".." / "algos" / "rloo.py"])
    monkeypatch.setattr(algorithm_files, "CHECKOUT", tmp_path)
    with pytest.raises(ConfigurationError, match="expected the paths of some"):
        checkout_files()


# --- the command

TEMPERATURE = 0.8
RUN_ARGS = {
    "model": "tiny", "temperature": TEMPERATURE, "dtype": "float32", "prompts_per_step": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def sampled() -> Rollout:
    """Return six responses of the tiny model to each of six questions."""
    envs = gym.make_vec(
        "MathR1-v0", 36, engine="local", group_size=6, max_new_tokens=64, tokens_per_step=64,
        autoreset_mode="Disabled",
    )  # fmt: skip
    batch = rollout(
        envs,
        envs.unwrapped.engine,
        question_ids=np.arange(6),
        seeds=response_seeds(0, 1, 36),
        temperature=TEMPERATURE,
    )
    envs.close()
    return batch


@pytest.fixture
def batch_file(sampled, tmp_path) -> Path:
    sampled.save(tmp_path / "batch.safetensors", group_size=6, args=RUN_ARGS)
    return tmp_path / "batch.safetensors"


def lmrl(*args):
    return CliRunner().invoke(main, ["compare", *map(str, args)], catch_exceptions=False)


def test_the_command_compares_all_files_of_the_checkout(batch_file, sampled):
    result = lmrl(batch_file)
    assert result.exit_code == 0, result.output
    assert "on-policy: log-probs of tiny" in result.output
    assert "ppo: the values of its critic, which is untrained, are 0" in result.output
    figures = json.loads(batch_file.with_name("batch.compare.json").read_text())
    assert batch_file.with_name("batch.compare.png").read_bytes().startswith(b"\x89PNG")
    assert figures["on_policy"] and figures["logprob_gap"] < 1e-5
    assert figures["group_size"] == 6
    files = {file["name"]: file for file in figures["files"]}
    assert set(files) == set(BY_HAND)
    for i, name in enumerate(files):
        assert re.search(rf"^{name} ", result.output, re.MULTILINE)
        assert files[name]["cosines"][i] == pytest.approx(1)
        assert np.mean(np.abs(files[name]["mean_token_weight"])) > 0
    wrong = files["grpo"]["length"]["wrong"]
    assert wrong["exponent"] == pytest.approx(-1, abs=1e-5)
    lengths = sampled.response_lengths
    mean = np.exp(np.log(lengths).mean())
    np.testing.assert_allclose(wrong["relative_weight"], mean / lengths[wrong["rows"]], rtol=1e-4)
    np.testing.assert_allclose(files["dr_grpo"]["length"]["wrong"]["relative_weight"], 1, rtol=1e-4)


def test_another_model_is_off_policy(batch_file, tmp_path):
    other = load_model("tiny")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, tmp_path / "other" / name)
    output = tmp_path / "new" / "figure.png"
    files = [ALGOS / "gspo.py", ALGOS / "grpo.py"]
    result = lmrl(batch_file, *files, "--model", tmp_path / "other", "--output", output)
    assert result.exit_code == 0, result.output
    assert re.search(r"off-policy: .* differ from the batch's by 0\.\d+ nats", result.output)
    figures = json.loads(output.with_suffix(".json").read_text())
    assert not figures["on_policy"] and output.exists()
    gspo, _ = figures["files"]
    assert abs(gspo["cosines"][1]) < 0.999  # its ratio and clip are of the sequence


def test_a_batch_of_several_ranks_is_put_together(batch_file, sampled):
    whole, _, _ = load_batch(batch_file)
    batch_file.unlink()
    for rank in range(2):
        name = batch_file.with_name(f"{batch_file.name}.rank{rank}")
        sampled.take(np.arange(18) + 18 * rank).save(name, group_size=6, args=RUN_ARGS)
    joined, group_size, _ = load_batch(batch_file)
    assert group_size == 6
    for key in ("prompt_ids", "response_ids", "mask", "sampling_logprobs", "rewards"):
        np.testing.assert_array_equal(getattr(joined, key), getattr(whole, key))
    with pytest.raises(ConfigurationError, match=r"one rank's part.*'.*batch\.safetensors'$"):
        load_batch(batch_file.with_name("batch.safetensors.rank1"))
    batch_file.with_name("batch.safetensors.rank0").unlink()
    with pytest.raises(ConfigurationError, match="hold 3 questions: expected the 6"):
        load_batch(batch_file)


def test_what_is_no_batch_is_refused(sampled, tmp_path):
    path = tmp_path / "batch"
    with pytest.raises(ConfigurationError, match="there is no batch"):
        load_batch(path)
    path.write_text("no safetensors")
    with pytest.raises(ConfigurationError, match="is no rollout batch: expected"):
        load_batch(path)
    with pytest.raises(ConfigurationError, match="is no rollout batch: expected"):
        load_batch(TINY_MODEL / "model.safetensors")
    sampled.save(path, group_size=6)
    with pytest.raises(ConfigurationError, match="does not say args"):
        load_batch(path)
    sampled.save(path, group_size=6, args={"model": "tiny"})
    with pytest.raises(ConfigurationError, match="does not say dtype, prompts_per_step, temper"):
        load_batch(path)
    sampled.save(path, group_size=6, args=RUN_ARGS | {"dtype": "int4"})
    with pytest.raises(ConfigurationError, match="dtype 'int4': expected one of float32"):
        load_batch(path)
    for rows in (range(35), [*range(5), 6, 5, *range(7, 36)]):
        sampled.take(list(rows)).save(path, group_size=6, args=RUN_ARGS)
        with pytest.raises(ConfigurationError, match="do not form groups of 6"):
            load_batch(path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", str(ALGOS)], "cannot load the tokenizer of the model folder"),
        (["--output", "figure.jpg"], "--output 'figure.jpg': expected a file name in .png"),
        (["nowhere.py"], "there is no algorithm file 'nowhere.py'"),
        (["nowhere/grpo.py"], f"such as {ALGOS / 'grpo.py'}"),
        (["--device", "cuda"], "there is no GPU"),
    ],
)
def test_arguments_that_cannot_be_meant_end_with_their_message(args, message, batch_file):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = lmrl(batch_file, *args)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")


def test_tokens_that_the_model_does_not_have_are_refused(sampled, tmp_path):
    sampled.response_ids[3, 0] += 100_000
    sampled.save(tmp_path / "batch", group_size=6, args=RUN_ARGS)
    sampled.response_ids[3, 0] -= 100_000
    result = lmrl(tmp_path / "batch", ALGOS / "rloo.py")
    assert result.exit_code == 1
    assert re.search(r"the batch has token 100\d+, and the model 'tiny' has \d+", result.output)


def test_the_package_is_a_program_whose_errors_have_no_traceback(tmp_path):
    command = [sys.executable, "-m", "lmrl_env", "compare", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: there is no batch")
    assert "Traceback" not in result.stderr
