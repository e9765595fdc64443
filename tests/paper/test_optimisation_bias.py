"""The optimisation bias: half-steps, tails by probability, exact drifts, and the analysis."""

from __future__ import annotations

import doctest
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from algos_files import ALGORITHMS, file_of
from paper.scripts import dry_run, load, parse

from lmrl_env.options import run_command
from lmrl_env.types import BatchTotals

bias = load("paper/optimisation_bias")
picture = sys.modules["optimisation_bias_picture"]
tails = load("paper/tails")
drift = load("paper/drift")
coin = load("paper/coin")
HALF = {name: load(f"paper/{name}") for name in ("grpo_without_length", "grpo_without_std")}
Interval = sys.modules["claim"].Interval


def test_the_examples_in_docstrings_hold():
    for module in (tails, picture, coin):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


# --- the half-steps


@pytest.mark.parametrize(
    ("half", "advantages_of", "loss_of"),
    [("grpo_without_std", "dr_grpo", "grpo"), ("grpo_without_length", "grpo", "dr_grpo")],
)
def test_a_half_step_takes_one_part_of_each(half, advantages_of, loss_of):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0])
    module, one, other = HALF[half], ALGORITHMS[advantages_of], ALGORITHMS[loss_of]
    advantages = module.compute_advantages(rewards, 3)
    assert torch.equal(advantages, one.compute_advantages(rewards, 3))
    assert not torch.equal(advantages, other.compute_advantages(rewards, 3))
    mask = torch.arange(5) < torch.tensor([[1], [2], [3], [4], [5], [5]])
    old = -torch.rand(6, 5, generator=generator)
    new = old + 0.5 * torch.randn(6, 5, generator=generator)
    batch = (new, old, advantages, mask, BatchTotals(6, 20, 8))
    loss, metrics = module.policy_loss(*batch)
    expected, expected_metrics = other.policy_loss(*batch)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics == expected_metrics
    assert loss != pytest.approx(one.policy_loss(*batch)[0].item(), rel=1e-3)


# --- tails


def test_the_expected_number_of_tails_is_the_sum_of_its_chances():
    h = torch.tensor([[0.5, 0.25, 0.2]])
    # At least one: 1/2; two: 1/8; three: 1/40; and each further one a fifth of that.
    chances = [1 / 2, 1 / 8, *(1 / 40 / 5**k for k in range(40))]
    assert tails.expected_tails(h).item() == pytest.approx(sum(chances), rel=1e-6)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" Maybe it is 7. </think> <answer>7</answer>", (" Maybe it is 7.", "7", False)),
        (
            " I calculate: 3+4=7, 7*2=14. So it is 14. Let me check again. It is 14.",
            (" I calculate: 3+4=7, 7*2=14. So it is 14.", "14", True),
        ),
        (" Let me work it out: 3+4=7, 7*2=14", None),
        ("", None),
    ],
)
def test_a_response_is_cut_where_its_result_first_stands(response, expected):
    assert tails.commitment(response) == expected


def test_hazards_are_the_models_own_next_token_probabilities():
    from lmrl_env.policy import load_model
    from lmrl_env.tokenizer import load_tokenizer

    encode = load_tokenizer("tiny").encode_text
    texts = [
        ["What is 3+4? I guess it is 7.", " I recheck: it is 7.", " I recheck: it is 7."],
        ["12-5? Maybe it is 12.", " I recheck: it is 12.", " I recheck: it is 12."],
    ]
    h = tails.hazards("tiny", [[encode(part) for part in row] for row in texts])
    assert h.shape == (2, 3) and ((h > 0) & (h < 1)).all()
    model = load_model("tiny", attention="sdpa")
    for i, row in enumerate(texts):
        for k in range(3):
            ids = torch.tensor([encode("".join(row[: k + 1]))])
            with torch.no_grad():
                probs = model(input_ids=ids).logits[0, -1].softmax(-1)
            more = sum(probs[encode(word)[0]].item() for word in (" Let", " I", " Double"))
            end = probs[encode(" </think>")[0]].item()
            assert h[i, k].item() == pytest.approx(more / (more + end), abs=1e-4)


def test_measured_tails_are_kept_in_the_runs_folder(tmp_path, monkeypatch):
    asked = []

    def hazards(model, rows):
        asked.append((Path(model).name, rows))
        return torch.full((2, 3), 0.5 if model == "base" else 0.75)

    monkeypatch.setattr(tails, "hazards", hazards)
    rows = {"right": ["r"], "wrong": ["w"]}
    found = tails.over_training(tmp_path, "base", [0, 10], rows)
    assert found["wrong"] == found["right"] == [1.0, 3.0]
    assert found["hazard wrong"] == [0.5, 0.75]
    assert asked == [(m, rows[k]) for m in ("base", "step-10") for k in ("right", "wrong")]
    assert tails.over_training(tmp_path, "base", [0, 10], rows) == found and len(asked) == 4


