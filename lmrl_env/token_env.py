"""One slot of the token MDP as a plain Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from lmrl_env.env import Info, Observation, TokenVectorEnv
from lmrl_env.errors import ConfigurationError


class TokenEnv(gym.Env[Observation, Any]):
    """One episode of the token MDP at a time: a slot of a (wrapped) ``TokenVectorEnv``.

    Spaces, rewards, episode ends and info are those of the slot; see ``TokenVectorEnv``.

    Args:
        envs: the vector environment of one slot, autoreset disabled.

    Raises:
        ConfigurationError: if it has more slots or resets by itself.
    """

    metadata = TokenVectorEnv.metadata

    def __init__(self, envs: VectorEnv[Any, Any, Any]):
        if envs.num_envs != 1 or envs.metadata["autoreset_mode"] is not AutoresetMode.DISABLED:
            raise ConfigurationError(
                f"{envs} cannot back a single environment: expected one slot and autoreset_mode "
                "'Disabled'"
            )
        self.envs = envs
        self.observation_space = envs.single_observation_space
        self.action_space = envs.single_action_space
        self.render_mode = envs.render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start a new episode; see ``TokenVectorEnv.reset``."""
        super().reset(seed=seed)
        observations, infos = self.envs.reset(seed=seed, options=options)
        return _first(observations), _first_info(infos)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, Info]:
        """Append the token, or the k tokens; see ``TokenVectorEnv.step``."""
        observations, rewards, terminated, truncated, infos = self.envs.step(np.asarray([action]))
        return (
            _first(observations),
            float(rewards[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            _first_info(infos),
        )

    def render(self) -> str | None:
        """Return prompt and response so far in mode ``ansi``, else None."""
        frames = self.envs.render()
        return None if frames is None else str(frames[0])

    def close(self) -> None:
        """Close the vector environment behind it."""
        self.envs.close()


def _first(observations: Observation) -> Observation:
    return {key: array[0] for key, array in observations.items()}


def _first_info(infos: Info) -> Info:
    return {
        key: array[0]
        for key, array in infos.items()
        if not key.startswith("_") and infos[f"_{key}"][0]
    }
