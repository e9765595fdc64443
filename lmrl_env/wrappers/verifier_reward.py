"""The outcome reward: a verifier's score when a response ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper

from lmrl_env.env import TokenVectorEnv
from lmrl_env.errors import ConfigurationError
from lmrl_env.grading import shared_grader
from lmrl_env.types import Question
from lmrl_env.verifiers import Verifier


class VerifierReward(VectorWrapper):
    """Adds a verifier's score to the reward of every slot whose response ends.

    ``info`` gains, for the slots that end, ``verifier_status`` (the verdict's status, or
    ``"truncated"`` where the budget cut a response off and it was not graded) and
    ``verifier_extracted`` (the answer that was judged, or None).

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

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[np.float64], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Step, and pay the slots that end.

        Raises:
            ConfigurationError: if a slot ends without ``response`` and ``answer`` in ``info``.
        """
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        ended = np.logical_or(terminations, truncations)
        if ended.any():
            rewards = np.asarray(rewards, dtype=np.float64) + self._pay(ended, truncations, info)
        return observations, rewards, terminations, truncations, info

    def _questions(
        self, slots: npt.NDArray[np.int64], info: dict[str, Any]
    ) -> list[Question | None] | None:
        """Return the rows that the slots were asked, where a token MDP is beneath."""
        env = self.unwrapped
        if not isinstance(env, TokenVectorEnv):
            return None
        return [env.prompts.questions[info["question_id"][i]] for i in slots]

    def _pay(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """Return the reward of each slot, shape (N,), and say in ``info`` how it came about."""
        for key in ("response", "answer"):
            if not np.all(info.get(f"_{key}", False) & ended == ended):
                raise ConfigurationError(
                    f"slots {np.flatnonzero(ended).tolist()} ended and info[{key!r}] does not hold "
                    "all of them: expected a TokenVectorEnv beneath, or an environment that gives "
                    f"{key!r} for every slot that ends, in the layout of VectorEnv._add_info"
                )
        scores = np.zeros(self.num_envs)
        statuses = np.full(self.num_envs, None, dtype=object)
        extracted = np.full(self.num_envs, None, dtype=object)
        graded = ended
        if self.truncated_reward is not None:
            graded = ended & ~truncated
            scores[ended & truncated] = self.truncated_reward
            statuses[ended & truncated] = "truncated"
        slots = np.flatnonzero(graded)
        verdicts = self.grader.grade(
            [info["response"][i] for i in slots],
            [info["answer"][i] for i in slots],
            self._questions(slots, info),
        )
        for i, verdict in zip(slots, verdicts, strict=True):
            scores[i], statuses[i], extracted[i] = verdict[:3]
        for key, values in (("status", statuses), ("extracted", extracted)):
            info[f"verifier_{key}"], info[f"_verifier_{key}"] = values, ended.copy()
        return scores
