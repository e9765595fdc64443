"""A reward for the form of a response: thinking, then an answer, each in its tags."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from lmrl_env.env import unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.wrappers.outcome_reward import OutcomeReward, add_info

_INNER = r"(?:(?!</?(?:think|answer)>).)*"
_FORM = re.compile(rf"\s*<think>{_INNER}</think>\s*<answer>{_INNER}</answer>\s*", re.DOTALL)


class FormatReward(OutcomeReward):
    """Pays for a response of the form ``<think> ... </think> <answer> ... </answer>``.

    Each tag stands once and in this order, with nothing but white space around and between the
    two parts. Where the template's prompt ends in ``<think>``, the response goes on from there.
    The rule-based format reward of Guo et al. 2025, "DeepSeek-R1", arXiv:2501.12948, section
    2.2.2. ``info`` gains ``has_format`` for the slots that end.

    >>> import gymnasium as gym
    >>> envs = FormatReward(gym.make_vec("MathR1-v0", num_envs=4), reward=0.1)

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers.
        reward: what such a response earns beside its other rewards; not 0.

    Raises:
        ConfigurationError: for a ``reward`` of 0, or one that is not finite.
    """

    def __init__(self, envs: VectorEnv, reward: float = 1.0):
        super().__init__(envs)
        if not np.isfinite(reward) or reward == 0:
            raise ConfigurationError(
                f"reward={reward}: expected a finite number that is not 0, as 0.1; leave "
                "FormatReward away to pay nothing"
            )
        self.reward = reward
        prompt = unwrap(envs).template.text
        self._opening = "<think>" if prompt.rstrip().endswith("<think>") else ""

    def outcome_rewards(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """Return the reward of the slots that end in that form."""
        has_format = np.zeros(self.num_envs, dtype=np.bool_)
        for slot in np.flatnonzero(ended):
            text = self._opening + info["response"][slot]
            has_format[slot] = _FORM.fullmatch(text) is not None
        add_info(info, "has_format", has_format, ended)
        return np.where(has_format, self.reward, 0.0)
