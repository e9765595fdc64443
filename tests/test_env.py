from __future__ import annotations

import re

import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from small_envs import BUDGET, token_envs

from lmrl_env.env import NO_TOKEN
from lmrl_env.errors import (
    ConfigurationError,
    InvalidActionError,
    QuestionError,
    ResetNeededError,
)
from lmrl_env.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
EOS = TOKENIZER.eos_token_ids[0]
STOP = TOKENIZER.encode("</answer>")
V = TOKENIZER.vocab_size
SLOTS = 3

# Tokens that end an episode are drawn often enough for every kind of end to occur.
tokens = st.one_of(st.integers(0, V - 1), st.sampled_from([EOS, *STOP]))
scripts = st.lists(
    st.one_of(tokens.map(lambda t: [t]), st.just(STOP)), min_size=1, max_size=2 * BUDGET
).map(lambda pieces: [t for piece in pieces for t in piece])


def padded(rows: list[list[int]], width: int) -> np.ndarray:
    return np.array([(row + [NO_TOKEN] * width)[:width] for row in rows], dtype=np.int32)


# --- observations without copies


def test_views_show_what_copies_show_are_read_only_and_follow_the_environment():
    copying, viewing = (
        token_envs(SLOTS, copy=copy, autoreset_mode="NextStep") for copy in (True, False)
    )
    copying.reset(seed=1)
    first, _ = viewing.reset(seed=1)
    before = {key: array.copy() for key, array in first.items()}
    random = np.random.default_rng(0)
    for _ in range(2 * BUDGET):
        actions = random.choice([EOS, *STOP, 5, 6], SLOTS)
        ours, theirs = viewing.step(actions), copying.step(actions)
        assert data_equivalence(ours, theirs)
        assert all(np.shares_memory(ours[0][key], first[key]) for key in first)
        assert not any(np.shares_memory(theirs[0][key], copying._views[key]) for key in first)
    assert not (first["input_ids"] == before["input_ids"]).all()
    with pytest.raises(ValueError, match="read-only"):
        first["input_ids"][0, 0] = 1
    assert viewing.observation_space.contains(first)


# --- one step, two grains


@given(st.lists(scripts, min_size=SLOTS, max_size=SLOTS), st.integers(2, BUDGET))
def test_one_step_of_k_tokens_equals_k_steps_of_one(rows, k):
    wide, narrow = token_envs(SLOTS, tokens_per_step=k), token_envs(SLOTS)
    wide.reset(seed=1)
    narrow.reset(seed=1)
    actions = padded(rows, k)
    seen = wide.step(actions)
    terminated, truncated = np.zeros(SLOTS, bool), np.zeros(SLOTS, bool)
    infos: dict = {}
    for column in range(k):
        # A slot without a token at this column waits: its single step is simply not taken.
        present = actions[:, column] != NO_TOKEN
        before = narrow.get_state()
        observations, _, term, trunc, info = narrow.step(np.where(present, actions[:, column], 0))
        after = narrow.get_state()
        for name, array in after.items():
            if name not in ("np_random",):
                array[~present] = before[name][~present]
        narrow.set_state(after)
        terminated |= term & present
        truncated |= trunc & present
        for slot in np.flatnonzero((term | trunc) & present):
            single = {key: info[key][slot] for key in info if not key.startswith("_")}
            infos = narrow._add_info(infos, single, slot)
    observations = narrow._observe()
    assert data_equivalence(seen[0], observations)
    assert (seen[1] == 0).all()
    assert (seen[2] == terminated).all()
    assert (seen[3] == truncated).all()
    assert data_equivalence(seen[4], infos)


