"""Wrappers around the token MDP, one thing each."""

from lmrl_env.wrappers.verifier_reward import VerifierReward

__all__ = ["VerifierReward"]