# --- the coin, and the exact drift


def test_the_coin_falls_evenly_and_knows_nothing_but_the_text():
    throws = [coin.coin(f"It is {i}.", str(j)).score for i in range(100) for j in range(50)]
    assert abs(np.mean(throws) - 0.5) < 3 * math.sqrt(0.25 / 5000)
    assert coin.coin("It is 1.", "1") == coin.coin("It is 1.", "1", question=None)


BY_LENGTH = ("grpo", "grpo_without_std", "gspo")


@pytest.mark.parametrize("name", [*BY_LENGTH, "dr_grpo", "grpo_without_length", "rloo", "ppo"])
def test_only_the_length_normaliser_drives_tails_and_only_where_theory_says(name):
    found = {world: drift.drift(file_of(name), world) for world in drift.WORLDS}
    if name in BY_LENGTH:
        assert found["can tell"]["wrong"] > 0.01 > -0.01 > found["can tell"]["right"]
        shorter = found.pop("cannot tell, wrong solutions shorter")
        assert shorter["wrong"] == pytest.approx(shorter["right"]) and shorter["wrong"] > 0.01
        found.pop("can tell")
    for of_world in found.values():
        assert of_world == pytest.approx({"right": 0, "wrong": 0}, abs=1e-12)


# --- the analysis


def test_differences_are_paired_over_the_seeds_that_both_have():
    # 1 and 3: mean 2, std √2, half-width t(0.975; 1) = 12.706 times √2/√2.
    mean, low, high = bias.difference([2.0, 5.0, 99.0], [1.0, 2.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 12.706, 2 + 12.706), abs=1e-3)


def test_steps_are_averaged_over_what_is_known():
    steps, values = picture.bins(np.arange(1, 6), np.array([[1, np.nan, 3, 5, 9.0]]), 2)
    assert steps.tolist() == [1.5, 3.5] and values.tolist() == [[1.0, 4.0]]


def test_the_last_ten_steps_count(tmp_path):
    rows = [{"step": s, "length/correct": 5.0 if s <= 10 else None} for s in range(1, 11)]
    rows += [{"step": s, "length/correct": s if s % 2 else None} for s in range(11, 21)]
    rows = [{**row, "reward/accuracy": 0.5, "length/mean": 20.0} for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bias.last([tmp_path], "length/correct") == [15.0]  # 11, 13, 15, 17, 19
    assert picture.efficiency([tmp_path])[1].tolist() == [[25.0] * 20]  # 1000 · 0.5 / 20


LONGER, SAME = Interval(2.0, 1.0, 3.0), Interval(0.1, -1.0, 1.2)
CLEAN = {
    "length, wrong": LONGER, "tails after wrong": LONGER, "held-out accuracy": SAME,
    bias.COIN: SAME,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "holds"),
        ({"length, wrong": SAME}, "partly"),
        ({"held-out accuracy": Interval(-0.1, -0.2, -0.01)}, "partly"),
        ({bias.COIN: LONGER}, "partly"),
        ({"length, wrong": SAME, "tails after wrong": Interval(-2, -3, -1)}, "does not hold"),
    ],
)
def test_the_verdict_follows_from_the_intervals(change, verdict):
    assert bias.judge(CLEAN | change) == verdict


def test_a_table_has_means_and_differences_and_no_interval_of_two_seeds():
    found = {"dr_grpo": {"a": [1.0, 2.0, 3.0]}, "grpo": {"a": [2.0, 4.0]}}
    assert bias.table(found, False).splitlines()[2:] == [
        "| `dr_grpo` | 3 | 2 [-0.484, 4.48] |",
        "| `grpo` | 2 | 3 |",
    ]
    assert bias.table(found, True).splitlines()[2:] == ["| `grpo` | 2 | 1.5 |"]


# --- the runs


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_the_runs_of_a_dry_run_parse(scale, tmp_path, monkeypatch):
    commands = dry_run(bias, "--scale", scale, "--runs-dir", str(tmp_path), "--seeds", "3")
    assert len(commands) == 4 * 3 + 7 * 2 == len({command[1] for command in commands})
    for command in commands:
        settings = settings_of(command, monkeypatch)
        assert settings["prompts_per_step"] == (8 if scale == "tiny" else 128)
        assert settings["updates_per_step"] == (1 if scale == "tiny" else 8)


def settings_of(command, monkeypatch):
    if (name := Path(command[0]).stem) not in HALF:
        return parse(command, monkeypatch)
    seen = []
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        run_command(HALF[name].Args, lambda args: seen.append(vars(args)))
    return seen[0]
