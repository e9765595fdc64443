"""Grading the responses of a step that end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from lmrl_env.env import TokenVectorEnv
from lmrl_env.errors import ConfigurationError
from lmrl_env.grading import Grader
from lmrl_env.types import Question
from lmrl_env.verifiers import Verdict


def grade_slots(
    envs: VectorEnv[Any, Any, Any],
    grader: Grader,
    slots: Sequence[int] | npt.NDArray[np.int64],
    info: dict[str, Any],
) -> list[Verdict]:
    """Return the verdicts on the responses of some slots that ended.

    Args:
        envs: whose step it was.
        grader: of the verifier.
        slots: which ended.
        info: of the step, with ``response`` and ``answer`` for these slots.

    Raises:
        ConfigurationError: if ``info`` lacks a response or an answer.
    """
    for key in ("response", "answer"):
        there = info.get(f"_{key}", np.zeros(envs.num_envs, dtype=np.bool_))
        if not there[slots].all():
            raise ConfigurationError(
                f"slots {list(map(int, slots))} ended and info[{key!r}] does not hold "
                "all of them: expected a TokenVectorEnv beneath, or an environment that gives "
                f"{key!r} for every slot that ends, in the layout of VectorEnv._add_info"
            )
    return grader.grade(
        [info["response"][slot] for slot in slots],
        [info["answer"][slot] for slot in slots],
        _questions(envs, slots, info),
    )


def _questions(
    envs: VectorEnv[Any, Any, Any],
    slots: Sequence[int] | npt.NDArray[np.int64],
    info: dict[str, Any],
) -> list[Question | None] | None:
    """Return the rows that the slots were asked, where a token MDP is beneath."""
    env = envs.unwrapped
    if not isinstance(env, TokenVectorEnv):
        return None
    return [env.prompts.questions[info["question_id"][slot]] for slot in slots]