@given(scripts)
def test_tokens_after_the_end_and_holes_between_tokens_change_nothing(script):
    envs = token_envs(1, tokens_per_step=BUDGET)
    envs.reset(seed=0)
    plain = envs.step(padded([script], BUDGET))
    ended = bool(plain[2][0] or plain[3][0])
    length = int(plain[0]["length"][0] - envs._prompt_length[0])
    kept = script[:length]
    spread = [t for token in kept for t in (token, NO_TOKEN)][:BUDGET]
    envs.reset(seed=0)
    first = envs.step(padded([spread], BUDGET))
    rest = kept[sum(t != NO_TOKEN for t in spread) :]
    if rest:
        first = envs.step(padded([rest], BUDGET))
    assert data_equivalence(first[0], plain[0])
    assert bool(first[2][0] or first[3][0]) == ended


# --- the end of an episode


def play(envs, script):
    """Feed single tokens to a one-slot environment until its end, and return the last step."""
    envs.reset(seed=0)
    for count, token in enumerate(script, start=1):
        result = envs.step(np.array([token]))
        if result[2][0] or result[3][0]:
            return count, result
    return count, result


PLAIN = TOKENIZER.encode("x")[0]


def test_eos_terminates_and_is_an_action_but_not_text():
    _, (_, _, terminated, truncated, info) = play(token_envs(1), [PLAIN, EOS])
    assert terminated[0] and not truncated[0]
    assert info["response"][0] == "x"
    assert info["response_length"][0] == 2
    assert info["response_mask"][0].tolist() == [True] * 2 + [False] * (BUDGET - 2)
    assert info["finish_reason"][0] == "stop"


def test_a_stop_string_terminates_with_the_token_that_completes_it():
    text = TOKENIZER.encode("so </answer> and more")
    count, (_, _, terminated, _, info) = play(token_envs(1), text)
    assert terminated[0]
    assert count < len(text)
    assert "</answer>" in info["response"][0]
    assert "</answer>" not in TOKENIZER.decode(text[: count - 1])


def test_a_stop_string_is_found_when_bytes_spell_it_token_by_token():
    spelled = [t for character in "</answer>" for t in TOKENIZER.encode(character)]
    assert len(spelled) == len("</answer>")
    count, (_, _, terminated, _, info) = play(token_envs(1), spelled + [PLAIN])
    assert terminated[0] and count == len(spelled)
    assert info["response"][0] == "</answer>"


def test_a_stop_string_of_the_prompt_does_not_end_the_response():
    envs = token_envs(1)
    envs.reset(seed=0)
    assert "</answer>" in envs.tokenizer.decode(envs._input_ids[0, : envs._length[0]])
    assert not envs.step(np.array([PLAIN]))[2][0]


def test_the_none_template_has_no_stop_string():
    count, (_, _, terminated, truncated, _) = play(token_envs(1, template="none"), [*STOP] * BUDGET)
    assert count == BUDGET and truncated[0] and not terminated[0]


def test_the_budget_truncates():
    count, (_, rewards, terminated, truncated, info) = play(token_envs(1), [PLAIN] * 99)
    assert count == BUDGET
    assert truncated[0] and not terminated[0] and rewards[0] == 0
    assert info["finish_reason"][0] == "length"


def test_an_eos_on_the_last_token_of_the_budget_terminates_and_does_not_truncate():
    count, (_, _, terminated, truncated, _) = play(token_envs(1), [PLAIN] * (BUDGET - 1) + [EOS])
    assert count == BUDGET and terminated[0] and not truncated[0]


@given(st.lists(scripts, min_size=SLOTS, max_size=SLOTS))
def test_flags_lengths_masks_and_tokens_agree(rows):
    envs = token_envs(SLOTS, tokens_per_step=BUDGET)
    envs.reset(seed=3)
    observations, _, terminated, truncated, info = envs.step(padded(rows, BUDGET))
    assert not (terminated & truncated).any()
    for slot, row in enumerate(rows):
        prompt = int(envs._prompt_length[slot])
        length = int(observations["length"][slot]) - prompt
        written = observations["input_ids"][slot, prompt : prompt + length]
        assert written.tolist() == row[:length]
        assert not observations["input_ids"][slot, prompt + length :].any()
        assert terminated[slot] or truncated[slot] or length == min(len(row), BUDGET)
        if terminated[slot] or truncated[slot]:
            assert info["_response"][slot] and info["response_length"][slot] == length
            assert info["response_mask"][slot].sum() == length
            assert (EOS in row[:length]) <= (row[length - 1] == EOS)


