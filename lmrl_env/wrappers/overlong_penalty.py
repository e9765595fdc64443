"""A penalty for responses that come near the token budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from lmrl_env.env import unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.wrappers.outcome_reward import OutcomeReward, add_info


class OverlongPenalty(OutcomeReward):
    """Soft overlong punishment: takes up to 1 from the reward over the last tokens of the budget.

    0 for |o| ≤ K - C,  (K - C - |o|) / C for K - C < |o| < K,  -1 for |o| = K

    Yu et al. 2025, "DAPO", arXiv:2503.14476, equation 13. ``info`` gains ``overlong_penalty`` for
    the slots that end.

    >>> import gymnasium as gym
    >>> envs = OverlongPenalty(gym.make_vec("MathR1-v0", num_envs=4, max_new_tokens=96), cache=16)

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers; K is its ``max_new_tokens``.
        cache: C, tokens over which the penalty grows; in [1, K]. The paper has 4,096 of 20,480.

    Raises:
        ConfigurationError: for a ``cache`` outside of that range.
    """

    def __init__(self, envs: VectorEnv, cache: int):
        super().__init__(envs)
        self.budget = unwrap(envs).max_new_tokens
        if not 1 <= cache <= self.budget:
            raise ConfigurationError(
                f"cache={cache}: expected from 1 to max_new_tokens={self.budget}, the last tokens "
                "of the budget, over which the penalty grows"
            )
        self.cache = cache

    def outcome_rewards(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """Return the penalty of the slots that end near the budget."""
        over = np.where(ended, info["response_length"] - (self.budget - self.cache), 0)
        penalty = -np.clip(over / self.cache, 0.0, 1.0)
        add_info(info, "overlong_penalty", penalty, ended)
        return penalty
