"""Where a K-token step pauses for a wrapper, and what inserted tokens do to what follows."""

from __future__ import annotations

import numpy as np
import pytest
from episodes import EOS, TOKENIZER, ids
from gymnasium.utils.env_checker import data_equivalence
from small_envs import BUDGET, token_envs

from lmrl_env.env import NO_TOKEN

X = ids("x")[0]
STOP = ids("</answer>")


def row(*tokens, k=BUDGET):
    return np.array([[*tokens, *[NO_TOKEN] * k][:k]])


def started(**kwargs):
    envs = token_envs(1, **({"tokens_per_step": BUDGET} | kwargs))
    envs.reset(seed=0)
    return envs


def written(envs):
    return envs.response(0)[0].tolist()


def test_a_step_ends_with_the_token_that_completes_a_pause_string_and_the_episode_goes_on():
    envs = started()
    envs.pause_at(["</t>"])
    tag = ids("</t>")
    _, _, terminated, truncated, info = envs.step(row(X, *tag, X, X, EOS))
    assert not terminated[0] and not truncated[0] and not info
    assert written(envs) == [X, *tag]
    assert envs.running.all() and envs.response_lengths.tolist() == [1 + len(tag)]
    assert envs.step(row(X, EOS))[2].all()
    assert written(envs) == [X, *tag, X, EOS]


def test_pausing_changes_nothing_for_steps_of_one_token():
    plain, pausing = started(tokens_per_step=1), started(tokens_per_step=1)
    pausing.pause_at(["</t>"])
    for token in (X, *ids("</t>"), X, EOS):
        results = [envs.step(np.array([token])) for envs in (plain, pausing)]
        assert data_equivalence(*results)


def test_of_a_stop_and_a_pause_string_the_first_counts_and_where_both_end_it_is_the_stop():
    envs = started(max_new_tokens=24, tokens_per_step=24)
    envs.pause_at(["</answer>", "x"])
    assert not envs.step(row(X, *STOP, k=24))[2].any() and written(envs) == [X]
    assert envs.step(row(*STOP, X, k=24))[2].all()
    assert written(envs) == [X, *STOP]


def test_a_pause_with_the_last_token_of_the_budget_is_truncation():
    envs = started()
    envs.pause_at(["x"])
    envs.step(row(*[ids("y")[0]] * (BUDGET - 1)))
    _, _, terminated, truncated, _ = envs.step(row(X))
    assert truncated.all() and not terminated.any() and not envs.running.any()


def test_a_stop_string_is_not_pieced_together_with_tokens_that_were_inserted():
    envs = started()
    envs.step(row(X))
    envs.insert_tokens(0, STOP[:-1])
    assert not envs.step(row(STOP[-1]))[2].any()
    assert TOKENIZER.decode(written(envs)) == "x</answer>"


def test_a_stop_string_in_an_insertion_ends_nothing_later_either():
    envs = started(max_new_tokens=24, tokens_per_step=24)
    envs.insert_tokens(0, STOP)
    assert not envs.step(row(*ids(">"), k=24))[2].any()
    assert envs.step(row(*STOP, k=24))[2].all()


def test_the_last_turn_begins_behind_what_was_inserted_last():
    envs = started()
    assert envs.last_turn(0).tolist() == []
    envs.step(row(X, X))
    assert envs.last_turn(0).tolist() == [X, X]
    envs.insert_tokens(0, [5])
    assert envs.last_turn(0).tolist() == []
    envs.step(row(X))
    envs.insert_tokens(0, [6, 7])
    envs.step(row(X, X, X))
    assert envs.last_turn(0).tolist() == [X, X, X]
    assert envs.response(0)[1].tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 1]


def test_inserting_returns_the_slots_new_observation():
    envs = started()
    envs.step(row(X))
    state = envs.insert_tokens(0, [5, 6])
    observations = envs.step(row())[0]
    assert data_equivalence(state, {key: value[0] for key, value in observations.items()})
    assert envs.single_observation_space.contains(state)


@pytest.mark.parametrize("k", [1, BUDGET])
def test_a_slot_that_an_insertion_filled_is_truncated_by_its_next_step(k):
    envs = started(tokens_per_step=k)
    first = row(X) if k > 1 else np.array([X])
    envs.step(first)
    envs.insert_tokens(0, [5] * BUDGET)
    assert envs.running.all() and envs.response_lengths.tolist() == [BUDGET]
    _, _, terminated, truncated, info = envs.step(first)
    assert truncated.all() and not terminated.any()
    assert info["response_mask"][0].tolist() == [True] + [False] * (BUDGET - 1)


def test_what_a_caller_does_with_a_response_leaves_the_episode_alone():
    envs = started()
    envs.step(row(X, X))
    tokens, is_action = envs.response(0)
    tokens[:] = is_action[:] = 0
    assert written(envs) == [X, X] and envs.response(0)[1].all()
    assert envs.question(0) is envs.prompts.questions[envs._question_id[0]]


def test_text_is_encoded_within_a_response_without_special_tokens():
    end = TOKENIZER.decode([EOS])
    assert TOKENIZER.encode(end) == [EOS]
    assert EOS not in TOKENIZER.encode_text(end)
    assert TOKENIZER.decode(TOKENIZER.encode_text(end)) == end
