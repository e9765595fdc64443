"""The default job under a verifier that takes its time: `slow_verifier:SlowMath-v0`."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym

from lmrl_env import Verdict, make_token_vector_env
from lmrl_env.verifiers import answer_tag_math
from lmrl_env.wrappers import VerifierReward

SECONDS = 0.02


def slow(response: str, answer: str, *, question: Any = None) -> Verdict:
    """Judge as ``answer_tag_math`` does, after 20 ms of processor time."""
    end = time.process_time() + SECONDS
    while time.process_time() < end:
        pass
    return answer_tag_math(response, answer, question=question)


def make_envs(num_envs: int = 1, **kwargs: Any) -> VerifierReward:
    return VerifierReward(make_token_vector_env(num_envs, **kwargs), slow)


gym.register("SlowMath-v0", vector_entry_point=make_envs, kwargs={"template": "r1"})
