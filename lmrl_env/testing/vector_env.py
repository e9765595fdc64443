"""Conformance of a vector environment with Gymnasium and with the token MDP."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from lmrl_env.env import EPISODE, NO_TOKEN, Info, Observation, unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.testing.contract import (
    OUTCOME,
    expect,
    expect_appended,
    expect_declaration,
    expect_flags,
    expect_layout,
    expect_observation,
    expect_outcome,
    expect_same,
    expect_slots,
    expect_tokens,
)


class _Checker:
    """Plays an environment with random actions, and checks every reset and step.

    Attributes:
        observation: of the last reset or step, a copy of what was returned.
        running: shape (N,), bool, slots within an episode.
        question_id: shape (N,), of the episodes.
        prompt_length: shape (N,), tokens of their prompts.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]):
        try:
            self.base = unwrap(envs)
        except ConfigurationError as error:
            raise AssertionError(f"environment: {error}") from error
        self.envs = envs
        self.size = envs.num_envs
        self.random = np.random.default_rng(0)
        tokenizer = self.base.tokenizer
        self._plain = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.eos_token_ids)
        self._next: list[list[int]] = [[] for _ in range(self.size)]  # what each slot will write
        self.observation: Observation = {}
        self._returned: Observation = {}
        self.running = np.zeros(self.size, dtype=np.bool_)
        self.question_id = np.full(self.size, -1)
        self.prompt_length = np.zeros(self.size, dtype=np.int64)

    # --- one reset or step

    def reset(self, mask: npt.NDArray[np.bool_] | None = None, **kwargs: Any) -> None:
        """Reset the slots of the mask, all by default, and check where they stand then."""
        before = self.observation
        observation, info = self.envs.reset(**kwargs)
        expect_observation(observation, self.envs.observation_space)
        expect_layout(self.size, info)
        mask = np.ones(self.size, dtype=np.bool_) if mask is None else mask
        expect_slots(info, "question_id", mask)
        expect_same(~mask, before, observation, "reset mask", "was not to be reset")
        self._start(mask, observation, info)

    def step(self) -> npt.NDArray[np.bool_]:
        """Step with random actions, check all that came of it, and return which slots ended."""
        actions, before, was_running = self._actions(), self.observation, self.running.copy()
        given = actions.copy()
        observation, rewards, terminations, truncations, info = self.envs.step(actions)
        expect(np.array_equal(actions, given), "actions", f"the step turned {given} to {actions}")
        expect(
            data_equivalence(self._returned, before),
            "observation",
            f"the one returned last was {before}, and the step turned it to {self._returned}: "
            "return copies",
        )
        expect_observation(observation, self.envs.observation_space)
        expect_flags(self.size, rewards, terminations, truncations)
        expect_layout(self.size, info)
        ended = terminations | truncations
        for name, values in (("flags", ended), ("rewards", rewards != 0)):
            slots = np.flatnonzero(values & ~was_running)
            expect(
                not len(slots),
                name,
                f"slots {slots} ended before this step and get terminations {terminations[slots]}, "
                f"truncations {truncations[slots]}, rewards {rewards[slots]}: expected one pulse",
            )
        is_next_step = self.base.autoreset_mode is AutoresetMode.NEXT_STEP
        resetting = ~was_running & is_next_step
        for key in OUTCOME:
            expect_slots(info, key, ended)
        expect_slots(info, "question_id", ended | resetting)
        inert = ~was_running & ~resetting
        expect_same(inert, before, observation, "inert slots", "ended before this step")
        for slot in np.flatnonzero(was_running):
            self._check_running(slot, observation, actions[slot], terminations, truncations, info)
        self.running &= ~ended
        self._start(resetting, observation, info)
        return ended

    def _plan_ends(self, turn: int) -> None:
        """Let a third of the slots write an EOS token, a third a stop string, and a third none."""
        tokenizer, stop = self.base.tokenizer, self.base.template.stop
        eos = [tokenizer.eos_token_ids[0]]
        ends = [eos, tokenizer.encode(stop[turn % len(stop)]) if stop else eos, list[int]()]
        for slot in range(self.size):
            before = self.random.choice(self._plain, self.random.integers(3))
            self._next[slot] = [*before, *ends[(slot + turn) % 3]]

    def _actions(self) -> npt.NDArray[Any]:
        """Return the tokens that each slot will write, random ones then, and holes in between."""
        space = self.envs.action_space
        actions = self.random.choice(self._plain, (self.size, self.base.tokens_per_step))
        for slot, column in np.ndindex(actions.shape):
            if column and self.random.random() < 1 / 4:
                actions[slot, column] = NO_TOKEN
            elif self._next[slot]:
                actions[slot, column] = self._next[slot].pop(0)
        return actions.reshape(space.shape).astype(space.dtype)

    def _start(self, slots: npt.NDArray[np.bool_], observation: Observation, info: Info) -> None:
        """Check that some slots stand at the prompts of their questions."""
        prompts = self.base.prompts
        for slot in np.flatnonzero(slots):
            question = int(info["question_id"][slot])
            expect(
                0 <= question < len(prompts),
                "question ids",
                f"slot {slot} is asked {question}, expected 0 to {len(prompts) - 1}",
            )
            prompt = prompts[question]
            expect_tokens(slot, observation, prompt, "prompt", f"of question {question}")
            self.question_id[slot], self.prompt_length[slot] = question, len(prompt)
        self.running |= slots
        self._returned, self.observation = observation, copy.deepcopy(observation)

    def _check_running(
        self,
        slot: int,
        observation: Observation,
        action: npt.NDArray[Any],
        terminations: npt.NDArray[np.bool_],
        truncations: npt.NDArray[np.bool_],
        info: Info,
    ) -> None:
        """Check that a running slot's tokens were appended, and how it ended if it did."""
        old, new = (int(seen["length"][slot]) for seen in (self.observation, observation))
        kept = self.observation["input_ids"][slot, :old]
        appended = observation["input_ids"][slot, old:new]
        grown = np.concatenate([kept, appended])
        expect_tokens(slot, observation, grown, "append", "of the last step and those appended")
        prompt = self.prompt_length[slot]
        response, is_action = grown[prompt:], self.base.get_state()["is_action"][slot]
        ended = bool(terminations[slot] | truncations[slot])
        start = old - prompt
        expect_appended(self.base, slot, response, is_action, start, np.atleast_1d(action), ended)
        if ended:
            question, terminated = int(self.question_id[slot]), bool(terminations[slot])
            expect_outcome(self.base, slot, response, is_action, question, terminated, info)

    # --- the checks

    def check_seed(self) -> None:
        """Check that a seed decides which questions are asked, and actions all that follows."""

        def play() -> list[Any]:
            self.random = np.random.default_rng(1)
            self._plan_ends(0)
            observation, info = self.envs.reset(seed=7)
            seen = [copy.deepcopy((observation, _contract(info)))]
            for _ in range(8):
                observation, _, *flags, info = self.envs.step(self._actions())
                seen.append(copy.deepcopy((observation, *flags, _contract(info))))
            return seen

        for step, (first, second) in enumerate(zip(play(), play(), strict=True)):
            expect(
                data_equivalence(first, second),
                "seed",
                f"{step} steps after reset(seed=7) there is {first} and, with the same actions a "
                f"second time, {second}",
            )

    def check_question_ids(self) -> None:
        """Check that a reset asks the questions that it is given."""
        group_size, count = self.base.group_size, len(self.base.prompts)
        ids = np.arange(self.size // group_size)[::-1] % count
        options = {"question_ids": ids.copy()}
        self.reset(options=options)
        asked = self.question_id[::group_size]
        expect(np.array_equal(asked, ids), "question ids", f"given {ids}, {asked} are asked")
        self._check_options(options, {"question_ids": ids})

    def check_episodes(self) -> None:
        """Play three times until every slot has ended, in one way after another, and beyond."""
        first = np.arange(self.size) // self.base.group_size * self.base.group_size
        for turn in range(3):
            self.reset(seed=turn)
            expect(
                np.array_equal(self.question_id, self.question_id[first]),
                "groups",
                f"slots are asked {self.question_id}: expected one question for each "
                f"{self.base.group_size} adjacent ones",
            )
            self._plan_ends(turn)
            ended = np.zeros(self.size, dtype=np.bool_)
            while not ended.all():
                ended |= self.step()
            for _ in range(3):
                self.step()

    def check_reset_mask(self) -> None:
        """Check that a reset of some slots leaves the others as they are."""
        self.reset(seed=0)
        self.step()
        mask = np.arange(self.size) % 2 == 0
        before, options = self.base.get_state(), {"reset_mask": mask.copy()}
        self.reset(mask, options=options)
        self._check_options(options, {"reset_mask": mask})
        after = self.base.get_state()
        for name in EPISODE:
            old, new = before[name][~mask], after[name][~mask]
            expect(
                np.array_equal(old, new),
                "reset mask",
                f"state[{name!r}] of slots {np.flatnonzero(~mask)} went from {old} to {new}, and "
                "they were not to be reset",
            )

    def check_state(self) -> None:
        """Check that the token MDP goes on from a saved state as it did the first time."""
        base = self.base
        base.reset(seed=0)
        base.step(self._actions())
        state, actions = base.get_state(), [self._actions() for _ in range(3)]
        first = [base.step(action) for action in actions]
        base.set_state(state)
        second = [base.step(action) for action in actions]
        expect(
            data_equivalence(first, second),
            "state",
            f"the next steps are {first}, and {second} after set_state(get_state())",
        )

    def _check_options(self, options: Info, given: Info) -> None:
        wrapper = self.envs
        while isinstance(wrapper, VectorWrapper):
            if type(wrapper).__module__.startswith("gymnasium."):  # they take the mask out
                options = {**{k: v for k, v in given.items() if k == "reset_mask"}, **options}
            wrapper = wrapper.env
        message = f"the caller's dict was {given}, and the reset turned it to {options}"
        expect(data_equivalence(options, given), "options", message)


def _contract(info: Info) -> Info:
    """Return the part of ``info`` that a seed and actions decide: a wrapper may add times."""
    return {key: info[key] for key in info if key.lstrip("_") in ("question_id", *OUTCOME)}


def check_vector_env(envs: VectorEnv[Any, Any, Any]) -> None:
    """Check that a vector environment keeps to Gymnasium's interface and to the token MDP.

    It is played with random actions, three times until every slot has ended: by an EOS token, a
    stop string and the budget in turn. Every reset and step is checked: spaces and dtypes; a seed
    decides all; options are obeyed and the caller's dict stays; ``reset_mask`` touches its slots
    only; tokens are appended in order, left-aligned, within the budget; flags are bool, one-step
    pulses, never both; a finished slot is inert, or resets in the next step; rewards are finite
    float64; ``info`` has Gymnasium's layout and tells the outcome of the slots that end, and of no
    others; a saved state goes on as the first time.

    Args:
        envs: a ``TokenVectorEnv``, or one of your own built on it, in any wrappers that leave
            observations and actions as they are; a small ``max_new_tokens`` makes it quick. It is
            reset several times and not closed, and wrappers that keep statistics count all this.

    Raises:
        AssertionError: at the first violation, with the check and the values.

    >>> import gymnasium as gym
    >>> import lmrl_env
    >>> check_vector_env(gym.make_vec("MathR1-v0", num_envs=2, max_new_tokens=4))
    """
    checker = _Checker(envs)
    expect_declaration(envs, checker.base)
    checker.check_episodes()
    checker.check_question_ids()
    checker.check_reset_mask()
    checker.check_seed()
    checker.check_state()
    envs.reset(seed=0)