# --- inert slots, autoreset


@given(st.lists(tokens, min_size=SLOTS, max_size=SLOTS))
def test_a_finished_slot_is_inert_when_autoreset_is_disabled(noise):
    envs = token_envs(SLOTS)
    envs.reset(seed=0)
    ended, *_ = envs.step(np.array([EOS, PLAIN, PLAIN]))
    observations, rewards, terminated, truncated, info = envs.step(np.array(noise))
    assert (observations["input_ids"][0] == ended["input_ids"][0]).all()
    assert observations["length"][0] == ended["length"][0]
    assert not terminated[0] and not truncated[0] and rewards[0] == 0
    assert not any(mask[0] for key, mask in info.items() if key.startswith("_"))


def test_next_step_ignores_the_action_and_resets_the_slot():
    envs = token_envs(2, autoreset_mode="NextStep")
    envs.reset(seed=0)
    envs.step(np.array([EOS, PLAIN]))
    observations, rewards, terminated, truncated, info = envs.step(np.array([EOS, PLAIN]))
    assert info["_question_id"].tolist() == [True, False]
    assert not terminated.any() and not truncated.any() and not rewards.any()
    question = envs.prompts.questions[info["question_id"][0]]
    shown = TOKENIZER.decode(observations["input_ids"][0, : observations["length"][0]])
    assert shown == envs.template.render(question.question)


def test_metadata_names_the_autoreset_mode():
    assert token_envs(1).metadata["autoreset_mode"] is AutoresetMode.DISABLED
    envs = token_envs(1, autoreset_mode="NextStep")
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP


# --- questions and seeds


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
@settings(max_examples=20)
def test_group_g_asks_the_stream_seeded_with_seed_plus_its_first_slot(seed, group_size):
    envs = token_envs(8, group_size=group_size)
    asked = [envs.reset(seed=seed)[1]["question_id"]]
    asked += [envs.reset()[1]["question_id"] for _ in range(3)]
    for slot in range(8):
        single = token_envs(1)
        first = slot // group_size * group_size
        expected = [single.reset(seed=seed + first)[1]["question_id"][0]]
        expected += [single.reset()[1]["question_id"][0] for _ in range(3)]
        assert [ids[slot] for ids in asked] == expected


def test_an_epoch_asks_every_question_once_and_the_next_in_another_order():
    envs = token_envs(1)
    size = len(envs.prompts)
    ids = [envs.reset(seed=0 if i == 0 else None)[1]["question_id"][0] for i in range(2 * size)]
    assert sorted(ids[:size]) == sorted(ids[size:]) == list(range(size))
    assert ids[:size] != ids[size:]


def test_slots_of_a_group_keep_their_own_place_in_the_stream_of_the_group():
    envs = token_envs(2, group_size=2, autoreset_mode="NextStep")
    first = envs.reset(seed=5)[1]["question_id"]
    assert first[0] == first[1]
    envs.step(np.array([EOS, PLAIN]))
    second = envs.step(np.array([PLAIN, EOS]))[4]["question_id"][0]
    assert envs.step(np.array([PLAIN, PLAIN]))[4]["question_id"][1] == second


def test_named_questions_are_asked_and_leave_the_streams_alone():
    envs, twin = token_envs(4, group_size=2), token_envs(4, group_size=2)
    envs.reset(seed=0)
    twin.reset(seed=0)
    info = envs.reset(options={"question_ids": [7, 3]})[1]
    assert info["question_id"].tolist() == [7, 7, 3, 3]
    assert (envs.reset()[1]["question_id"] == twin.reset()[1]["question_id"]).all()


