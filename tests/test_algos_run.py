"""Each of the nine algorithm files trains, end to end."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from algos_files import ALGORITHMS, NAMES, ROOT, each
from safetensors.torch import load_file
from test_run import KEYS, SMALL, rows, timeless

from lmrl_env.errors import ConfigurationError
from lmrl_env.run import Run
from lmrl_env.tokenizer import TINY_MODEL

SETTINGS = {
    **SMALL,
    "group_size": 4,
    "max_new_tokens": 48,
    "seed": 1,  # with right and wrong answers in both steps
    "eval_questions": 2,
    "eval_every": 0,
    "steps": 2,
    "checkpoint_every": 1,
    "updates_per_step": 2,
    "tis_cap": 2.0,
    "entropy_coef": 0.01,
}
OWN = {
    "dapo": {"overlong_cache": 8, "overlong_filter": True, "max_refills": 1},
    "ppo": {"gae_lambda": 0.9},
    **{name: {"kl_coef": 0.1} for name in ("grpo", "rloo", "reinforce_pp")},
}
OWN_KEYS = {
    "dapo": {"sampling/rollouts"},
    "grpo": {"policy/ref_kl"},
    "ppo": {"critic/loss", "critic/clip_fraction", "critic/explained_variance"},
    **{name: {"reward/after_kl"} for name in ("rloo", "reinforce_pp")},
}
MEANS_OVER_SOME = {  # None where there are none
    *("length/correct", "length/incorrect", "eval/length/correct", "eval/length/incorrect"),
    "critic/explained_variance",
}


def train(name, run_dir, **kwargs):
    settings = {**SETTINGS, **OWN.get(name, {}), "run_dir": str(run_dir), **kwargs}
    ALGORITHMS[name].main(ALGORITHMS[name].Args(**settings))
    return rows(run_dir)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """Leave out the curves, which take half of the time of such short runs."""
    monkeypatch.setattr("lmrl_env.run.plot_curves", lambda *args: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a function from the name of a file to the folder of its run, made once."""

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp("runs") / name
        train(name, path)
        return path

    return folder


