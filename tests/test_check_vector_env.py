from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorWrapper
from gymnasium.wrappers.vector import (
    ClipReward,
    DictInfoToList,
    NormalizeReward,
    RecordEpisodeStatistics,
    TransformReward,
)
from small_envs import BUDGET, prompt_table, token_envs

from lmrl_env.env import TokenVectorEnv
from lmrl_env.templates import get_template
from lmrl_env.testing import check_vector_env
from lmrl_env.tokenizer import load_tokenizer

IDS = ("MathR1-v0", "MathQwen-v0", "MathPlain-v0")
MODES = ("NextStep", "Disabled")
SLOTS, GROUP_SIZE = 4, 2


# --- environments that conform


@pytest.mark.parametrize("tokens_per_step", [1, BUDGET])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env_id", IDS)
def test_the_ids_conform_in_any_of_gymnasiums_wrappers(env_id, mode, tokens_per_step):
    envs = gym.make_vec(
        env_id,
        num_envs=SLOTS,
        group_size=GROUP_SIZE,
        questions="arithmetic:size=20",
        max_new_tokens=BUDGET,
        tokens_per_step=tokens_per_step,
        autoreset_mode=mode,
    )
    check_vector_env(envs)
    check_vector_env(NormalizeReward(ClipReward(RecordEpisodeStatistics(envs), -1, 1)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_envs", "tokens_per_step"), [(1, 1), (3, 5)])
def test_a_bare_token_mdp_conforms(num_envs, tokens_per_step, mode):
    check_vector_env(token_envs(num_envs, tokens_per_step=tokens_per_step, autoreset_mode=mode))


class Tool(VectorWrapper):
    """Writes three tokens behind every token below ``calls``, and drops what follows those."""

    def __init__(self, envs, calls=60):
        super().__init__(envs)
        self.calls = calls

    def step(self, actions):
        base = self.unwrapped
        tokens = np.array(actions).reshape(self.num_envs, -1)
        called = (tokens >= 0) & (tokens < self.calls)
        is_behind = np.cumsum(called, axis=1) - called > 0
        if tokens.shape[1] > 1:
            actions = np.where(is_behind, -1, tokens)
        before = base._done.copy()
        _, *rest = self.env.step(actions)
        for slot in np.flatnonzero(called.any(axis=1) & ~base._done & ~before):
            base.insert_tokens(slot, [7, 8, 9])
        return base._observe(), *rest


@pytest.mark.parametrize("tokens_per_step", [1, BUDGET])
@pytest.mark.parametrize("mode", MODES)
def test_a_wrapper_that_inserts_tokens_conforms(tokens_per_step, mode):
    check_vector_env(Tool(token_envs(SLOTS, tokens_per_step=tokens_per_step, autoreset_mode=mode)))


# --- wrappers with one mistake each


class Broken(VectorWrapper):
    """Lets three functions edit a reset's arguments, its results, and the results of a step.

    ``ended`` marks the slots that ended since their reset, the last step included.
    """

    def __init__(self, envs, *, arguments=None, reset=None, step=None):
        super().__init__(envs)
        self.edit_arguments, self.edit_reset, self.edit_step = arguments, reset, step
        self.ended = np.zeros(self.num_envs, dtype=bool)

    def reset(self, **kwargs):
        if self.edit_arguments:
            self.edit_arguments(kwargs)
        returned = dict(zip(("observation", "info"), self.env.reset(**kwargs), strict=True))
        self.ended[:] = False
        if self.edit_reset:
            self.edit_reset(self, returned)
        return tuple(returned.values())

    def step(self, actions):
        names = ("observation", "rewards", "terminations", "truncations", "info")
        returned = dict(zip(names, self.env.step(actions), strict=True))
        self.ended |= returned["terminations"] | returned["truncations"]
        if self.edit_step:
            self.edit_step(self, returned)
        return tuple(returned.values())


def change(name, function):
    """Return an edit of one of the values that are returned."""

    def edit(envs, returned):
        returned[name] = function(returned[name])

    return edit


def change_seen(key, function):
    return change("observation", lambda seen: {**seen, key: function(seen[key])})


def change_info(key, function):
    """Return an edit of what ``info`` holds of a key, where it holds it."""

    def edit(envs, returned):
        if key in returned["info"]:
            returned["info"][key] = function(returned["info"][key])

    return edit


def each(function):
    """Return a function of an object array that changes those entries that are there."""
    return lambda values: np.array(
        [value if value is None else function(value) for value in values], dtype=object
    )


def pop_questions(kwargs):
    options = kwargs.get("options") or {}
    kwargs["options"] = dict(options)
    options.pop("question_ids", None)


def ignore(option):
    def edit(kwargs):
        options = kwargs.get("options") or {}
        kwargs["options"] = {key: value for key, value in options.items() if key != option}

    return edit


def put(values, index, value):
    values = values.copy()
    values[index] = value
    return values


def keep_the_flags(envs, returned):
    returned["terminations"] = envs.ended & ~returned["truncations"]


def pay_finished_slots(envs, returned):
    returned["rewards"] = envs.ended.astype(np.float64)


def move_finished_slots(envs, returned):
    running = ~envs.ended | returned["terminations"] | returned["truncations"]
    returned["observation"]["input_ids"][~running, 0] += 1


def append_a_token(envs, returned):
    """Add one to what is seen that the environment inside knows nothing of."""
    seen = returned["observation"]
    for slot in np.flatnonzero(~envs.ended):
        seen["input_ids"][slot, seen["length"][slot]] = 3
        seen["length"][slot] += 1


def swap_the_flags(envs, returned):
    returned.update(terminations=returned["truncations"], truncations=returned["terminations"])


def tell_of_all_slots(envs, returned):
    if "_response" in returned["info"]:
        returned["info"]["_response"][:] = True


BROKEN = {
    "int64 token ids": (
        {"reset": change_seen("input_ids", lambda ids: ids.astype(np.int64))},
        "observation: .* is not in Dict",
    ),
    "int32 lengths": (
        {"reset": change_seen("length", lambda length: length.astype(np.int32))},
        "observation: 'length' has dtype int32, expected int64",
    ),
    "token ids of another width": (
        {"step": change_seen("input_ids", lambda ids: ids[:, 1:])},
        "observation: .* is not in Dict",
    ),
    "the seed dropped": (
        {"arguments": lambda kwargs: kwargs.update(seed=None)},
        r"seed: 0 steps after reset\(seed=7\)",
    ),
    "options popped": ({"arguments": pop_questions}, "options: the caller's dict was"),
    "question ids ignored": ({"arguments": ignore("question_ids")}, "question ids: given"),
    "the reset mask ignored": (
        {"arguments": ignore("reset_mask")},
        r"info: 'question_id' is there for slots \[0 1 2 3\], expected \[0 2\]",
    ),
    "another question told": (
        {"reset": change_info("question_id", lambda ids: ids[::-1])},
        "prompt: slot 0 has length",
    ),
    "an unknown question told": (
        {"reset": change_info("question_id", lambda ids: ids + 20)},
        "question ids: slot 0 is asked .*, expected 0 to 19",
    ),
    "right alignment": (
        {"reset": change_seen("input_ids", lambda ids: np.roll(ids, 1, axis=1))},
        "prompt: slot 0 has length",
    ),
    "padding of fives": (
        {"reset": change_seen("input_ids", lambda ids: put(ids, (0, -1), 5))},
        "alignment: slot 0 has tokens .* behind",
    ),
    "the length of the step before": (
        {"step": change_seen("length", lambda length: length - 1)},
        "alignment: slot 0",
    ),
    "the first token rewritten": (
        {"step": change_seen("input_ids", lambda ids: put(ids, (2, 0), ids[2, 0] + 1))},
        "append: slot 2 has length",
    ),
    "a token in the observation alone": ({"step": append_a_token}, "append: slot 0"),
    "float32 rewards": (
        {"step": change("rewards", lambda rewards: rewards.astype(np.float32))},
        "rewards: array.*expected an array of float64",
    ),
    "infinite rewards": (
        {"step": change("rewards", lambda rewards: rewards + np.inf)},
        "rewards: .*expected finite numbers",
    ),
    "integers for flags": (
        {"step": change("terminations", lambda flags: flags.astype(int))},
        "terminations: array.*expected an array of bool",
    ),
    "a column of flags": (
        {"step": change("truncations", lambda flags: flags[:, None])},
        r"truncations: array.*expected an array of bool and shape \(4,\)",
    ),
    "both flags at once": (
        {"step": lambda envs, r: r.update(truncations=r["terminations"] | r["truncations"])},
        "flags: slots .* are terminated and truncated at once",
    ),
    "flags that stay": ({"step": keep_the_flags}, "flags: slots .* expected one pulse"),
    "rewards that stay": ({"step": pay_finished_slots}, "rewards: slots .* expected one pulse"),
    "finished slots that move": ({"step": move_finished_slots}, "inert slots: slot .* went from"),
    "no end at the budget": (
        {"step": change("truncations", np.zeros_like)},
        "info: 'response' is there for slots",
    ),
    "flags swapped": ({"step": swap_the_flags}, "end: slot . is t.*ated with"),
    "a list of infos": ({"step": change("info", lambda info: [info])}, "info layout: .*a dict"),
    "no mask in info": (
        {"step": change("info", lambda info: {k: v for k, v in info.items() if k != "_answer"})},
        "info layout: info\\['_answer'\\] is None",
    ),
    "a number in info": (
        {"step": change("info", lambda info: {**info, "n": 1, "_n": np.ones(SLOTS, bool)})},
        r"info layout: info\['n'\] is 1",
    ),
    "no response at the end": (
        {"step": change("info", lambda i: {k: i[k] for k in i if k.lstrip("_") != "response"})},
        r"info: 'response' is there for slots \[\], expected",
    ),
    "responses of running slots": ({"step": tell_of_all_slots}, "info: 'response' is there for"),
    "a response stripped": (
        {"step": change_info("response", each(lambda text: text[1:]))},
        "outcome: 'response' of slot",
    ),
    "a length without the last token": (
        {"step": change_info("response_length", lambda lengths: lengths - 1)},
        "outcome: 'response_length' of slot",
    ),
    "a mask of one action more": (
        {"step": change_info("response_mask", lambda mask: put(mask, (..., -1), True))},
        "outcome: 'response_mask' of slot",
    ),
    "one finish reason": (
        {"step": change_info("finish_reason", each(lambda reason: "length"))},
        "outcome: 'finish_reason' of slot .* is 'length', expected 'stop'",
    ),
    "the answer to another question": (
        {"step": change_info("answer", each(lambda answer: f"{answer}0"))},
        "outcome: 'answer' of slot",
    ),
    "another question at the end": (
        {"step": change_info("question_id", lambda ids: (ids + 1) % 20)},
        "outcome: 'question_id' of slot",
    ),
}


@pytest.mark.parametrize(("edits", "message"), BROKEN.values(), ids=BROKEN)
def test_a_wrapper_with_one_mistake_is_caught(edits, message):
    envs = Broken(token_envs(SLOTS, group_size=GROUP_SIZE), **edits)
    with pytest.raises(AssertionError, match=re.compile("^" + message, re.DOTALL)):
        check_vector_env(envs)


def test_the_wrapper_passes_without_a_mistake():
    check_vector_env(Broken(token_envs(SLOTS, group_size=GROUP_SIZE)))


# --- environments with one mistake each


class LiveObservation(TokenVectorEnv):
    def _observe(self):
        return {"input_ids": self._input_ids, "length": self._length}


class QuestionOfItsOwnForEachSlot(TokenVectorEnv):
    def reset(self, **kwargs):
        self._group_offset = np.arange(self.num_envs)
        return super().reset(**kwargs)


class NoEos(TokenVectorEnv):
    def step(self, actions):
        self._is_eos[:] = False
        return super().step(actions)


class NoStopString(TokenVectorEnv):
    def step(self, actions):
        self._stop = self.tokenizer.stop_strings(())
        return super().step(actions)


class NoBudget(TokenVectorEnv):
    def _append(self, tokens, active):
        terminated, truncated = super()._append(tokens, active)
        return terminated, np.zeros_like(truncated)


class EarlyBudget(TokenVectorEnv):
    def _append(self, tokens, active):
        terminated, truncated = super()._append(tokens, active)
        written = self._length - self._prompt_length
        return terminated, truncated | (active & (written > 3) & ~terminated)


class NoLastToken(TokenVectorEnv):
    def _append(self, tokens, active):
        tokens[:, -1] = -1
        return super()._append(tokens, active)


class EditedActions(TokenVectorEnv):
    def step(self, actions):
        result = super().step(actions)
        actions[...] = 0
        return result


class ActsInTheStepOfTheReset(TokenVectorEnv):
    def step(self, actions):
        resetting = np.flatnonzero(self._done)
        _, *rest = super().step(actions)
        for slot in resetting:
            self._input_ids[slot, self._length[slot]] = actions[slot]
            self._length[slot] += 1
        return self._observe(), *rest


class ForgetfulState(TokenVectorEnv):
    def set_state(self, state):
        super().set_state({**state, "length": self._length.copy()})


class InsertedTokensAsActions(TokenVectorEnv):
    def insert_tokens(self, slot, token_ids):
        start = self._length[slot] - self._prompt_length[slot]
        super().insert_tokens(slot, token_ids)
        self._is_action[slot, start : self._length[slot] - self._prompt_length[slot]] = True


class ResetsTheOthers(VectorWrapper):
    def reset(self, *, seed=None, options=None):
        if "reset_mask" not in (options or {}):
            return self.env.reset(seed=seed, options=options)
        observation, info = self.env.reset(seed=seed)
        return observation, {**info, "_question_id": options["reset_mask"].copy()}


class FinishesTheOthers(VectorWrapper):
    def reset(self, *, seed=None, options=None):
        result = self.env.reset(seed=seed, options=options)
        if "reset_mask" in (options or {}):
            self.unwrapped._done[1] = True
        return result


def declared(**attributes):
    """Return a wrapper that declares something else than what is inside."""

    def wrap(envs):
        wrapper = VectorWrapper(envs)
        for name, value in attributes.items():
            setattr(wrapper, name, value)
        return wrapper

    return wrap


def broken(cls, **kwargs):
    return lambda: cls(
        prompt_table("r1", BUDGET, 20),
        load_tokenizer("tiny"),
        get_template("r1"),
        SLOTS,
        group_size=GROUP_SIZE,
        max_new_tokens=BUDGET,
        **{"autoreset_mode": "Disabled", **kwargs},
    )


def wrapped(wrap, cls=TokenVectorEnv, **kwargs):
    return lambda: wrap(broken(cls, **kwargs)())


SPACE = gym.spaces.Box(0, 1, (SLOTS, 3), np.int32)
ENVIRONMENTS = {
    "another kind": (lambda: gym.make_vec("CartPole-v1", 2), "environment: .* is no token MDP"),
    "no autoreset mode": (wrapped(declared(metadata={})), "metadata: autoreset_mode is None"),
    "same-step autoreset": (
        wrapped(declared(metadata={"autoreset_mode": AutoresetMode.SAME_STEP})),
        "metadata: autoreset_mode is <AutoresetMode.SAME_STEP",
    ),
    "another autoreset mode": (
        wrapped(declared(metadata={"autoreset_mode": AutoresetMode.NEXT_STEP})),
        "metadata: .* and the token MDP inside has",
    ),
    "another observation space": (
        wrapped(declared(observation_space=SPACE)),
        "spaces: observation_space is Box",
    ),
    "another action space": (
        wrapped(declared(single_action_space=SPACE)),
        "spaces: single_action_space is Box.*expected Discrete",
    ),
    "infos as a list": (wrapped(DictInfoToList), "info layout: info is a"),
    "rewards for nothing": (
        wrapped(lambda envs: TransformReward(envs, lambda rewards: rewards + 1)),
        "rewards: slots",
    ),
    "live observation": (broken(LiveObservation), "observation: the one returned last"),
    "groups of unlike questions": (broken(QuestionOfItsOwnForEachSlot), "groups: slots are asked"),
    "no EOS": (broken(NoEos, tokens_per_step=BUDGET), "end: slot . goes on behind an EOS"),
    "no stop string": (broken(NoStopString), "end: slot . goes on behind the stop string"),
    "no budget": (broken(NoBudget), "budget: slot . has 12 of 12 tokens and is not truncated"),
    "an early budget": (broken(EarlyBudget), "end: slot . is truncated with 4 of 12 tokens"),
    "the last token lost": (broken(NoLastToken, tokens_per_step=5), "append: slot . appended"),
    "actions edited": (broken(EditedActions), "actions: the step turned"),
    "an action in the step of the reset": (
        broken(ActsInTheStepOfTheReset, autoreset_mode="NextStep"),
        "prompt: slot . has length",
    ),
    "state left out": (broken(ForgetfulState), "state: the next steps are"),
    "insertions as actions": (wrapped(Tool, InsertedTokensAsActions), "append: slot . appended"),
    "other slots reset": (wrapped(ResetsTheOthers), "reset mask: slot 1 was not to be reset"),
    "other slots finished": (
        wrapped(FinishesTheOthers),
        r"reset mask: state\['done'\] of slots \[1 3\] went from",
    ),
    "no question told": (
        wrapped(
            lambda envs: Broken(
                envs, step=change("info", lambda i: {k: i[k] for k in i if "question" not in k})
            ),
            autoreset_mode="NextStep",
        ),
        r"info: 'question_id' is there for slots \[\], expected",
    ),
}


@pytest.mark.parametrize(("make", "message"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_an_environment_with_one_mistake_is_caught(make, message):
    with pytest.raises(AssertionError, match=re.compile("^" + message, re.DOTALL)):
        check_vector_env(make())