def test_a_reset_mask_resets_some_slots_and_the_callers_dict_stays_whole():
    envs = token_envs(3)
    envs.reset(seed=0)
    before, *_ = envs.step(np.array([EOS, PLAIN, PLAIN]))
    options = {"reset_mask": np.array([True, False, False])}
    after, info = envs.reset(options=options)
    assert list(options) == ["reset_mask"]
    assert info["_question_id"].tolist() == [True, False, False]
    assert (after["input_ids"][1:] == before["input_ids"][1:]).all()
    assert after["length"][1] == before["length"][1]
    assert not envs._done[0]


def test_a_seeded_reset_of_one_slot_reseeds_that_slot_only():
    envs = token_envs(2)
    envs.reset(seed=0)
    twin = token_envs(2)
    twin.reset(seed=0)
    expected_other = twin.reset()[1]["question_id"][1]
    mask = np.array([True, False])
    fresh = envs.reset(seed=9, options={"reset_mask": mask})[1]["question_id"][0]
    assert fresh == token_envs(1).reset(seed=9)[1]["question_id"][0]
    assert envs.reset()[1]["question_id"][1] == expected_other


# --- state


@given(st.lists(st.lists(tokens, min_size=SLOTS, max_size=SLOTS), min_size=1, max_size=20))
@settings(max_examples=30)
def test_a_restored_state_goes_on_as_the_original_did(script):
    envs = token_envs(SLOTS, autoreset_mode="NextStep")
    envs.reset(seed=2)
    half = len(script) // 2
    for actions in script[:half]:
        envs.step(np.array(actions))
    state = envs.get_state()
    expected = [envs.step(np.array(actions)) for actions in script[half:]]
    other = token_envs(SLOTS, autoreset_mode="NextStep")
    other.set_state(state)
    for actions, result in zip(script[half:], expected, strict=True):
        assert data_equivalence(other.step(np.array(actions)), result)


@given(scripts, scripts)
@settings(max_examples=50)
def test_forked_slots_given_the_same_actions_have_the_same_outcome(prefix, suffix):
    envs = token_envs(4, tokens_per_step=BUDGET)
    envs.reset(seed=0)
    envs.step(padded([prefix, [PLAIN], [PLAIN], [PLAIN]], BUDGET))
    targets = envs.fork([0], k=2)
    assert targets.tolist() == [[1, 2]]
    bystander = envs._input_ids[3].copy()
    observations, _, terminated, truncated, info = envs.step(
        padded([suffix, suffix, suffix, []], BUDGET)
    )
    for array in (observations["input_ids"], observations["length"], terminated, truncated):
        assert (array[1] == array[0]).all() and (array[2] == array[0]).all()
    if "response" in info:
        assert info["response"][0] == info["response"][1] == info["response"][2]
    assert (observations["input_ids"][3] == bystander).all()


def test_a_fork_without_room_is_refused():
    envs = token_envs(3)
    envs.reset(seed=0)
    with pytest.raises(ConfigurationError, match="needs 4 different targets among the 2 slots"):
        envs.fork([0], k=4)
    for slots, k, into in ([0], 1, [0]), ([0], 2, [1, 1]), ([0], 2, [1, 2, 2]), ([9], 1, None):
        with pytest.raises(ConfigurationError, match="different targets"):
            envs.fork(slots, k=k, into=into)


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ConfigurationError, match=re.escape("expected (2, ")):
        envs = token_envs(3)
        envs.reset(seed=0)
        token_envs(2).set_state(envs.get_state())
    with pytest.raises(ConfigurationError, match="has shape None"):
        token_envs(2).set_state({})


# --- inserted tokens


def test_inserted_tokens_are_state_and_not_action():
    envs = token_envs(1)
    envs.reset(seed=0)
    envs.step(np.array([PLAIN]))
    envs.insert_tokens(0, [5, 6])
    observations, _, terminated, _, info = envs.step(np.array([EOS]))
    prompt = envs._prompt_length[0]
    assert observations["input_ids"][0, prompt : prompt + 4].tolist() == [PLAIN, 5, 6, EOS]
    assert terminated[0] and info["response_length"][0] == 4
    assert info["response_mask"][0, :5].tolist() == [True, False, False, True, False]


