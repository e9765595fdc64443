"""A penalty in proportion to a response's length."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from lmrl_env.env import unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.wrappers.outcome_reward import OutcomeReward, add_info


class LengthPenalty(OutcomeReward):
    """Takes from the reward in proportion to the tokens that the policy wrote.

    -c · |o| / K

    The simplest price of a token. It counts actions: what a tool inserted costs nothing. ``info``
    gains ``length_penalty`` for the slots that end.

    >>> import gymnasium as gym
    >>> envs = LengthPenalty(gym.make_vec("MathR1-v0", num_envs=4), coef=0.1)

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers; K is its ``max_new_tokens``.
        coef: c, above 0: the price of the whole budget, in units of reward.

    Raises:
        ConfigurationError: for a ``coef`` that is not above 0.
    """

    def __init__(self, envs: VectorEnv, coef: float):
        super().__init__(envs)
        self.budget = unwrap(envs).max_new_tokens
        if not 0 < coef < float("inf"):
            raise ConfigurationError(
                f"coef={coef}: expected a number above 0, which is taken from the reward of a "
                "response that fills the budget"
            )
        self.coef = coef

    def outcome_rewards(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """Return the penalty of the slots that end."""
        actions = np.where(ended[:, None], info["response_mask"], False).sum(axis=1)
        penalty = -self.coef * actions / self.budget
        add_info(info, "length_penalty", penalty, ended)
        return penalty
