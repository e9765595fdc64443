"""Wrappers around the token MDP, one thing each."""

from lmrl_env.wrappers.overlong_penalty import OverlongPenalty
from lmrl_env.wrappers.verifier_reward import VerifierReward

__all__ = ["OverlongPenalty", "VerifierReward"]
