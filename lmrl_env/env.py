"""The token-level MDP of a language model, as a Gymnasium vector environment.

A state is a question and the tokens written so far, an action is the next token, the transition
appends it (Liu et al. 2025, arXiv:2503.20783, section 3). The environments here pay no reward:
that is a wrapper's work, since what a response is worth is a question of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lmrl_env.errors import (
    ConfigurationError,
    InvalidActionError,
    QuestionError,
    ResetNeededError,
)
from lmrl_env.prompts import PromptTable, QuestionStream
from lmrl_env.templates import Template
from lmrl_env.tokenizer import Tokenizer
from lmrl_env.types import Question

if TYPE_CHECKING:
    from lmrl_env.engines.engine import Engine

NO_TOKEN = -1
"""The action of a K-token step that appends nothing."""

EPISODE = ("input_ids", "is_action", "length", "prompt_length", "question_id", "done")
"""Arrays, one row a slot, that make up the state of the running episodes."""
STREAMS = ("stream_seed", "episode")
"""Arrays, one row a slot, that say which question comes next."""

Observation = dict[str, npt.NDArray[Any]]
Info = dict[str, Any]


class TokenVectorEnv(VectorEnv[Observation, npt.NDArray[Any], npt.NDArray[Any]]):
    """Many episodes of the token MDP side by side, without a Python loop over them in a step.

    ## Observation space
    ``Dict(input_ids=Box(0, V-1, (P+K,), int32), length=Discrete(P+K+1))``, batched: the prompt
    and the response so far stand left-aligned in ``input_ids``, ``length`` counts them, and zeros
    follow.

    ## Action space
    ``Discrete(V)`` for ``tokens_per_step=1``. For ``tokens_per_step=k > 1``
    ``Box(-1, V-1, (k,), int32)``, batched: the tokens are appended in order as by k single steps,
    -1 is no token, and tokens after the end are ignored. That is the same MDP under an option of
    k tokens (Sutton, Precup and Singh 1999).

    ## Rewards
    0. Wrappers such as ``VerifierReward`` pay.

    ## Starting state
    The prompt of a question. ``reset(options={"question_ids": ids})`` names the questions, one a
    group; otherwise each group walks through its own shuffle of the set, epoch after epoch,
    seeded by ``seed + group * group_size``: the j-th episode of a slot is the j-th question of
    its group's stream.

    ## Episode end
    ``terminated`` with an EOS token or with the token that completes a stop string of the
    template; ``truncated`` when K response tokens are written without that. Never both.

    ## Autoreset
    ``NEXT_STEP``, as Gymnasium's default: the step after the end ignores the slot's action and
    resets it. ``DISABLED``: a finished slot is inert, its flags are one-step pulses, and
    ``reset(options={"reset_mask": mask})`` resets some slots.

    ## Info
    In Gymnasium's layout (every ``key`` beside a mask ``_key``). After a reset: ``question_id``.
    At an episode's end also ``response`` (text, without EOS), ``response_length`` (tokens),
    ``response_mask`` (shape (K,), True where a token was an action), ``finish_reason`` ("stop" or
    "length") and ``answer``.

    Args:
        prompts: what to ask.
        tokenizer: of the model that will act.
        template: around the questions; its stop strings end a response.
        num_envs: N, number of slots, a multiple of ``group_size``.
        group_size: G, adjacent slots that get the same question.
        max_new_tokens: K, the budget and horizon of an episode, in tokens.
        tokens_per_step: k, tokens of one action, 1 to K.
        autoreset_mode: ``"NextStep"`` or ``"Disabled"``.
        copy: whether ``reset`` and ``step`` return copies of the observations. Without, they are
            read-only views of the environment's own arrays: they cost nothing, and hold until the
            next step or reset, which changes them.
        make_engine: builds ``engine`` when it is first asked for.
        render_mode: ``"ansi"`` or None.

    Raises:
        ConfigurationError: for values that do not fit together.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012  (Gymnasium's own form)

    def __init__(
        self,
        prompts: PromptTable,
        tokenizer: Tokenizer,
        template: Template,
        num_envs: int,
        *,
        group_size: int = 1,
        max_new_tokens: int,
        tokens_per_step: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        copy: bool = True,
        make_engine: Callable[[], Engine] | None = None,
        render_mode: str | None = None,
    ):
        autoreset_mode = _check_autoreset_mode(autoreset_mode)
        _check_positive(num_envs=num_envs, group_size=group_size, max_new_tokens=max_new_tokens)
        if num_envs % group_size:
            raise ConfigurationError(
                f"num_envs={num_envs} is not divisible by group_size={group_size}: each question "
                f"takes {group_size} slots; use {max(1, num_envs // group_size) * group_size} slots"
            )
        if not 1 <= tokens_per_step <= max_new_tokens:
            raise ConfigurationError(
                f"tokens_per_step={tokens_per_step}: expected 1 to max_new_tokens={max_new_tokens}"
            )
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigurationError(f"render_mode={render_mode!r}: expected None or 'ansi'")
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.template = template
        self.num_envs = num_envs
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.tokens_per_step = tokens_per_step
        self.autoreset_mode = autoreset_mode
        self.metadata = {**type(self).metadata, "autoreset_mode": autoreset_mode}
        self.render_mode = render_mode
        self._make_engine = make_engine
        self._engine: Engine | None = None

        width, vocab_size = prompts.width + max_new_tokens, tokenizer.vocab_size
        self.single_observation_space = gym.spaces.Dict(
            input_ids=gym.spaces.Box(0, vocab_size - 1, (width,), np.int32),
            length=gym.spaces.Discrete(width + 1),
        )
        self.single_action_space = (
            gym.spaces.Discrete(vocab_size)
            if tokens_per_step == 1
            else gym.spaces.Box(NO_TOKEN, vocab_size - 1, (tokens_per_step,), np.int32)
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._is_eos = np.zeros(vocab_size, dtype=np.bool_)
        self._is_eos[list(tokenizer.eos_token_ids)] = True
        self._stop = tokenizer.stop_strings(template.stop)
        self.pause_strings: tuple[str, ...] = ()
        self._pause = tokenizer.stop_strings(())
        self._group_offset = np.arange(num_envs) // group_size * group_size
        self._stream = QuestionStream(prompts.questions.parts)

        self._input_ids = np.zeros((num_envs, width), dtype=np.int32)
        self._is_action = np.zeros((num_envs, max_new_tokens), dtype=np.bool_)
        self._length = np.zeros(num_envs, dtype=np.int64)
        self._prompt_length = np.zeros(num_envs, dtype=np.int64)
        self._question_id = np.full(num_envs, -1, dtype=np.int64)
        self._done = np.zeros(num_envs, dtype=np.bool_)
        self._stream_seed = np.full(num_envs, -1, dtype=np.int64)
        self._episode = np.zeros(num_envs, dtype=np.int64)
        self._copy = copy
        self._views: Observation = {
            "input_ids": self._input_ids.view(),
            "length": self._length.view(),
        }
        for view in self._views.values():
            view.flags.writeable = False

    @property
    def engine(self) -> Engine:
        """The engine that the environment's keyword arguments name, built at first use."""
        if self._engine is None:
            if self._make_engine is None:
                raise ConfigurationError(
                    "this environment was made without an engine: pass make_engine=, or make it "
                    'by gym.make_vec("MathR1-v0", engine="local", ...)'
                )
            self._engine = self._make_engine()
        return self._engine

    # --- reset

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start new episodes.

        Args:
            seed: restarts the question streams of the slots that are reset; None goes on.
            options: ``reset_mask``, shape (N,), bool: the slots to reset, all by default;
                ``question_ids``, shape (N / G,), int: the question of each group, in place of the
                streams, which then stay where they are.

        Raises:
            ConfigurationError: for a malformed ``reset_mask`` or an unknown option.
            QuestionError: for an unknown question id.
        """
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"reset_mask", "question_ids"}:
            raise ConfigurationError(
                f"unknown reset options {sorted(unknown)}: expected 'reset_mask', 'question_ids'"
            )
        mask = self._check_reset_mask(options.get("reset_mask"))
        question_ids = self._check_question_ids(options.get("question_ids"))
        unseeded = mask & (self._stream_seed < 0)
        if seed is not None:
            self._stream_seed[mask] = seed + self._group_offset[mask]
            self._episode[mask] = 0
        elif unseeded.any():
            drawn = int(self.np_random.integers(2**31))
            self._stream_seed[unseeded] = drawn + self._group_offset[unseeded]
        slots = np.flatnonzero(mask)
        for slot in slots:
            self._start_episode(slot, None if question_ids is None else question_ids[slot])
        info: Info = {}
        self._add_infos(info, slots, question_id=self._question_id[slots])
        return self._observe(), info

    def _start_episode(self, slot: int, question_id: int | None = None) -> None:
        if question_id is None:
            question_id = self._stream.question_id(
                int(self._stream_seed[slot]), int(self._episode[slot])
            )
            self._episode[slot] += 1
        prompt = self.prompts[question_id]
        self._input_ids[slot] = 0
        self._input_ids[slot, : len(prompt)] = prompt
        self._is_action[slot] = False
        self._length[slot] = self._prompt_length[slot] = len(prompt)
        self._question_id[slot] = question_id
        self._done[slot] = False

    def _add_infos(
        self, info: Info, slots: npt.NDArray[np.int64], **values: npt.NDArray[Any]
    ) -> None:
        """Do what ``_add_info`` does, for many slots at once.

        Args:
            info: to add to.
            slots: which.
            **values: shape (slots, ...).
        """
        for key, rows in values.items():
            if key not in info:
                shape = self.num_envs, *rows.shape[1:]
                is_object = rows.dtype == np.object_
                info[key] = np.full(shape, None) if is_object else np.zeros(shape, rows.dtype)
                info[f"_{key}"] = np.zeros(self.num_envs, dtype=np.bool_)
            info[key][slots] = rows
            info[f"_{key}"][slots] = True

    # --- step

    def step(
        self, actions: npt.ArrayLike
    ) -> tuple[
        Observation,
        npt.NDArray[np.float64],
        npt.NDArray[np.bool_],
        npt.NDArray[np.bool_],
        Info,
    ]:
        """Append tokens to the slots that are not finished.

        Args:
            actions: shape (N,) or (N, k), any integer dtype, in the action space.

        Raises:
            InvalidActionError: for a wrong shape, dtype or range; nothing is changed then.
            ResetNeededError: before the first reset.
        """
        self._check_started()
        tokens = self._check_actions(actions)
        resetting = self._done.copy()
        terminated, truncated = self._append(tokens, active=~resetting)
        done = terminated | truncated
        self._done |= done
        info: Info = {}
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and resetting.any():
            slots = np.flatnonzero(resetting)
            for slot in slots:
                self._start_episode(slot)
            self._add_infos(info, slots, question_id=self._question_id[slots])
        if done.any():
            slots = np.flatnonzero(done)
            self._add_infos(info, slots, **self._outcomes(slots, terminated[slots]))
        return self._observe(), np.zeros(self.num_envs), terminated, truncated, info

    def _append_one(
        self, tokens: npt.NDArray[np.int64], active: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Do what ``_append`` does with one token a slot, shape (N,)."""
        slots = np.flatnonzero(active & (self._length - self._prompt_length < self.max_new_tokens))
        new, place = tokens[slots], self._length[slots]
        self._input_ids[slots, place] = new
        self._is_action[slots, place - self._prompt_length[slots]] = True
        self._length[slots] += 1
        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        terminated[slots] = is_eos = self._is_eos[new]
        for slot in slots[self._stop.may_complete[new] & ~is_eos]:
            terminated[slot] = self._stop.completed_by_last(self.last_turn(slot))
        full = self._length - self._prompt_length == self.max_new_tokens
        return terminated, active & full & ~terminated

    def _append(
        self, tokens: npt.NDArray[np.int64], active: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Append up to k tokens a slot, shape (N, k), and return (terminated, truncated)."""
        k = tokens.shape[1]
        if k == 1:
            return self._append_one(tokens[:, 0], active)
        written = self._length - self._prompt_length
        given = (tokens != NO_TOKEN) & active[:, None]  # (N, k)
        nth = np.cumsum(given, axis=1)
        given &= nth <= (self.max_new_tokens - written)[:, None]
        ends = given & self._is_eos[tokens]
        end = np.where(ends.any(axis=1), ends.argmax(axis=1), k)  # (N,) index of the last token
        paused = np.zeros(self.num_envs, dtype=np.bool_)
        may_complete = self._stop.may_complete | self._pause.may_complete
        for slot, i in np.argwhere(given & may_complete[tokens]):
            if i < end[slot]:
                turn = tokens[slot, : i + 1][given[slot, : i + 1]]
                if written[slot]:
                    turn = np.concatenate([self.last_turn(slot), turn])
                stops = self._stop.completed_by_last(turn)
                if stops or self._pause.completed_by_last(turn):
                    end[slot], paused[slot] = i, not stops
        given &= np.arange(k) <= end[:, None]
        slots, columns = np.nonzero(given)
        position = written[slots] + nth[slots, columns] - 1  # within the response
        self._input_ids[slots, self._prompt_length[slots] + position] = tokens[slots, columns]
        self._is_action[slots, position] = True
        self._length += given.sum(axis=1)
        terminated = (end < k) & ~paused
        full = self._length - self._prompt_length == self.max_new_tokens
        return terminated, active & full & ~terminated

    # --- for wrappers that write into a response

    @property
    def running(self) -> npt.NDArray[np.bool_]:
        """Shape (N,), bool: slots within an episode."""
        return ~self._done

    @property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """Shape (N,), int64: tokens of the responses so far, inserted ones included."""
        return self._length - self._prompt_length

    def question(self, slot: int) -> Question:
        """Return the row that a slot is asked."""
        return self.prompts.questions[self._question_id[slot]]

    def response(self, slot: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return the token ids of a response so far, and which of them were actions."""
        ids = self._input_ids[slot, self._prompt_length[slot] : self._length[slot]]
        return ids.copy(), self._is_action[slot, : len(ids)].copy()

    def last_turn(self, slot: int) -> npt.NDArray[np.int32]:
        """Return the token ids that were written since the last insertion, or since the prompt."""
        ids, is_action = self.response(slot)
        inserted = np.flatnonzero(~is_action)
        return ids[inserted[-1] + 1 :] if len(inserted) else ids

    def pause_at(self, strings: Sequence[str]) -> None:
        """Let a K-token step end, in its slot, also with the token that completes a string.

        The episode goes on; tokens after that one are ignored, as those after an end are. A
        wrapper that inserts tokens says so where it must be asked first, and ``rollout`` has the
        engine stop there.

        Args:
            strings: in addition to those of earlier calls.
        """
        self.pause_strings += tuple(strings)
        self._pause = self.tokenizer.stop_strings(self.pause_strings)

    def insert_tokens(self, slot: int, token_ids: Sequence[int]) -> Observation:
        """Append tokens to a running slot that are state but not action, as a tool's output is.

        They count towards the budget; what does not fit is cut. A slot that they fill is truncated
        by its next step, whatever the action. The policy takes no credit for them:
        ``response_mask`` is False there. Stop strings in them end nothing.

        Returns:
            The slot's new observation, of the single observation space.

        Raises:
            InvalidActionError: for a token that the tokenizer does not know.
            ResetNeededError: if the slot is finished or was never reset.
        """
        self._check_started()
        outside = [t for t in token_ids if not 0 <= t < self.tokenizer.vocab_size]
        if outside:
            raise InvalidActionError(
                f"token {outside[0]} is out of range: expected 0 to {self.tokenizer.vocab_size - 1}"
            )
        if self._done[slot]:
            raise ResetNeededError(
                f"slot {slot} is finished: insert tokens into running slots only"
            )
        start = int(self._length[slot])
        stop = min(start + len(token_ids), int(self._prompt_length[slot]) + self.max_new_tokens)
        self._input_ids[slot, start:stop] = np.asarray(token_ids, np.int32)[: stop - start]
        self._length[slot] = stop
        return {"input_ids": self._input_ids[slot].copy(), "length": self._length[slot]}

    def _outcomes(
        self, slots: npt.NDArray[np.int64], terminated: npt.NDArray[np.bool_]
    ) -> dict[str, npt.NDArray[Any]]:
        """Return what ``info`` says of slots that end, one row a slot."""
        texts = [self.tokenizer.decode_response(self.response(slot)[0]) for slot in slots]
        answers = np.empty(len(slots), dtype=object)
        answers[:] = [self.question(slot).answer for slot in slots]
        return {
            "question_id": self._question_id[slots],
            "response": np.array(texts, dtype=object),
            "response_length": self._length[slots] - self._prompt_length[slots],
            "response_mask": self._is_action[slots],
            "finish_reason": np.where(terminated, "stop", "length").astype(object),
            "answer": answers,
        }

    def _observe(self) -> Observation:
        views = self._views
        return {key: view.copy() for key, view in views.items()} if self._copy else dict(views)

    # --- state

    def get_state(self) -> dict[str, Any]:
        """Return all that the next steps depend on, as arrays and plain values."""
        arrays = {name: getattr(self, f"_{name}").copy() for name in (*EPISODE, *STREAMS)}
        return {**arrays, "np_random": deepcopy(self.np_random.bit_generator.state)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of ``get_state``, of an environment made by the same arguments.

        Raises:
            ConfigurationError: if the state is of an environment of another shape.
        """
        arrays = {name: getattr(self, f"_{name}") for name in (*EPISODE, *STREAMS)}
        for name, array in arrays.items():
            shape = np.shape(state[name]) if name in state else None
            if shape != array.shape:
                raise ConfigurationError(
                    f"state[{name!r}] has shape {shape}, expected {array.shape}: make "
                    "the environment with the arguments of the one that was saved"
                )
        for name, array in arrays.items():
            array[...] = state[name]
        self.np_random.bit_generator.state = deepcopy(state["np_random"])

    def fork(
        self, slots: Sequence[int], k: int, into: Sequence[int] | None = None
    ) -> npt.NDArray[np.int64]:
        """Copy the episodes of some slots into k other slots each, for Monte-Carlo values.

        Args:
            slots: the sources.
            k: copies of each.
            into: ``len(slots) * k`` slots to overwrite, those of one source adjacent; by default
                the first ones that are not sources.

        Returns:
            The overwritten slots, shape (len(slots), k).

        Raises:
            ConfigurationError: if there are too few slots, or a target is a source or named twice.
            ResetNeededError: before the first reset.
        """
        self._check_started()
        sources = np.asarray(slots, dtype=np.int64)
        others = np.setdiff1d(np.arange(self.num_envs), sources)
        targets = np.asarray(others[: len(sources) * k] if into is None else into, dtype=np.int64)
        wanted, known = len(sources) * k, set(range(self.num_envs))
        if (
            not known.issuperset(sources.tolist())
            or len(targets) != wanted
            or len(np.intersect1d(targets, others)) != wanted
        ):
            raise ConfigurationError(
                f"fork of the slots {sources.tolist()} into {k} others each needs {wanted} "
                f"different targets among the {len(others)} slots that are not sources, got "
                f"{targets.tolist()}; make the environment with more slots"
            )
        for name in EPISODE:
            array = getattr(self, f"_{name}")
            array[targets] = array[np.repeat(sources, k)]
        return targets.reshape(len(sources), k)

    def render(self) -> tuple[str, ...] | None:
        """Return prompt and response so far of every slot in mode ``ansi``, else None."""
        if self.render_mode is None:
            return None
        self._check_started()
        return tuple(
            self.tokenizer.decode(self._input_ids[slot, : self._length[slot]])
            for slot in range(self.num_envs)
        )

    def close_extras(self, **kwargs: Any) -> None:
        """Close the engine, if it was ever built."""
        if self._engine is not None:
            self._engine.close()

    # --- checks

    def _check_started(self) -> None:
        if (self._question_id < 0).any():
            slot = int(np.flatnonzero(self._question_id < 0)[0])
            raise ResetNeededError(f"slot {slot} has no episode: call reset() first")

    def _check_actions(self, actions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        k, vocab_size = self.tokens_per_step, self.tokenizer.vocab_size
        shape = (self.num_envs,) if k == 1 else (self.num_envs, k)
        array = np.asarray(actions)
        if array.shape != shape:
            raise InvalidActionError(
                f"actions have shape {array.shape}, expected {shape}: one row a slot"
                + ("" if k == 1 else f", {k} tokens each, padded with {NO_TOKEN}")
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise InvalidActionError(
                f"actions have dtype {array.dtype}, expected an integer dtype: they are token ids"
            )
        low = 0 if k == 1 else NO_TOKEN
        if array.min() < low or array.max() >= vocab_size:
            where = np.argwhere((array < low) | (array >= vocab_size))[0]
            raise InvalidActionError(
                f"token {array[tuple(where)]} of slot {where[0]} is out of range: expected "
                f"{low} to {vocab_size - 1}, the ids that the tokenizer can emit"
            )
        return array.astype(np.int64, copy=False).reshape(self.num_envs, k)

    def _check_reset_mask(self, mask: Any) -> npt.NDArray[np.bool_]:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        valid = isinstance(mask, np.ndarray) and mask.dtype == np.bool_
        if not valid or mask.shape != (self.num_envs,) or not mask.any():
            raise ConfigurationError(
                f"reset_mask={mask!r}: expected a numpy array of dtype bool and shape "
                f"({self.num_envs},) with at least one True"
            )
        return mask

    def _check_question_ids(self, question_ids: Any) -> npt.NDArray[np.int64] | None:
        """Return the question of every slot, shape (N,), or None."""
        if question_ids is None:
            return None
        ids, groups = np.asarray(question_ids), self.num_envs // self.group_size
        if ids.shape != (groups,) or not np.issubdtype(ids.dtype, np.integer):
            raise QuestionError(
                f"question_ids of shape {ids.shape} and dtype {ids.dtype}: expected one integer "
                f"for each of the {groups} groups"
            )
        unknown = ids[(ids < 0) | (ids >= len(self.prompts))]
        if len(unknown):
            raise QuestionError(
                f"unknown question id {unknown[0]}: {self.prompts.questions.name!r} has the ids "
                f"0 to {len(self.prompts) - 1}"
            )
        return np.repeat(ids, self.group_size).astype(np.int64)


def unwrap(envs: VectorEnv[Any, Any, Any]) -> TokenVectorEnv:
    """Return the token MDP inside any wrappers.

    Raises:
        ConfigurationError: if there is another environment inside.
    """
    env = envs.unwrapped
    if not isinstance(env, TokenVectorEnv):
        raise ConfigurationError(
            f"{env} is no token MDP: expected a TokenVectorEnv in any wrappers, as "
            "make_token_vector_env builds it"
        )
    return env


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigurationError(f"{name}={value}: expected at least 1")


def _check_autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    try:
        mode = AutoresetMode(mode)
    except ValueError as error:
        raise ConfigurationError(
            f"autoreset_mode={mode!r}: expected 'NextStep' or 'Disabled'"
        ) from error
    if mode is AutoresetMode.SAME_STEP:
        raise ConfigurationError(
            "autoreset_mode='SameStep' is not supported: it overwrites the final observation "
            "within the step, and responses of unequal length would bias a batch towards short "
            "ones; expected 'NextStep', or 'Disabled' for one episode a slot"
        )
    return mode
