"""Wrappers that pay or take for what a response looks like."""

from __future__ import annotations

import re

import numpy as np
import pytest
from episodes import EOS, ids, play
from small_envs import token_envs

from lmrl_env.errors import ConfigurationError
from lmrl_env.wrappers import FormatReward, LengthPenalty, OutcomeReward, RepetitionPenalty

A, B, C = ids("xyz")
K = 12


def envs_of(n=1, **kwargs):
    return token_envs(n, **({"tokens_per_step": K} | kwargs))


# --- what they have in common


class PaysEverySlot(OutcomeReward):
    def outcome_rewards(self, ended, truncated, info):
        self.seen = ended.copy(), truncated.copy()
        return [10, 20, 30]


def test_only_slots_that_end_are_paid_and_the_rewards_beneath_stay_as_they_were():
    class Paying(PaysEverySlot):
        def outcome_rewards(self, ended, truncated, info):
            self.paid = np.ones(self.num_envs)
            return self.paid

    beneath = Paying(envs_of(3))
    envs = PaysEverySlot(beneath)
    envs.reset(seed=0)
    actions = np.full((3, K), -1)
    actions[0, 0], actions[1, :] = EOS, A
    assert envs.step(actions)[1].tolist() == [11, 21, 0]
    assert [mask.tolist() for mask in envs.seen] == [[True, True, False], [False, True, False]]
    assert beneath.paid.tolist() == [1, 1, 1]


def test_a_step_in_which_nothing_ends_asks_no_wrapper():
    envs = PaysEverySlot(envs_of(3, tokens_per_step=1))
    envs.reset(seed=0)
    assert envs.step(np.array([A, A, A]))[1].tolist() == [0, 0, 0]
    assert not hasattr(envs, "seen")


# --- length


def test_length_costs_in_proportion_to_the_budget():
    # K = 12, c = 0.6: 0.05 a token, the EOS counts.
    returns, ends = play(LengthPenalty(envs_of(3), 0.6), [[EOS]], [[A, B, EOS]], [[A] * K])
    assert returns.tolist() == pytest.approx([-0.05, -0.15, -0.6])
    assert [end["length_penalty"] for end in ends] == returns.tolist()


def test_tokens_that_were_inserted_cost_nothing():
    envs = LengthPenalty(envs_of(1), 1.2)
    envs.reset(seed=0)
    envs.step(np.array([[A] + [-1] * (K - 1)]))
    envs.unwrapped.insert_tokens(0, [B] * 5)
    _, rewards, terminated, _, info = envs.step(np.array([[EOS] + [-1] * (K - 1)]))
    assert terminated.all() and info["response_length"][0] == 7
    assert rewards[0] == pytest.approx(-0.2)


@pytest.mark.parametrize("coef", [0, -0.1, float("inf"), float("nan")])
def test_a_price_that_is_none_is_refused(coef):
    with pytest.raises(ConfigurationError, match=re.escape(f"coef={coef}: expected a number")):
        LengthPenalty(envs_of(), coef)


# --- repetition


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([A, A, A, A, A, EOS], 3 / 5),  # AA AA AA AA A$: two different ones
        ([A, B, A, B, A, EOS], 2 / 5),  # AB BA AB BA A$
        ([A, A, B, A, A, EOS], 1 / 5),  # AA AB BA AA A$
        ([A, B, C, EOS], 0),
        ([A, EOS], 0),
        ([EOS], 0),  # no pair at all
    ],
)
def test_the_share_of_pairs_that_are_repeats_is_taken(tokens, share):
    returns, (end,) = play(RepetitionPenalty(envs_of(1), 0.5, ngram=2), [tokens])
    assert returns[0] == end["repetition_penalty"] == pytest.approx(-0.5 * share)


def test_an_ngram_with_a_token_that_was_inserted_does_not_count():
    envs = RepetitionPenalty(envs_of(1), 1.0, ngram=2)
    envs.reset(seed=0)
    envs.step(np.array([[A, A] + [-1] * (K - 2)]))
    envs.unwrapped.insert_tokens(0, [A, A, A, A])
    _, rewards, _, _, info = envs.step(np.array([[A, A, EOS] + [-1] * (K - 3)]))
    # AA | AA A$: three pairs of actions, of which one repeats
    assert rewards[0] == info["repetition_penalty"][0] == pytest.approx(-1 / 3)


@pytest.mark.parametrize(("coef", "ngram"), [(0, 2), (-1, 2), (1, 0), (float("nan"), 2)])
def test_repetition_in_no_unit_is_refused(coef, ngram):
    message = f"coef={coef}, ngram={ngram}: expected a number above 0"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        RepetitionPenalty(envs_of(), coef, ngram)


# --- format

GOOD = "so 2 </think> <answer>2</answer>"


@pytest.mark.parametrize(
    ("text", "paid"),
    [
        (GOOD, True),
        ("</think><answer></answer>", True),
        ("a\nb </think>\n\n<answer> 1\n2 </answer>", True),
        ("so 2 <answer>2</answer>", False),  # no end of the thinking
        ("so </think> 2 <answer>2</answer>", False),  # text between the parts
        ("</think> </think> <answer>2</answer>", False),
        ("<think> so </think> <answer>2</answer>", False),  # the prompt opened it already
        ("so <answer>1 </think> <answer>2</answer>", False),
        ("so </think> <answer>2", False),
        ("so </think> <answer><think></answer>", False),
        ("", False),
    ],
)
def test_a_response_to_the_r1_template_thinks_and_answers(text, paid):
    budget = 64
    envs = token_envs(1, max_new_tokens=budget, tokens_per_step=budget)
    returns, (end,) = play(FormatReward(envs, 0.25), [[*ids(text), EOS]])
    assert returns.tolist() == [0.25 * paid]
    assert end["has_format"] == paid


def test_a_response_to_a_bare_question_opens_its_thinking_itself():
    budget = 64
    envs = token_envs(2, max_new_tokens=budget, tokens_per_step=budget, template="none")
    returns, _ = play(FormatReward(envs), [[*ids("<think>" + GOOD), EOS]], [[*ids(GOOD), EOS]])
    assert returns.tolist() == [1, 0]


def test_text_after_the_answer_breaks_the_format():
    budget = 64
    envs = token_envs(2, max_new_tokens=budget, tokens_per_step=budget, template="none")
    text = "<think>" + GOOD
    rows = [[*ids(text + "\n"), EOS]], [[*ids(text + " so"), EOS]]
    assert play(FormatReward(envs), *rows)[0].tolist() == [1, 0]


@pytest.mark.parametrize("reward", [0, float("inf"), float("nan")])
def test_a_format_that_pays_nothing_is_refused(reward):
    with pytest.raises(ConfigurationError, match=re.escape(f"reward={reward}: expected a finite")):
        FormatReward(envs_of(), reward)
