"""The outcome reward: a verifier's score when a response ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from lmrl_env.grading import shared_grader
from lmrl_env.verifiers import Verifier
from lmrl_env.wrappers.graded import grade_slots
from lmrl_env.wrappers.outcome_reward import OutcomeReward, add_info


class VerifierReward(OutcomeReward):
    """Adds a verifier's score to the reward of every slot whose response ends.

    ``info`` gains, for the slots that end, ``verifier_status`` (the verdict's status, or
    ``"truncated"`` where the budget cut a response off and it was not graded) and
    ``verifier_extracted`` (the answer that was judged, or None).

    >>> from lmrl_env import make_token_vector_env
    >>> envs = VerifierReward(make_token_vector_env(4), "lmrl_env.verifiers:answer_tag_math")

    Args:
        envs: whose ``info`` has ``response`` and ``answer`` for the slots that end.
        verifier: a verifier, or where to import it from, such as ``"my_module:my_verifier"``.
        truncated_reward: what a truncated response earns instead of its score; it is then not
            graded. None grades it like any other. 0 is the paper's (Liu et al. 2025,
            arXiv:2503.20783).
        workers: processes that grade; see ``Grader``.
        timeout: seconds of processor time for one response; see ``Grader``.
    """

    def __init__(
        self,
        envs: VectorEnv,
        verifier: Verifier | str,
        *,
        truncated_reward: float | None = 0.0,
        workers: int = 2,
        timeout: float = 2.0,
    ):
        super().__init__(envs)
        self.grader = shared_grader(verifier, workers=workers, timeout=timeout)
        self.truncated_reward = truncated_reward

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment, while the grader's workers start in the background."""
        self.grader.start()
        return self.env.reset(seed=seed, options=options)

    def outcome_rewards(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """Return the score of each slot that ends, and say in ``info`` how it came about.

        Raises:
            ConfigurationError: if a slot ends without ``response`` and ``answer`` in ``info``.
        """
        scores = np.zeros(self.num_envs)
        statuses = np.full(self.num_envs, None, dtype=object)
        extracted = np.full(self.num_envs, None, dtype=object)
        graded = ended
        if self.truncated_reward is not None:
            graded = ended & ~truncated
            scores[ended & truncated] = self.truncated_reward
            statuses[ended & truncated] = "truncated"
        slots = np.flatnonzero(graded)
        for slot, verdict in zip(slots, grade_slots(self, self.grader, slots, info), strict=True):
            scores[slot], statuses[slot], extracted[slot] = verdict[:3]
        add_info(info, "verifier_status", statuses, ended)
        add_info(info, "verifier_extracted", extracted, ended)
        return scores