def test_an_inserted_token_that_does_not_exist_is_refused():
    envs = token_envs(1)
    envs.reset(seed=0)
    with pytest.raises(InvalidActionError, match=f"token {V} is out of range"):
        envs.insert_tokens(0, [V])


def test_inserted_tokens_fill_no_more_than_the_budget():
    envs = token_envs(1)
    envs.reset(seed=0)
    envs.insert_tokens(0, [PLAIN] * 99)
    observations, _, terminated, truncated, info = envs.step(np.array([PLAIN]))
    assert observations["length"][0] - envs._prompt_length[0] == BUDGET
    assert truncated[0] and not terminated[0] and not info["response_mask"].any()


# --- bad input: the value, what was expected, and nothing changed


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([[1], [1]], "actions have shape (2, 1), expected (2,)"),
        ([1, 1, 1], "actions have shape (3,), expected (2,)"),
        ([0.5, 1.0], "actions have dtype float64, expected an integer dtype"),
        ([True, False], "actions have dtype bool, expected an integer dtype"),
        ([0, V], f"token {V} of slot 1 is out of range: expected 0 to {V - 1}"),
        ([-1, 0], f"token -1 of slot 0 is out of range: expected 0 to {V - 1}"),
    ],
)
def test_bad_actions_are_refused_and_change_nothing(actions, message):
    envs = token_envs(2)
    envs.reset(seed=0)
    before = envs.get_state()
    with pytest.raises(InvalidActionError, match=re.escape(message)):
        envs.step(np.array(actions))
    assert data_equivalence(before, envs.get_state())


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int64, np.uint64])
def test_any_integer_dtype_is_accepted(dtype):
    envs = token_envs(2)
    envs.reset(seed=0)
    observations, *_ = envs.step(np.array([3, 4], dtype=dtype))
    assert observations["input_ids"][1, envs._prompt_length[1]] == 4


def test_a_step_before_the_reset_is_refused():
    with pytest.raises(ResetNeededError, match=re.escape("call reset() first")):
        token_envs(1).step(np.array([0]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"autoreset_mode": "SameStep"}, "autoreset_mode='SameStep' is not supported"),
        ({"autoreset_mode": "never"}, "autoreset_mode='never': expected 'NextStep' or 'Disabled'"),
        ({"group_size": 3}, "num_envs=4 is not divisible by group_size=3"),
        ({"group_size": 0}, "group_size=0: expected at least 1"),
        ({"tokens_per_step": BUDGET + 1}, f"expected 1 to max_new_tokens={BUDGET}"),
        ({"render_mode": "human"}, "render_mode='human': expected None or 'ansi'"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(kwargs, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        token_envs(4, **kwargs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"question_ids": [0, 99]}, QuestionError, "unknown question id 99"),
        ({"question_ids": [0]}, QuestionError, "one integer for each of the 2 groups"),
        ({"question_ids": [0.0, 1.0]}, QuestionError, "dtype float64"),
        ({"reset_mask": [True, False]}, ConfigurationError, "expected a numpy array"),
        ({"reset_mask": np.zeros(2, bool)}, ConfigurationError, "at least one True"),
        ({"seeds": 1}, ConfigurationError, "unknown reset options ['seeds']"),
    ],
)
def test_bad_reset_options_are_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        token_envs(2).reset(seed=0, options=options)


def test_rendering_shows_prompt_and_response_so_far():
    envs = token_envs(1, render_mode="ansi")
    envs.reset(seed=0)
    envs.step(np.array([PLAIN]))
    (frame,) = envs.render()
    assert frame.endswith("Assistant: <think>x")
    assert token_envs(1).render() is None
