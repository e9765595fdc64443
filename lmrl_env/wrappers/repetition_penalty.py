"""A penalty for responses that repeat themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from lmrl_env.env import unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.wrappers.outcome_reward import OutcomeReward, add_info


class RepetitionPenalty(OutcomeReward):
    """Takes from the reward by the share of a response's n-grams of tokens that are repeats.

    -c · (1 - different n-grams / n-grams),  0 for fewer than n tokens

    An n-gram penalty as in Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs",
    arXiv:2502.03373, here for the response as a whole. Only n-grams that are all actions count:
    what a tool inserted is not the policy's repetition. ``info`` gains ``repetition_penalty`` for
    the slots that end.

    >>> import gymnasium as gym
    >>> envs = RepetitionPenalty(gym.make_vec("MathR1-v0", num_envs=4), coef=0.5, ngram=8)

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers.
        coef: c, above 0: what a response loses, nearly, that says one thing all the time.
        ngram: n, tokens, at least 1; short ones recur in any text.

    Raises:
        ConfigurationError: for a ``coef`` or an ``ngram`` outside of its range.
    """

    def __init__(self, envs: VectorEnv, coef: float, ngram: int = 16):
        super().__init__(envs)
        if not 0 < coef < float("inf") or ngram < 1:
            raise ConfigurationError(
                f"coef={coef}, ngram={ngram}: expected a number above 0, which is taken from the "
                "reward of a response that only repeats, and n-grams of at least 1 token"
            )
        self.token_mdp = unwrap(envs)
        self.coef = coef
        self.ngram = ngram

    def outcome_rewards(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """Return the penalty of the slots that end."""
        penalty = np.zeros(self.num_envs)
        for slot in np.flatnonzero(ended):
            penalty[slot] = -self.coef * self._share_of_repeats(slot)
        add_info(info, "repetition_penalty", penalty, ended)
        return penalty

    def _share_of_repeats(self, slot: int) -> float:
        token_ids, is_action = self.token_mdp.response(slot)
        if len(token_ids) < self.ngram:
            return 0.0
        windows = np.lib.stride_tricks.sliding_window_view
        ngrams = windows(token_ids, self.ngram)[windows(is_action, self.ngram).all(axis=1)]
        return 1 - len(np.unique(ngrams, axis=0)) / len(ngrams) if len(ngrams) else 0.0
