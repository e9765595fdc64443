"""The only place where environment and engine meet: whole responses as steps of the MDP."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from lmrl_env.env import NO_TOKEN, TokenVectorEnv, unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.types import Completion, Sampling

if TYPE_CHECKING:
    from lmrl_env.engines.engine import Engine


STATUS = "verifier_status"


class Rollout(NamedTuple):
    """One episode of every slot: a batch of responses with what they earned.

    Attributes:
        prompt_ids: shape (N, P), int32, left-aligned, zeros behind.
        prompt_lengths: shape (N,), int64, tokens.
        response_ids: shape (N, K), int32, left-aligned, zeros behind.
        response_lengths: shape (N,), int64, tokens, inserted ones included.
        mask: shape (N, K), bool, True where a token was an action of the policy.
        sampling_logprobs: shape (N, K), float32, nats, of the engine; 0 outside the mask.
        rewards: shape (N,), float64, the episode's return.
        terminated: shape (N,), bool; the others were truncated by the budget.
        question_ids: shape (N,), int64.
        versions: shape (N,), int64, of the weights that began each response.
        responses: N texts.
        answers: N gold answers.
        verifier_status: N statuses, "" where no verifier is in the environment.
        sample_seconds: wall time in the engine.
        env_seconds: wall time in the environment, its wrappers and verifiers.
    """

    prompt_ids: npt.NDArray[np.int32]
    prompt_lengths: npt.NDArray[np.int64]
    response_ids: npt.NDArray[np.int32]
    response_lengths: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    sampling_logprobs: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float64]
    terminated: npt.NDArray[np.bool_]
    question_ids: npt.NDArray[np.int64]
    versions: npt.NDArray[np.int64]
    responses: list[str]
    answers: list[Any]
    verifier_status: list[str]
    sample_seconds: float
    env_seconds: float

    @property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Shape (N,), bool: episodes that the budget ended."""
        return ~self.terminated

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Shape (N,), bool: what the verifier called correct; without one, a positive return."""
        if any(self.verifier_status):
            return np.array([status == "correct" for status in self.verifier_status])
        return self.rewards > 0

    @property
    def token_rewards(self) -> npt.NDArray[np.float64]:
        """Shape (N, K), float64: the return, at the last action of each response."""
        placed = np.zeros(self.mask.shape)
        last = self.mask.shape[1] - 1 - np.argmax(self.mask[:, ::-1], axis=1)
        placed[np.arange(len(last)), last] = self.rewards
        return placed

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64] | slice) -> Rollout:
        """Return some rows, in the order given."""
        rows = np.arange(len(self.rewards))[rows]
        fields = self._asdict()
        for key, value in fields.items():
            if isinstance(value, np.ndarray):
                fields[key] = value[rows]
            elif isinstance(value, list):
                fields[key] = [value[row] for row in rows]
        return Rollout(**fields)

    @classmethod
    def concatenate(cls, batches: Sequence[Rollout]) -> Rollout:
        """Return the rows of several batches of one environment, their times summed."""
        width = max(batch.prompt_ids.shape[1] for batch in batches)
        fields: dict[str, Any] = {}
        for key in cls._fields:
            values = [getattr(batch, key) for batch in batches]
            if key == "prompt_ids":
                values = [np.pad(ids, ((0, 0), (0, width - ids.shape[1]))) for ids in values]
            if isinstance(values[0], np.ndarray):
                fields[key] = np.concatenate(values)
            else:
                fields[key] = sum(values, [] if isinstance(values[0], list) else 0.0)
        return cls(**fields)

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Write the batch to a safetensors file, texts and ``metadata`` as JSON in its header."""
        from safetensors.numpy import save_file

        fields = self._asdict()
        arrays = {
            k: np.ascontiguousarray(v) for k, v in fields.items() if isinstance(v, np.ndarray)
        }
        texts = {k: json.dumps(v) for k, v in {**fields, **metadata}.items() if k not in arrays}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, path, metadata=texts)

    @classmethod
    def load(cls, path: str | Path) -> tuple[Rollout, dict[str, Any]]:
        """Read a batch that ``save`` wrote, and its metadata."""
        from safetensors import safe_open

        with safe_open(str(path), framework="numpy") as file:
            fields = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            fields.update({k: json.loads(v) for k, v in file.metadata().items()})
        metadata = {key: fields.pop(key) for key in list(fields) if key not in cls._fields}
        return cls(**fields), metadata


