"""What all wrappers have in common that pay when a response ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorWrapper


class OutcomeReward(VectorWrapper):
    """Base of the wrappers that add to the reward of every slot whose response ends.

    A subclass says in ``outcome_rewards`` how much. One of your own:

    >>> import gymnasium as gym
    >>> class PayForExclaiming(OutcomeReward):
    ...     def outcome_rewards(self, ended, truncated, info):
    ...         return ["!" in (response or "") for response in info["response"]]
    >>> envs = PayForExclaiming(gym.make_vec("MathR1-v0", num_envs=4))
    """

    def outcome_rewards(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.ArrayLike:
        """Return what each slot earns, shape (N,); what it says of slots that go on is ignored.

        Args:
            ended: shape (N,), bool, at least one True.
            truncated: shape (N,), bool: those of them that the budget ended.
            info: of the step, in Gymnasium's layout; ``add_info`` adds to it.
        """
        raise NotImplementedError

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[np.float64], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Step, and pay the slots that end."""
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        ended = np.logical_or(terminations, truncations)
        if ended.any():
            paid = np.asarray(self.outcome_rewards(ended, truncations, info), dtype=np.float64)
            rewards = np.asarray(rewards, dtype=np.float64) + np.where(ended, paid, 0.0)
        return observations, rewards, terminations, truncations, info


def add_info(
    info: dict[str, Any], key: str, values: npt.NDArray[Any], slots: npt.NDArray[np.bool_]
) -> None:
    """Put values into ``info`` for some slots, in Gymnasium's layout.

    Args:
        info: of a step.
        key: not yet in use.
        values: shape (N, ...).
        slots: shape (N,), bool: those that the values are of.
    """
    info[key], info[f"_{key}"] = values, slots.copy()
