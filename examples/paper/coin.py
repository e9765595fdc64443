"""A reward that nothing in a response can foretell: the control of ``optimisation_bias.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from lmrl_env import Question, Verdict, make_token_vector_env
from lmrl_env.wrappers import VerifierReward


def coin(
    response: str, answer: str | Sequence[str], *, question: Question | None = None
) -> Verdict:
    """Pay 1 for about half of all texts, by a hash.

    >>> [coin(text, "7").score for text in ("It is 2.", "It is 3.", "It is 4.", "It is 5.")]
    [0.0, 1.0, 0.0, 1.0]
    """
    heads = hashlib.sha256(f"{answer} {response}".encode()).digest()[0] & 1
    return Verdict(float(heads), "correct" if heads else "wrong")


def make_envs(num_envs: int = 1, **kwargs: Any) -> VerifierReward:
    """Build the token MDP of any model and question set, with that reward."""
    return VerifierReward(make_token_vector_env(num_envs, **kwargs), coin)


gym.register(id="Coin-v0", vector_entry_point=make_envs, kwargs={"template": "r1"})