def rollout(
    envs: VectorEnv[Any, Any, Any],
    engine: Engine,
    *,
    question_ids: npt.ArrayLike,
    seeds: npt.NDArray[np.int64],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
) -> Rollout:
    """Play one episode in every slot.

    The engine writes until its own stop, the environment takes that as one step of K tokens. A
    slot that is not finished then (a wrapper inserted tokens, say) is written on from its state.

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers, with ``autoreset_mode="Disabled"`` and
            ``tokens_per_step=max_new_tokens``.
        engine: samples the responses.
        question_ids: shape (N / G,), int: one question a group.
        seeds: shape (N,), non-negative: a response depends on its own seed only.
        temperature: divides the logits.
        top_p: nucleus mass; 1 keeps the support whole, as importance ratios need it.
        top_k: tokens kept; -1 keeps all.

    Raises:
        ConfigurationError: if the environment autoresets or takes fewer tokens a step.
    """
    env = _rollout_env(envs)
    n, k = env.num_envs, env.max_new_tokens
    sampling = Sampling(k, temperature, top_p, top_k, env.template.stop)
    observations, _ = envs.reset(options={"question_ids": question_ids})
    prompt_lengths = observations["length"]
    prompt_ids = observations["input_ids"][:, : prompt_lengths.max()]
    returns, done = np.zeros(n), np.zeros(n, dtype=np.bool_)
    terminated, mask = np.zeros(n, dtype=np.bool_), np.zeros((n, k), dtype=np.bool_)
    logprobs, versions = np.zeros((n, k), np.float32), np.full(n, -1, dtype=np.int64)
    texts: dict[str, list[Any]] = {key: [""] * n for key in ("response", "answer", STATUS)}
    sample_seconds = env_seconds = 0.0
    group_size = env.group_size  # at first all slots of a group stand at the same prompt

    while not done.all():
        started = time.perf_counter()
        written = observations["length"] - prompt_lengths
        actions = np.full((n, k), NO_TOKEN, dtype=np.int32)
        for start in np.unique(written[~done]):  # at first one: all slots have the whole budget
            slots = np.flatnonzero(~done & (written == start))
            states = [
                observations["input_ids"][slot, : observations["length"][slot]].tolist()
                for slot in slots[::group_size]
            ]
            budget = sampling._replace(max_new_tokens=max(1, k - int(start)))
            completions = engine.generate(states, budget, group_size, seeds[slots].tolist())
            for slot, completion in zip(slots, completions, strict=True):
                _write(slot, completion, start, actions, logprobs)
                versions[slot] = completion.version if versions[slot] < 0 else versions[slot]
        sampled = time.perf_counter()
        observations, rewards, terminations, truncations, info = envs.step(actions)
        sample_seconds += sampled - started
        env_seconds += time.perf_counter() - sampled
        returns += rewards
        terminated |= terminations
        ended = terminations | truncations
        done |= ended
        for key, values in texts.items():
            for slot in np.flatnonzero(ended) if key in info else ():
                values[slot] = info[key][slot]
        if ended.any():
            mask[ended] = info["response_mask"][ended]
        group_size, seeds = 1, seeds + 1

    response_lengths = observations["length"] - prompt_lengths
    response_ids = np.zeros((n, k), dtype=np.int32)
    for slot in range(n):
        start, stop = prompt_lengths[slot], observations["length"][slot]
        response_ids[slot, : stop - start] = observations["input_ids"][slot, start:stop]
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_lengths=prompt_lengths,
        response_ids=response_ids,
        response_lengths=response_lengths,
        mask=mask,
        sampling_logprobs=np.where(mask, logprobs, np.float32(0)),
        rewards=returns,
        terminated=terminated,
        question_ids=np.repeat(np.asarray(question_ids, dtype=np.int64), env.group_size),
        versions=versions,
        responses=texts["response"],
        answers=texts["answer"],
        verifier_status=texts[STATUS],
        sample_seconds=sample_seconds,
        env_seconds=env_seconds,
    )


def response_seeds(seed: int, step: int, count: int) -> npt.NDArray[np.int64]:
    """Return the seeds of all responses of a step, over all ranks: a rank takes its slice.

    Args:
        seed: of the run.
        step: of the rollout.
        count: number of responses.

    Returns:
        Shape (count,), int64, non-negative; the i-th does not depend on ``count``.
    """
    return np.random.default_rng((seed, step)).integers(2**62, size=count, dtype=np.int64)


def _write(
    slot: int,
    completion: Completion,
    start: int,
    actions: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
) -> None:
    """Put a completion into its slot's action, and its log-probs where its tokens will stand."""
    room = min(len(completion.token_ids), actions.shape[1] - start)
    actions[slot, :room] = completion.token_ids[:room]
    logprobs[slot, start : start + room] = completion.logprobs[:room]


def _rollout_env(envs: VectorEnv[Any, Any, Any]) -> TokenVectorEnv:
    env = unwrap(envs)
    if env.autoreset_mode is not AutoresetMode.DISABLED:
        raise ConfigurationError(
            f"autoreset_mode={env.autoreset_mode.value!r}: a rollout plays one episode a slot; "
            "make the environment with autoreset_mode='Disabled'"
        )
    if env.tokens_per_step != env.max_new_tokens:
        raise ConfigurationError(
            f"tokens_per_step={env.tokens_per_step}: a rollout steps by whole responses; make the "
            f"environment with tokens_per_step={env.max_new_tokens}, its max_new_tokens"
        )
    return env
