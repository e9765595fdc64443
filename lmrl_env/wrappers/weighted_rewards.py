"""Several verifiers that pay together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

from lmrl_env.errors import ConfigurationError
from lmrl_env.grading import shared_grader
from lmrl_env.verifiers import Verifier
from lmrl_env.wrappers.graded import grade_slots
from lmrl_env.wrappers.outcome_reward import OutcomeReward, add_info


class WeightedRewards(OutcomeReward):
    """Adds the weighted sum of several verifiers' scores when a response ends.

    Σⱼ wⱼ · scoreⱼ

    ``info`` gains, for the slots whose response was graded, ``score_NAME`` and ``status_NAME`` of
    each verifier, and for all that end ``verifier_status`` and ``verifier_extracted``: those of
    the first verifier, so that it says what counts as correct, or the ``timeout`` or ``crash`` of
    whichever had one. A score that is not the first's is unknown then, and counts as 0.
    Training and its evaluations log the mean scores as ``score/NAME``.

    >>> from lmrl_env import make_token_vector_env
    >>> verifiers = {
    ...     "right": ("lmrl_env.verifiers:answer_tag_math", 1.0),
    ...     "number": ("lmrl_env.verifiers:last_number", 0.1),
    ... }
    >>> envs = WeightedRewards(make_token_vector_env(4), verifiers)

    Args:
        envs: whose ``info`` has ``response`` and ``answer`` for the slots that end.
        verifiers: by name a verifier, or where to import it from, and its weight.
        truncated_reward: what a truncated response earns instead; it is then not graded. None
            grades it like any other.
        workers: processes that grade, for each verifier; see ``Grader``.
        timeout: seconds of processor time for one response and verifier; see ``Grader``.

    Raises:
        ConfigurationError: if there is no verifier, or a weight is not finite.
    """

    def __init__(
        self,
        envs: VectorEnv,
        verifiers: Mapping[str, tuple[Verifier | str, float]],
        *,
        truncated_reward: float | None = 0.0,
        workers: int = 2,
        timeout: float = 2.0,
    ):
        super().__init__(envs)
        self.weights = {name: weight for name, (_, weight) in verifiers.items()}
        if not self.weights or not all(map(np.isfinite, self.weights.values())):
            raise ConfigurationError(
                f"weights {self.weights}: expected at least one verifier and finite weights, as "
                "{'right': ('my_module:my_verifier', 1.0)}"
            )
        self.graders = {
            name: shared_grader(verifier, workers=workers, timeout=timeout)
            for name, (verifier, _) in verifiers.items()
        }
        self.truncated_reward = truncated_reward

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment, while the graders' workers start in the background."""
        for grader in self.graders.values():
            grader.start()
        return self.env.reset(seed=seed, options=options)

    def outcome_rewards(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """Return the weighted sum for each slot that ends, and its parts in ``info``.

        Raises:
            ConfigurationError: if a slot ends without ``response`` and ``answer`` in ``info``.
        """
        total = np.zeros(self.num_envs)
        status = np.full(self.num_envs, None, dtype=object)
        extracted = np.full(self.num_envs, None, dtype=object)
        graded = ended
        if self.truncated_reward is not None:
            graded = ended & ~truncated
            total[ended & truncated] = self.truncated_reward
            status[ended & truncated] = "truncated"
        slots = np.flatnonzero(graded)
        for name, grader in self.graders.items():
            scores, statuses = np.zeros(self.num_envs), np.full(self.num_envs, None, dtype=object)
            for slot, verdict in zip(slots, grade_slots(self, grader, slots, info), strict=True):
                scores[slot], statuses[slot] = verdict.score, verdict.status
                if status[slot] is None:
                    status[slot], extracted[slot] = verdict.status, verdict.extracted
                elif verdict.status in ("timeout", "crash"):
                    status[slot] = verdict.status
            total += self.weights[name] * scores
            add_info(info, f"score_{name}", scores, graded)
            add_info(info, f"status_{name}", statuses, graded)
        add_info(info, "verifier_status", status, ended)
        add_info(info, "verifier_extracted", extracted, ended)
        return total
