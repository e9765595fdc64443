"""Several verifiers that pay together."""

from __future__ import annotations

import re

import numpy as np
import pytest
from episodes import EOS, ids, play
from small_envs import BUDGET, token_envs

from lmrl_env.errors import ConfigurationError
from lmrl_env.wrappers import WeightedRewards

TWO = {"x": ("scripted_scores:has_x", 1.0), "y": ("scripted_scores:has_y", -0.25)}


def text(*texts):
    return [[[*ids(t), EOS]] for t in texts]


def test_scores_are_weighted_summed_and_logged_by_name():
    # has_x pays 1, has_y 2: weights 1 and -1/4.
    envs = WeightedRewards(token_envs(4, tokens_per_step=BUDGET), TWO)
    returns, ends = play(envs, *text("x", "y", "xy", "q"))
    assert returns.tolist() == [1, -0.5, 0.5, 0]
    assert [end["score_x"] for end in ends] == [1, 0, 1, 0]
    assert [end["score_y"] for end in ends] == [0, 2, 2, 0]
    assert [end["status_x"] for end in ends] == ["correct", "wrong", "correct", "wrong"]
    assert [end["status_y"] for end in ends] == ["wrong", "correct", "correct", "wrong"]
    assert [end["verifier_status"] for end in ends] == ["correct", "wrong", "correct", "wrong"]
    assert [end["verifier_extracted"] for end in ends] == ["x", None, "x", None]


def test_one_verifier_of_weight_one_pays_its_score():
    only = {"length": ("scripted_scores:length", 1.0)}
    envs = WeightedRewards(token_envs(2, tokens_per_step=BUDGET), only)
    assert play(envs, *text("xyz", ""))[0].tolist() == pytest.approx([0.3, 0])


def test_a_verifier_that_fails_is_named_and_leaves_the_others_scores():
    envs = WeightedRewards(token_envs(2, tokens_per_step=BUDGET), TWO)
    returns, ends = play(envs, *text("xz", "x"))
    assert returns.tolist() == [1, 1]
    assert ends[0]["status_y"] == ends[0]["verifier_status"] == "crash"
    assert ends[0]["status_x"] == "correct"
    assert ends[1]["verifier_status"] == "correct"


@pytest.mark.parametrize(("truncated_reward", "paid"), [(-1.0, -1.0), (0.0, 0.0), (None, 1.0)])
def test_a_truncated_response_earns_what_was_said(truncated_reward, paid):
    envs = WeightedRewards(
        token_envs(1, tokens_per_step=BUDGET), TWO, truncated_reward=truncated_reward
    )
    returns, (end,) = play(envs, [ids("x") * BUDGET])
    assert returns.tolist() == [paid]
    assert end["verifier_status"] == ("truncated" if truncated_reward is not None else "correct")
    assert ("score_x" in end) == (truncated_reward is None)


@pytest.mark.parametrize(
    "verifiers", [{}, {"x": ("scripted_scores:has_x", float("nan"))}], ids=["none", "nan"]
)
def test_no_verifiers_or_a_weight_that_is_no_number_are_refused(verifiers):
    weights = {name: weight for name, (_, weight) in verifiers.items()}
    message = f"weights {weights}: expected at least one verifier"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        WeightedRewards(token_envs(1), verifiers)


def test_infos_keep_gymnasiums_layout_where_only_some_slots_end():
    envs = WeightedRewards(token_envs(2, tokens_per_step=BUDGET), TWO)
    envs.reset(seed=0)
    actions = np.full((2, BUDGET), -1)
    actions[1, :2] = [*ids("x"), EOS]
    _, rewards, _, _, info = envs.step(actions)
    assert rewards.tolist() == [0, 1]
    for key in ("score_x", "score_y", "status_x", "status_y", "verifier_status"):
        assert info[f"_{key}"].tolist() == [False, True]
