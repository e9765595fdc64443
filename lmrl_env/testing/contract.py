"""What a token MDP declares and returns, checked one value at a time for ``check_vector_env``."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lmrl_env.env import NO_TOKEN, Info, Observation, TokenVectorEnv

OUTCOME = ("response", "response_length", "response_mask", "finish_reason", "answer")
"""What ``info`` holds of the slots that end, and of no others."""


def expect(condition: Any, check: str, message: str) -> None:
    """Raise AssertionError, with the name of the check, unless the condition holds."""
    if not condition:
        raise AssertionError(f"{check}: {message}")


def expect_declaration(envs: VectorEnv[Any, Any, Any], base: TokenVectorEnv) -> None:
    """Check metadata and spaces of an environment around a token MDP."""
    mode = envs.metadata.get("autoreset_mode")
    expect(
        isinstance(mode, AutoresetMode) and mode is not AutoresetMode.SAME_STEP,
        "metadata",
        f"autoreset_mode is {mode!r}, expected AutoresetMode.NEXT_STEP or DISABLED: SAME_STEP "
        "overwrites the final observation",
    )
    expect(
        mode is base.autoreset_mode,
        "metadata",
        f"autoreset_mode is {mode!r}, and the token MDP inside has {base.autoreset_mode!r}",
    )
    width, vocab_size = base.prompts.width + base.max_new_tokens, base.tokenizer.vocab_size
    k = base.tokens_per_step
    observation_space = gym.spaces.Dict(
        input_ids=gym.spaces.Box(0, vocab_size - 1, (width,), np.int32),
        length=gym.spaces.Discrete(width + 1),
    )
    action_space: gym.Space[Any] = gym.spaces.Discrete(vocab_size)
    if k > 1:
        action_space = gym.spaces.Box(NO_TOKEN, vocab_size - 1, (k,), np.int32)
    for name, space in (("observation_space", observation_space), ("action_space", action_space)):
        for declared, right in (
            (f"single_{name}", space),
            (name, batch_space(space, envs.num_envs)),
        ):
            got = getattr(envs, declared)
            expect(got == right, "spaces", f"{declared} is {got}, expected {right}")


def expect_observation(observation: Any, space: gym.Space[Any]) -> None:
    """Check that an observation is in its space, with its dtypes."""
    expect(observation in space, "observation", f"{observation} is not in {space}")
    for key, dtype in (("input_ids", np.int32), ("length", np.int64)):
        got = observation[key].dtype
        expect(got == dtype, "observation", f"{key!r} has dtype {got}, expected {np.dtype(dtype)}")


def expect_flags(size: int, rewards: Any, terminations: Any, truncations: Any) -> None:
    """Check rewards, terminations and truncations by themselves."""
    for name, array, dtype in (
        ("rewards", rewards, np.float64),
        ("terminations", terminations, np.bool_),
        ("truncations", truncations, np.bool_),
    ):
        expect(
            isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == (size,),
            name,
            f"{array!r}: expected an array of {np.dtype(dtype)} and shape ({size},)",
        )
    expect(np.isfinite(rewards).all(), "rewards", f"{rewards}: expected finite numbers")
    both = np.flatnonzero(terminations & truncations)
    expect(not len(both), "flags", f"slots {both} are terminated and truncated at once")


def expect_layout(size: int, info: Any) -> None:
    """Check that every value of ``info`` has a row for each slot, and a mask."""
    expect(isinstance(info, dict), "info layout", f"info is a {type(info)}, expected a dict")
    for key, values in info.items():
        if key.startswith("_"):
            continue
        mask = info.get(f"_{key}")
        expect(
            isinstance(mask, np.ndarray) and mask.dtype == np.bool_ and mask.shape == (size,),
            "info layout",
            f"info['_{key}'] is {mask!r}: expected a bool array of shape ({size},), as "
            "VectorEnv._add_info makes it",
        )
        for array in values.values() if isinstance(values, dict) else (values,):
            expect(
                isinstance(array, np.ndarray) and len(array) == size,
                "info layout",
                f"info[{key!r}] is {values!r}: expected an array with a row for each of the "
                f"{size} slots",
            )


def expect_slots(info: Info, key: str, slots: npt.NDArray[np.bool_]) -> None:
    """Check that ``info`` holds a key for these slots and for no others."""
    held = info.get(f"_{key}", np.zeros(len(slots), dtype=np.bool_))
    expect(
        np.array_equal(held, slots),
        "info",
        f"{key!r} is there for slots {np.flatnonzero(held)}, expected {np.flatnonzero(slots)}",
    )


def expect_same(
    slots: npt.NDArray[np.bool_], before: Observation, after: Observation, check: str, why: str
) -> None:
    """Check that the observation of some slots did not change."""
    for slot in np.flatnonzero(slots):
        for key in before:
            old, new = before[key][slot], after[key][slot]
            message = f"slot {slot} {why}, and its {key!r} went from {old} to {new}"
            expect(np.array_equal(old, new), check, message)


def expect_tokens(
    slot: int, observation: Observation, tokens: npt.NDArray[Any], check: str, what: str
) -> None:
    """Check that an observation is these tokens, left-aligned, with zeros behind."""
    length, ids = int(observation["length"][slot]), observation["input_ids"][slot]
    expect(
        length == len(tokens) and np.array_equal(ids[:length], tokens),
        check,
        f"slot {slot} has length {length} and tokens {ids[:length]}, expected the {len(tokens)} "
        f"tokens {what}: {tokens}",
    )
    expect(
        not ids[length:].any(),
        "alignment",
        f"slot {slot} has tokens {ids[length:]} behind its {length}: expected zeros",
    )


def expect_appended(
    base: TokenVectorEnv,
    slot: int,
    response: npt.NDArray[Any],
    is_action: npt.NDArray[np.bool_],
    start: int,
    action: npt.NDArray[Any],
    ended: bool,
) -> None:
    """Check that a running slot's response grew by the tokens of its action, until the end.

    Args:
        base: the token MDP.
        slot: in messages.
        response: shape (t,), after the step.
        is_action: shape (K,), of the response's tokens.
        start: tokens of the response before the step.
        action: of the slot, a scalar or shape (k,).
        ended: whether the step ended the episode.
    """
    acted = response[start:][is_action[start : len(response)]]
    given = action[action != NO_TOKEN]
    inserted, budget = len(response) - start - len(acted), base.max_new_tokens
    least = min(1, len(given), budget - start) if ended or inserted else len(given)
    expect(
        np.array_equal(acted, given[: len(acted)]) and len(acted) >= least,
        "append",
        f"slot {slot} appended {acted} ({inserted} more were inserted), given {given}",
    )
    expect(
        len(response) < budget or (len(response) == budget and (ended or inserted)),
        "budget",
        f"slot {slot} has {len(response)} of {budget} tokens and is not truncated",
    )
    eos = np.flatnonzero(np.isin(acted, base.tokenizer.eos_token_ids))
    expect(
        not len(eos) or (ended and eos[0] == len(acted) - 1),
        "end",
        f"slot {slot} goes on behind an EOS token: it appended {acted}",
    )
    reach = max(0, start - 4 * max(map(len, base.template.stop), default=0))  # a byte a token
    if is_action[reach : len(response)].all():
        text = base.tokenizer.decode(response[reach : len(response) - ended])
        stops = [stop for stop in base.template.stop if stop in text]
        expect(not stops, "end", f"slot {slot} goes on behind the stop string {stops}: {text!r}")


def expect_outcome(
    base: TokenVectorEnv,
    slot: int,
    response: npt.NDArray[Any],
    is_action: npt.NDArray[np.bool_],
    question: int,
    terminated: bool,
    info: Info,
) -> None:
    """Check that an episode ended for the reason given, and what ``info`` tells of it."""
    text = base.tokenizer.decode_response(response)
    by_eos = len(response) > 0 and response[-1] in base.tokenizer.eos_token_ids
    by_stop = any(stop in text for stop in base.template.stop)
    expect(
        (by_eos or by_stop) if terminated else len(response) == base.max_new_tokens,
        "end",
        f"slot {slot} is {'terminated' if terminated else 'truncated'} with {len(response)} of "
        f"{base.max_new_tokens} tokens, {text!r}: expected an EOS token or one of "
        f"{base.template.stop} to terminate, the budget to truncate",
    )
    outcome = {
        "question_id": question,
        "response": text,
        "response_length": len(response),
        "response_mask": is_action,
        "finish_reason": "stop" if terminated else "length",
        "answer": base.prompts.questions[question].answer,
    }
    for key, value in outcome.items():
        got = info[key][slot]
        same = np.array_equal(got, value) if isinstance(value, np.ndarray) else got == value
        expect(same, "outcome", f"{key!r} of slot {slot} is {got!r}, expected {value!r}")
