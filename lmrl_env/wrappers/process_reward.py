"""Rewards within a response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper

from lmrl_env.env import unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.wrappers.outcome_reward import add_info


class ProcessReward(VectorWrapper):
    r"""Pays for each step of a solution at the token that completes it.

    A step ends with the token that completes a marker, as a line with a newline. What it earns is
    what ``score`` says of the response up to there: process supervision, Lightman et al. 2023,
    "Let's Verify Step by Step", arXiv:2305.20050. The reward is paid in the step of the
    environment in which the token is written, whatever ``tokens_per_step`` is; tokens that a
    wrapper inserted earn nothing. ``info`` gains ``token_rewards`` for the slots that end, shape
    (K,), in addition to those of a ``ProcessReward`` beneath; ``Rollout.token_rewards`` holds
    them, and PPO and REINFORCE++ credit each token with what comes after it. The other algorithms
    see the return.

    >>> import gymnasium as gym
    >>> envs = ProcessReward(
    ...     gym.make_vec("MathR1-v0", num_envs=4),
    ...     lambda response, answer: 0.1 if response.endswith(f"= {answer}\n") else 0.0,
    ... )

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers.
        score: returns the reward of a step from the response up to and with its end, and the
            gold answer; a function of these alone. What it raises ends the run.
        marker: text that ends a step.

    Raises:
        ConfigurationError: for an empty marker.
    """

    def __init__(self, envs: VectorEnv, score: Callable[[str, Any], float], *, marker: str = "\n"):
        super().__init__(envs)
        if not marker:
            raise ConfigurationError("marker='': expected the text that ends a step, as '\\n'")
        self.score = score
        self.marker = marker
        self._token_mdp = unwrap(envs)
        self._may_complete = self._token_mdp.tokenizer.stop_strings((marker,)).may_complete

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[np.float64], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Step, and pay for the steps of the solution that it completed."""
        env = self._token_mdp
        before = env.response_lengths.copy()
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        ended = np.logical_or(terminations, truncations)
        rewards = np.array(rewards, dtype=np.float64)
        by_token = np.zeros((self.num_envs, env.max_new_tokens))
        for slot in np.flatnonzero((env.response_lengths > before) | ended):
            by_token[slot] = self._token_rewards(slot, 0 if ended[slot] else before[slot])
            rewards[slot] += by_token[slot, before[slot] :].sum()
        if ended.any():
            by_token += info.get("token_rewards", 0.0)
            add_info(info, "token_rewards", by_token * ended[:, None], ended)
        return observations, rewards, terminations, truncations, info

    def _token_rewards(self, slot: int, start: int) -> npt.NDArray[np.float64]:
        """Return what each token of a slot's response earns, shape (K,), 0 before ``start``."""
        env = self._token_mdp
        token_ids, is_action = env.response(slot)
        earned = np.zeros(env.max_new_tokens)
        answer = env.question(slot).answer
        for i in np.flatnonzero(is_action & self._may_complete[token_ids]):
            if i >= start:
                text = env.tokenizer.decode(token_ids[: i + 1])
                if text.count(self.marker) > env.tokenizer.decode(token_ids[:i]).count(self.marker):
                    earned[i] = self.score(text, answer)
        return earned
