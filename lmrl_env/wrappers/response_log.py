"""Wrappers that write down what happens, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv, VectorWrapper

from lmrl_env.env import TokenVectorEnv, unwrap
from lmrl_env.grading import shared_grader
from lmrl_env.verifiers import Verifier
from lmrl_env.wrappers.graded import grade_slots
from lmrl_env.wrappers.outcome_reward import OutcomeReward, add_info


class RecordResponses(VectorWrapper):
    """Appends every finished response to a file.

    A line holds ``question`` (the row's id), ``prompt``, ``return`` (the sum of the episode's
    rewards) and all single values that ``info`` has of the slot: ``response``, ``answer``,
    ``finish_reason``, ``verifier_status`` and so on. It records what the wrappers beneath it
    paid and said.

    >>> import tempfile
    >>> import gymnasium as gym
    >>> folder = tempfile.mkdtemp()
    >>> envs = RecordResponses(gym.make_vec("MathR1-v0", num_envs=4), f"{folder}/responses.jsonl")

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers.
        path: of the file, in UTF-8; its folder is made. Give each process its own.
    """

    def __init__(self, envs: VectorEnv, path: str | Path):
        super().__init__(envs)
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._token_mdp = unwrap(envs)
        self._returns = np.zeros(envs.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; responses that were cut short by it are not recorded."""
        result = self.env.reset(seed=seed, options=options)
        self._returns[self._token_mdp.response_lengths == 0] = 0.0
        return result

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Step, and record the responses that end."""
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        self._returns += rewards
        ended = np.logical_or(terminations, truncations)
        append_lines(self.path, (self._record(slot, info) for slot in np.flatnonzero(ended)))
        self._returns[ended] = 0.0
        return observations, rewards, terminations, truncations, info

    def _record(self, slot: int, info: dict[str, Any]) -> dict[str, Any]:
        return {
            **asked(self._token_mdp, slot, info),
            "return": self._returns[slot],
            **{
                key: values[slot]
                for key, values in info.items()
                if isinstance(values, np.ndarray)
                and values.ndim == 1
                and not key.startswith("_")
                and info[f"_{key}"][slot]
            },
        }


class DisagreementLog(OutcomeReward):
    """Judges responses by two verifiers, and appends to a file those on which they differ.

    They differ where one calls a response correct and the other does not. A line holds
    ``question`` (the row's id), ``prompt``, ``response``, ``answer`` and the two verdicts,
    ``first`` and ``second``. It pays nothing and leaves truncated responses out. ``info`` gains
    ``verifiers_differ`` for the slots that end by themselves.

    >>> import tempfile
    >>> import gymnasium as gym
    >>> verifiers = "lmrl_env.verifiers:answer_tag_math", "lmrl_env.verifiers:last_number"
    >>> path = f"{tempfile.mkdtemp()}/disagreements.jsonl"
    >>> envs = DisagreementLog(gym.make_vec("MathR1-v0", num_envs=4), *verifiers, path)

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers.
        first: a verifier, or where to import it from.
        second: another one.
        path: of the file, in UTF-8; its folder is made. Give each process its own.
        workers: processes that grade, for each verifier; see ``Grader``.
        timeout: seconds of processor time for one response and verifier; see ``Grader``.
    """

    def __init__(
        self,
        envs: VectorEnv,
        first: Verifier | str,
        second: Verifier | str,
        path: str | Path,
        *,
        workers: int = 2,
        timeout: float = 2.0,
    ):
        super().__init__(envs)
        self.graders = [
            shared_grader(verifier, workers=workers, timeout=timeout)
            for verifier in (first, second)
        ]
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._token_mdp = unwrap(envs)

    def outcome_rewards(
        self, ended: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_], info: dict[str, Any]
    ) -> npt.NDArray[np.float64]:
        """Return 0 for every slot, after the responses were judged."""
        judged = ended & ~truncated
        slots = np.flatnonzero(judged)
        verdicts = [grade_slots(self, grader, slots, info) for grader in self.graders]
        differ = np.zeros(self.num_envs, dtype=np.bool_)
        records = []
        for slot, first, second in zip(slots, *verdicts, strict=True):
            differ[slot] = (first.status == "correct") != (second.status == "correct")
            if differ[slot]:
                records.append(
                    {
                        **asked(self._token_mdp, slot, info),
                        "response": info["response"][slot],
                        "answer": info["answer"][slot],
                        "first": first._asdict(),
                        "second": second._asdict(),
                    }
                )
        append_lines(self.path, records)
        add_info(info, "verifiers_differ", differ, judged)
        return np.zeros(self.num_envs)


def asked(env: TokenVectorEnv, slot: int, info: dict[str, Any]) -> dict[str, Any]:
    """Return what a slot was asked: the ``question``'s id and the ``prompt``."""
    prompt = env.prompts[info["question_id"][slot]]
    return {"question": env.question(slot).id, "prompt": env.tokenizer.decode(prompt)}


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records to a file, one JSON object a line; NumPy's scalars become plain ones."""
    lines = [
        json.dumps(record, ensure_ascii=False, default=lambda value: value.item()) + "\n"
        for record in records
    ]
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
