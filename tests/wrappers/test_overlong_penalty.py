"""The wrapper that punishes responses near the token budget."""

from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import VectorWrapper
from small_envs import BUDGET, token_envs

from lmrl_env.env import NO_TOKEN
from lmrl_env.errors import ConfigurationError
from lmrl_env.tokenizer import load_tokenizer
from lmrl_env.wrappers import OverlongPenalty

TOKENIZER = load_tokenizer("tiny")
EOS = TOKENIZER.eos_token_ids[0]
PLAIN = TOKENIZER.encode("x")[0]


def write(*lengths, width=BUDGET):
    """Return actions that end each slot at a length; the whole budget is left without an end."""
    rows = [[PLAIN] * (n - 1) + [EOS] if n < BUDGET else [PLAIN] * BUDGET for n in lengths]
    return np.array([(row + [NO_TOKEN] * BUDGET)[:width] for row in rows], dtype=np.int32)


def penalties(cache, *lengths):
    envs = OverlongPenalty(token_envs(len(lengths), tokens_per_step=BUDGET), cache)
    envs.reset(seed=0)
    return envs.step(write(*lengths))


def test_the_penalty_grows_linearly_over_the_last_tokens_of_the_budget():
    # K = 12 and C = 4: free up to 8 tokens, then (8 - |o|) / 4.
    _, rewards, terminated, truncated, info = penalties(4, 1, 8, 9, 10, 11, 12)
    assert rewards.tolist() == [0, 0, -1 / 4, -1 / 2, -3 / 4, -1]
    assert rewards.dtype == np.float64
    assert info["overlong_penalty"].tolist() == rewards.tolist()
    assert info["_overlong_penalty"].all()
    assert terminated.tolist() == [True] * 5 + [False]
    assert truncated.tolist() == [False] * 5 + [True]


def test_a_cache_of_one_punishes_the_whole_budget_alone_and_a_cache_of_all_every_token():
    assert penalties(1, 1, 11, 12)[1].tolist() == [0, 0, -1]
    assert penalties(BUDGET, 1, 6, 12)[1].tolist() == pytest.approx([-1 / 12, -1 / 2, -1])


def test_an_end_at_the_last_token_of_the_budget_is_punished_as_truncation_is():
    envs = OverlongPenalty(token_envs(1, tokens_per_step=BUDGET), 4)
    envs.reset(seed=0)
    _, rewards, terminated, truncated, _ = envs.step(np.array([[PLAIN] * (BUDGET - 1) + [EOS]]))
    assert rewards.tolist() == [-1] and terminated.all() and not truncated.any()


@pytest.mark.parametrize("cache", [0, -1, BUDGET + 1])
def test_a_cache_outside_of_the_budget_is_refused(cache):
    message = f"cache={cache}: expected from 1 to max_new_tokens={BUDGET}"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        OverlongPenalty(token_envs(1), cache)


def test_slots_that_do_not_end_are_left_alone():
    envs = OverlongPenalty(token_envs(3), 4)  # one token a step
    envs.reset(seed=0)
    rows = write(10, 12, 11)
    for t in range(9):
        _, rewards, _, _, info = envs.step(rows[:, t])
        assert not rewards.any() and "overlong_penalty" not in info
    _, rewards, terminated, _, info = envs.step(rows[:, 9])
    assert terminated.tolist() == [True, False, False]
    assert rewards.tolist() == [-1 / 2, 0, 0]
    assert info["overlong_penalty"].tolist() == [-1 / 2, 0, 0]
    assert info["_overlong_penalty"].tolist() == [True, False, False]
    rows[0, 10:] = PLAIN  # a finished slot is inert: it is not punished again
    _, rewards, _, _, info = envs.step(rows[:, 10])
    assert rewards.tolist() == [0, 0, -3 / 4]
    assert info["_overlong_penalty"].tolist() == [False, False, True]
    _, rewards, _, truncated, _ = envs.step(np.where(np.arange(3) == 1, PLAIN, 0))
    assert rewards.tolist() == [0, -1, 0] and truncated.tolist() == [False, True, False]


class Paying(VectorWrapper):
    """Pays 1 for every step, out of an array that it keeps."""

    def step(self, actions):
        observations, rewards, *rest = self.env.step(actions)
        self.paid = np.ones(len(rewards), dtype=np.float32)
        return observations, self.paid, *rest


def test_the_penalty_is_added_to_the_reward_and_the_environment_keeps_its_own():
    inner = Paying(token_envs(2, tokens_per_step=BUDGET))
    envs = OverlongPenalty(inner, 4)
    envs.reset(seed=0)
    assert envs.step(write(3, 11))[1].tolist() == [1, 1 / 4]
    assert inner.paid.tolist() == [1, 1]


def test_gymnasiums_own_wrappers_work_below_and_above():
    below = gym.wrappers.vector.TransformReward(token_envs(2, tokens_per_step=BUDGET), lambda r: r)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(OverlongPenalty(below, 4))
    envs.reset(seed=0)
    _, rewards, _, _, info = envs.step(write(3, 10))
    assert rewards.tolist() == [0, -1 / 2]
    assert info["episode"]["r"].tolist() == [0, -1 / 2]


def test_it_stands_on_the_verifier_of_a_registered_environment():
    made = gym.make_vec(
        "MathR1-v0",
        num_envs=2,
        questions="arithmetic:size=20",
        max_new_tokens=16,
        tokens_per_step=16,
        autoreset_mode="Disabled",
    )
    envs = OverlongPenalty(made, 2)
    envs.reset(options={"question_ids": [0, 1]})
    answer = envs.unwrapped.prompts.questions[0].answer
    solution = TOKENIZER.encode(f"</think> <answer>{answer}</answer>")
    row = [*solution, *[NO_TOKEN] * 16][:16]
    _, rewards, _, _, info = envs.step(np.array([row, [PLAIN] * 16]))
    assert info["verifier_status"].tolist() == ["correct", "truncated"]
    assert rewards.tolist() == [1, -1]
    envs.close()