@each(*NAMES)
def test_every_algorithm_trains_and_logs_finite_figures(name, finished):
    logged = rows(finished(name))
    assert [row["step"] for row in logged] == [0, 1, 2]
    expected = {*KEYS, *OWN_KEYS.get(name, ())}
    for row in logged[1:]:
        assert expected <= set(row)
        undefined = {key for key, value in row.items() if value is None}
        assert undefined <= MEANS_OVER_SOME
        assert all(math.isfinite(row[key]) for key in set(row) - undefined)
        assert 0 < row["reward/accuracy"] < 1 and row["policy/grad_norm"] > 0
        for key in ("policy/clip_fraction_low", "policy/clip_fraction_high"):
            assert 0 <= row[key] <= 1
        assert row["policy/approx_kl"] >= 0 and row["policy/entropy"] > 0
        assert 0 < row["mismatch/effective_sample_size"] <= 1 + 1e-9
    before = load_file(f"{TINY_MODEL}/model.safetensors")
    after = load_file(finished(name) / "checkpoints/step-2/model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before)


@each("ppo", "grpo", "rloo", "dapo")
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one_bit_for_bit(
    name, finished, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finished(name), folder)
    shutil.rmtree(folder / "checkpoints" / "step-2")
    resumed = train(name, folder, resume=str(folder))
    assert timeless(resumed) == timeless(rows(finished(name)))
    uninterrupted = finished(name) / "checkpoints" / "step-2"
    found = uninterrupted.rglob("*.safetensors")
    files = {str(path.relative_to(uninterrupted)) for path in found}
    critic = {"trainer/critic.safetensors", "trainer/critic_optimizer.safetensors"}
    trainer = {"trainer/optimizer.safetensors", "trainer/random_states.safetensors"}
    assert files == {"model.safetensors"} | trainer | (critic if name == "ppo" else set())
    for file in files:
        expected = load_file(uninterrupted / file)
        found = load_file(folder / "checkpoints" / "step-2" / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), file


def test_the_checkpoint_of_an_algorithm_without_a_critic_is_refused_by_ppo(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished("dr_grpo"), folder)
    message = "--resume cannot go on with --algorithm ppo (the run: dr_grpo)"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        train("ppo", folder, steps=3, resume=str(folder))


def test_the_critic_learns_and_is_not_the_policy(finished):
    checkpoints = finished("ppo") / "checkpoints"
    first, second = (
        load_file(checkpoints / f"step-{i}/trainer/critic.safetensors") for i in (1, 2)
    )
    assert first["head.weight"].any() and not torch.equal(
        first["head.weight"], second["head.weight"]
    )
    policy = load_file(checkpoints / "step-2/model.safetensors")
    name = next(key for key in policy if "mlp" in key)
    assert not torch.equal(second[f"model.{name}"], policy[name])
    # Before the first update all values are 0, which explain nothing of the returns.
    assert rows(finished("ppo"))[1]["critic/explained_variance"] == pytest.approx(0, abs=1e-6)


TINY = {
    "prompts_per_step": 2,
    "group_size": 2,
    "max_new_tokens": 8,
    "eval_questions": 1,
    "steps": 1,
    "entropy_coef": 0.0,
    "checkpoint_every": 0,
}


FLAGS = {
    "grpo": {"policy_loss": {"kl_coef": 0.3}},
    "ppo": {
        "compute_advantages": {"gamma": 0.7, "gae_lambda": 0.6},
        "value_loss": {"value_clip": 0.4},
    },
    **{name: {"penalize": {"kl_coef": 0.3}} for name in ("rloo", "reinforce_pp")},
}


@each(*NAMES)
def test_the_flags_of_a_run_reach_its_functions(name, tmp_path, monkeypatch):
    algorithm, seen = ALGORITHMS[name], {}
    expected = {key: dict(flags) for key, flags in FLAGS.get(name, {}).items()}
    loss = expected.setdefault("policy_loss", {})
    loss |= {"clip_eps_low": 0.1, "clip_eps_high": 0.6}

    def spy(function):
        original = getattr(algorithm, function)
        signature = inspect.signature(original)

        def recorded(*args, **kwargs):
            seen[function] = signature.bind(*args, **kwargs).arguments
            return original(*args, **kwargs)

        monkeypatch.setattr(algorithm, function, recorded)

    for function in expected:
        spy(function)
    settings = {key: value for flags in expected.values() for key, value in flags.items()}
    if name == "dapo":
        settings["overlong_filter"] = False  # all of such short responses are truncated
    train(name, tmp_path / "run", **TINY, **settings)
    for function, flags in expected.items():
        assert {key: seen[function][key] for key in flags} == flags
    assert seen["policy_loss"]["totals"] == (2, seen["policy_loss"]["mask"].sum(), 8)
    assert (
        seen["policy_loss"]["advantages"].shape == seen["policy_loss"]["mask"].shape
    )  # by tis_cap


@each("grpo", "rloo", "reinforce_pp")
def test_without_a_penalty_no_reference_is_in_memory(name, tmp_path, monkeypatch):
    def refuse(self, policy):
        raise AssertionError("a reference was loaded")

    monkeypatch.setattr(Run, "load_reference", refuse)
    (_, row) = train(name, tmp_path / "run", **TINY, kl_coef=0.0)
    assert not set(row) & {"policy/ref_kl", "reward/after_kl"}
    with pytest.raises(AssertionError, match="a reference was loaded"):
        train(name, tmp_path / "other", **TINY)


@each("grpo", "rloo", "reinforce_pp")
def test_at_the_start_the_policy_is_the_reference(name, finished, tmp_path):
    if name == "grpo":
        (_, row) = train(name, tmp_path / "run", **TINY | {"updates_per_step": 1})
        assert row["policy/ref_kl"] == pytest.approx(0, abs=1e-9)
    else:
        _, first, second = rows(finished(name))
        assert first["reward/after_kl"] == pytest.approx(first["reward/mean"], abs=1e-5)
        assert second["reward/after_kl"] != pytest.approx(second["reward/mean"], abs=1e-5)


# --- DAPO's sampling


@pytest.fixture
def sampled(monkeypatch):
    """Let the rollouts of a run of DAPO earn what is written down; return what was sampled."""
    dapo = ALGORITHMS["dapo"]
    play, choose = Run.rollout, dapo.choose_groups

    class Sampled:
        rewards: tuple[list[float], ...] = ()
        batches: list = []  # noqa: RUF012
        chosen = None

    def rollout(*args, **kwargs):
        batch = play(*args, **kwargs)
        rewards = np.array(Sampled.rewards[len(Sampled.batches)], dtype=np.float64)
        Sampled.batches.append(batch._replace(rewards=rewards))
        return Sampled.batches[-1]

    def choose_groups(*args):
        Sampled.chosen = choose(*args)
        return Sampled.chosen

    monkeypatch.setattr(Run, "rollout", rollout)
    monkeypatch.setattr(dapo, "choose_groups", choose_groups)
    return Sampled


def test_dull_groups_are_replaced_by_others_and_what_is_logged_is_from_before(sampled, tmp_path):
    sampled.rewards = ([1, 1, 0, 0], [0, 0, 0.75, 0])
    (_, row) = train("dapo", tmp_path / "run", **TINY, overlong_filter=False)
    assert row["sampling/rollouts"] == 2
    assert row["reward/mean"] == 0.5 and row["reward/zero_variance_groups"] == 1.0
    first, refill = (batch.question_ids for batch in sampled.batches)
    assert not set(first) & set(refill)
    assert sampled.chosen.rewards.tolist() == [0.75, 0, 1, 1]
    assert sampled.chosen.question_ids.tolist() == [*refill[2:], *first[:2]]
    assert row["policy/grad_norm"] > 0


def test_groups_that_stay_equal_after_the_cap_are_kept_and_add_nothing(sampled, tmp_path):
    sampled.rewards = ([1, 1, 0, 0], [0.3] * 4, [0] * 4)
    settings = {**TINY, "max_refills": 2, "overlong_filter": False}
    (_, row) = train("dapo", tmp_path / "run", **settings)
    assert row["sampling/rollouts"] == len(sampled.batches) == 3
    assert sampled.chosen.question_ids.tolist() == sampled.batches[0].question_ids.tolist()
    assert row["policy/grad_norm"] == 0
    asked = [question for batch in sampled.batches for question in set(batch.question_ids)]
    assert len(asked) == len(set(asked)) == 6


@pytest.mark.parametrize(
    ("rewards", "max_refills"), [([1, 0, 0, 1], 3), ([1, 1, 0, 0], 0)], ids=["enough", "no_refills"]
)
def test_there_is_no_refill_where_none_is_needed_or_wanted(sampled, tmp_path, rewards, max_refills):
    sampled.rewards = (rewards,)
    (_, row) = train("dapo", tmp_path / "run", **TINY, max_refills=max_refills)
    assert row["sampling/rollouts"] == 1


def test_a_batch_of_which_every_response_is_filtered_out_leaves_the_model_as_it_is(tmp_path):
    settings = {**TINY, "max_new_tokens": 2, "overlong_cache": 1, "entropy_coef": 0.01}
    (_, row) = train("dapo", tmp_path / "run", **settings)
    assert row["length/truncated_fraction"] == 1.0
    assert not any(isinstance(v, float) and math.isnan(v) for v in row.values())
    assert row["policy/grad_norm"] == row["policy/entropy"] == 0
    assert row["mismatch/k3"] is None
    before = load_file(f"{TINY_MODEL}/model.safetensors")
    after = load_file(tmp_path / "run/checkpoints/step-1/model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_cache_wider_than_the_budget_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"--overlong-cache 9: expected .* at most 8"):
        train("dapo", tmp_path / "run", **TINY, overlong_cache=9)


# --- the command line


@each(*NAMES)
def test_help_says_what_the_file_is_and_what_every_flag_does(name, monkeypatch, capsys):
    path = ROOT / "algos" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for field in vars(ALGORITHMS[name].Args()):
        assert re.search(rf"--{field.replace('_', '-')}\b", shown), field
    assert ALGORITHMS[name].__doc__.split()[:7] == shown.split()[3:10]


@pytest.mark.slow
@each("ppo", "dapo", "reinforce_pp")
def test_two_ranks_under_torchrun_do_what_one_does(name, finished, tmp_path):
    folder = tmp_path / "run"
    settings = {**SETTINGS, **OWN[name], "run_dir": folder}
    flags = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in settings.items()
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [sys.executable, *launch, str(ROOT / "algos" / f"{name}.py"), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    assert json.loads((folder / "config.json").read_text())["ranks"] == 2
    together, alone = timeless(rows(folder)), timeless(rows(finished(name)))
    for row, expected in zip(together, alone, strict=True):
        assert row.keys() == expected.keys()
        for key, value in row.items():
            if expected[key] is None:  # a mean over nothing
                assert value is None, key
            else:
                assert value == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key
