"""Rewards at the tokens that complete a step."""

from __future__ import annotations

import numpy as np
import pytest
from episodes import EOS, ids, play
from hypothesis import given, settings
from hypothesis import strategies as st
from small_envs import BUDGET, token_envs

from lmrl_env.env import NO_TOKEN
from lmrl_env.errors import ConfigurationError
from lmrl_env.wrappers import ProcessReward, VerifierReward

X, Y, NEWLINE = ids("x") + ids("y") + ids("\n")


def by_lines(text, answer):
    """Pay the number of the line that ended."""
    assert text.endswith("\n")
    return text.count("\n")


def test_each_line_is_paid_at_the_token_that_ends_it():
    envs = ProcessReward(token_envs(2, tokens_per_step=BUDGET), by_lines)
    rows = [X, NEWLINE, X, Y, NEWLINE, NEWLINE, EOS], [X, EOS]
    returns, ends = play(envs, [rows[0]], [rows[1]])
    assert returns.tolist() == [1 + 2 + 3, 0]
    expected = [0, 1, 0, 0, 2, 3] + [0] * (BUDGET - 6)
    assert ends[0]["token_rewards"].tolist() == expected
    assert ends[1]["token_rewards"].tolist() == [0] * BUDGET


def test_a_step_of_the_environment_pays_for_what_was_written_in_it():
    envs = ProcessReward(token_envs(1, tokens_per_step=3), by_lines)
    envs.reset(seed=0)
    paid = []
    for tokens in ([X, NEWLINE, X], [X, X, X], [NEWLINE, NEWLINE, EOS]):
        _, rewards, terminated, _, info = envs.step(np.array([tokens]))
        paid.append(rewards[0])
        assert ("token_rewards" in info) == bool(terminated[0])
    assert paid == [1, 0, 2 + 3]
    assert info["token_rewards"][0].tolist() == [0, 1, 0, 0, 0, 0, 2, 3, 0, 0, 0, 0]


def test_a_marker_of_several_tokens_is_found_where_they_complete_it():
    envs = ProcessReward(
        token_envs(1, tokens_per_step=BUDGET), lambda text, answer: 1.0, marker="xyx"
    )
    # xyx|yx: the second x of the first marker begins no second one. Then xyx again, straddled.
    (end,) = play(envs, [[X, Y, X, Y, X, X, Y, X, EOS]])[1]
    assert end["token_rewards"].tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_the_gold_answer_comes_along():
    seen = []
    base = token_envs(1, tokens_per_step=BUDGET)
    envs = ProcessReward(base, lambda text, answer: seen.append((text, answer)) or 0.0)
    play(envs, [[X, NEWLINE, EOS]], question_ids=[3])
    assert set(seen) == {("x\n", base.prompts.questions[3].answer)}


def test_tokens_that_were_inserted_earn_nothing():
    envs = ProcessReward(token_envs(1, tokens_per_step=BUDGET), by_lines)
    envs.reset(seed=0)
    hold = [NO_TOKEN] * BUDGET
    first = envs.step(np.array([[X, NEWLINE, *hold][:BUDGET]]))[1][0]
    envs.unwrapped.insert_tokens(0, [NEWLINE, NEWLINE])
    _, rewards, _, _, info = envs.step(np.array([[X, NEWLINE, EOS, *hold][:BUDGET]]))
    assert (first, rewards[0]) == (1, 4)
    assert info["token_rewards"][0].tolist() == [0, 1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0]


def test_two_of_them_add_up_and_an_outcome_reward_stays_at_the_end():
    envs = ProcessReward(token_envs(1, tokens_per_step=BUDGET), by_lines)
    envs = VerifierReward(envs, "scripted_scores:has_x")
    envs = ProcessReward(envs, lambda text, answer: 10.0, marker="y")
    returns, (end,) = play(envs, [[X, NEWLINE, Y, EOS]])
    assert returns.tolist() == [1 + 1 + 10]
    assert end["token_rewards"].tolist() == [0, 1, 10, 0] + [0] * (BUDGET - 4)


def test_a_new_episode_begins_without_the_rewards_of_the_last():
    envs = ProcessReward(token_envs(1, tokens_per_step=BUDGET, autoreset_mode="NextStep"), by_lines)
    envs.reset(seed=0)
    row = [X, NEWLINE, EOS] + [NO_TOKEN] * (BUDGET - 3)
    paid = [envs.step(np.array([row]))[1][0] for _ in range(3)]  # the second one resets
    assert paid == [1, 0, 1]


def test_a_forked_episode_goes_on_from_what_was_paid():
    envs = ProcessReward(token_envs(2, tokens_per_step=2), by_lines)
    envs.reset(seed=0)
    envs.step(np.array([[X, NEWLINE], [X, X]]))
    envs.unwrapped.fork([0], 1)
    _, rewards, _, _, info = envs.step(np.array([[NEWLINE, EOS], [NEWLINE, EOS]]))
    assert rewards.tolist() == [2, 2]
    assert (info["token_rewards"][:, :3] == [0, 1, 2]).all()


lines = st.lists(st.sampled_from([X, Y, NEWLINE]), max_size=BUDGET)


@given(st.tuples(lines, lines), st.sampled_from(["\n", "xy", "\n\n"]))
@settings(max_examples=40)
def test_one_token_a_step_and_all_at_once_pay_the_same(rows, marker):
    turns = [[[*row, EOS]] for row in rows]

    def score(text, answer):
        return len(text) + 0.5

    whole, single = (
        play(ProcessReward(token_envs(2, tokens_per_step=k), score, marker=marker), *turns)
        for k in (BUDGET, 1)
    )
    assert whole[0].tolist() == single[0].tolist()
    for a, b in zip(whole[1], single[1], strict=True):
        assert a["token_rewards"].tolist() == b["token_rewards"].tolist()
        assert a["token_rewards"].sum() == whole[0][whole[1].index(a)]


def test_an_empty_marker_is_refused():
    with pytest.raises(ConfigurationError, match="marker='': expected the text"):
        ProcessReward(token_envs(1), by_lines, marker="")
