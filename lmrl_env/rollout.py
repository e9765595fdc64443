"""The only place where environment and engine meet: whole responses as steps of the MDP."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from lmrl_env.env import NO_TOKEN, TokenVectorEnv, unwrap
from lmrl_env.errors import ConfigurationError
from lmrl_env.ledger import spent_on
from lmrl_env.types import Sampling
from lmrl_env.verifiers import Status

if TYPE_CHECKING:
    from lmrl_env.engines.engine import Engine


STATUS = "verifier_status"
SCORE = "score_"
"""Begins the keys of ``info`` that hold scores."""

VERIFIER_ERRORS: tuple[Status, ...] = ("timeout", "crash")
"""Statuses that say nothing of the response: its verifier did not finish."""


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
        dense_rewards: shape (N, K), float64, the part of it that was paid for single tokens:
            ``info["token_rewards"]``.
        terminated: shape (N,), bool; the others were truncated by the budget.
        question_ids: shape (N,), int64.
        versions: shape (N,), int64, of the weights that began each response.
        responses: N texts.
        answers: N gold answers.
        verifier_status: N statuses, "" where no verifier is in the environment.
        scores: N mappings: by its name the score of each verifier of a ``WeightedRewards``, None
            where it did not grade the response.
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
    dense_rewards: npt.NDArray[np.float64]
    terminated: npt.NDArray[np.bool_]
    question_ids: npt.NDArray[np.int64]
    versions: npt.NDArray[np.int64]
    responses: list[str]
    answers: list[Any]
    verifier_status: list[str]
    scores: list[dict[str, float | None]]
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
    def has_verifier_error(self) -> npt.NDArray[np.bool_]:
        """Shape (N,), bool: responses whose verifier timed out or crashed."""
        return np.array([status in VERIFIER_ERRORS for status in self.verifier_status])

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Shape (N,), bool: responses of which at least one token counts as an action."""
        return self.mask.sum(axis=1) > 0

    @property
    def token_rewards(self) -> npt.NDArray[np.float64]:
        """Shape (N, K), float64: the dense rewards, and the rest of the return at the end.

        The end is the last action of a response. A row without actions has the dense ones alone.
        """
        placed = self.dense_rewards.copy()
        rows = np.flatnonzero(self.kept)
        last = self.mask.shape[1] - 1 - np.argmax(self.mask[rows, ::-1], axis=1)
        placed[rows, last] += (self.rewards - self.dense_rewards.sum(axis=1))[rows]
        return placed

    def drop_groups(self, rows: npt.NDArray[np.bool_], group_size: int) -> Rollout:
        """Return the batch with the whole groups of some rows out of every loss.

        Their mask is False everywhere, so that no token of theirs is an action.

        Args:
            rows: shape (N,), bool.
            group_size: G.
        """
        dropped = rows.reshape(-1, group_size).any(axis=1).repeat(group_size)
        return self._replace(mask=self.mask & ~dropped[:, None])

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
        """Read a batch that ``save`` wrote, and its metadata.

        Raises:
            ConfigurationError: if the file lacks fields of a batch.
        """
        from safetensors import safe_open

        with safe_open(str(path), framework="numpy") as file:
            fields = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            fields.update({k: json.loads(v) for k, v in file.metadata().items()})
        metadata = {key: fields.pop(key) for key in list(fields) if key not in cls._fields}
        if lacking := sorted(set(cls._fields) - set(fields)):
            raise ConfigurationError(
                f"{str(path)!r} lacks {', '.join(lacking)}: expected a batch of this version; save "
                "it again with --save-batch"
            )
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
    parts: int = 1,
) -> Rollout:
    """Play one episode in every slot.

    The engine writes until its own stop, the environment takes that as one step of K tokens. A
    slot that is not finished then (a wrapper inserted tokens, say) is written on from its state;
    one whose budget is full takes a step without tokens, which truncates it.

    In several parts, the environment steps with one part, and its wrappers grade it, in a thread
    while the engine writes the next; the slots of the others take no token in that step. That
    hides slow verifiers, at the price of smaller batches for the engine.

    Args:
        envs: a ``TokenVectorEnv`` in any wrappers, with ``autoreset_mode="Disabled"`` and
            ``tokens_per_step=max_new_tokens``.
        engine: samples the responses.
        question_ids: shape (N / G,), int: one question a group.
        seeds: shape (N,), non-negative: a response depends on its own seed only.
        temperature: divides the logits.
        top_p: nucleus mass; 1 keeps the support whole, as importance ratios need it.
        top_k: tokens kept; -1 keeps all.
        parts: of the groups, at least 1.

    Raises:
        ConfigurationError: if the environment autoresets or takes fewer tokens a step, or for
            less than one part.
    """
    env = _rollout_env(envs)
    if parts < 1:
        raise ConfigurationError(f"parts={parts}: expected at least 1")
    stop = env.template.stop + env.pause_strings
    sampling = Sampling(env.max_new_tokens, temperature, top_p, top_k, stop)
    with spent_on("env"):
        observations, _ = envs.reset(options={"question_ids": question_ids})
    episodes = _Episodes(observations, seeds, env.max_new_tokens)
    group_size = env.group_size  # at first all slots of a group stand at the same prompt
    sample_seconds = env_seconds = 0.0
    with ThreadPoolExecutor(1) as background:
        while not episodes.done.all():
            started = time.perf_counter()
            groups = np.flatnonzero(~episodes.done).reshape(-1, group_size)
            *first, last = [part.ravel() for part in np.array_split(groups, parts) if part.size]
            steps = []
            for slots in first:
                actions = episodes.sample(engine, sampling, slots, group_size)
                steps.append(background.submit(envs.step, actions))
            actions = episodes.sample(engine, sampling, last, group_size)
            sampled = time.perf_counter()
            with spent_on("env"):
                for slots, step in zip(first, steps, strict=True):
                    episodes.take(slots, *step.result())
                episodes.take(last, *envs.step(actions))
            sample_seconds += sampled - started
            env_seconds += time.perf_counter() - sampled
            group_size = 1
    return episodes.rollout(
        question_ids=np.repeat(np.asarray(question_ids, dtype=np.int64), env.group_size),
        sample_seconds=sample_seconds,
        env_seconds=env_seconds,
    )


class _Episodes:
    """One episode in every slot, as far as it has been played."""

    def __init__(self, observations: dict[str, Any], seeds: npt.NDArray[np.int64], budget: int):
        n, self.budget = len(seeds), budget
        self.observations = {key: values.copy() for key, values in observations.items()}
        self.seeds = seeds.copy()
        self.prompt_lengths = observations["length"].copy()
        self.prompt_ids = observations["input_ids"][:, : self.prompt_lengths.max()].copy()
        self.done, self.terminated = np.zeros((2, n), dtype=np.bool_)
        self.mask = np.zeros((n, budget), dtype=np.bool_)
        self.logprobs = np.zeros((n, budget), dtype=np.float32)
        self.returns, self.dense = np.zeros(n), np.zeros((n, budget))
        self.versions = np.full(n, -1, dtype=np.int64)
        self.scores: list[dict[str, float | None]] = [{}] * n
        self.texts: dict[str, list[Any]] = {key: [""] * n for key in ("response", "answer", STATUS)}

    def sample(
        self, engine: Engine, sampling: Sampling, slots: npt.NDArray[np.int64], group_size: int
    ) -> npt.NDArray[np.int32]:
        """Let the engine go on with some slots, and return the actions, without a token elsewhere.

        Args:
            engine: samples.
            sampling: with the whole budget.
            slots: that are not done.
            group_size: number of adjacent ones that stand at the same state.
        """
        actions = np.full(self.mask.shape, NO_TOKEN, dtype=np.int32)
        written = (self.observations["length"] - self.prompt_lengths)[slots]
        for start in np.unique(written[written < self.budget]):  # at first 0 alone
            chosen = slots[written == start]
            states = [
                self.observations["input_ids"][slot, : self.observations["length"][slot]].tolist()
                for slot in chosen[::group_size]
            ]
            rest = sampling._replace(max_new_tokens=self.budget - int(start))
            completions = engine.generate(states, rest, group_size, self.seeds[chosen].tolist())
            for slot, completion in zip(chosen, completions, strict=True):
                room = min(len(completion.token_ids), self.budget - start)
                actions[slot, :room] = completion.token_ids[:room]
                self.logprobs[slot, start : start + room] = completion.logprobs[:room]
                if self.versions[slot] < 0:
                    self.versions[slot] = completion.version
        self.seeds[slots] += 1
        return actions

    def take(
        self,
        slots: npt.NDArray[np.int64],
        observations: dict[str, Any],
        rewards: npt.NDArray[np.float64],
        terminations: npt.NDArray[np.bool_],
        truncations: npt.NDArray[np.bool_],
        info: dict[str, Any],
    ) -> None:
        """Take over what a step says of some slots."""
        for key, values in observations.items():
            self.observations[key][slots] = values[slots]
        self.returns[slots] += rewards[slots]
        self.terminated[slots] |= terminations[slots]
        ended = slots[(terminations | truncations)[slots]]
        self.done[ended] = True
        for key, texts in self.texts.items():
            for slot in ended if key in info else ():
                texts[slot] = info[key][slot]
        names = [key.removeprefix(SCORE) for key in info if key.startswith(SCORE)]
        for slot in ended if names else ():
            self.scores[slot] = {
                name: float(info[SCORE + name][slot]) if info[f"_{SCORE}{name}"][slot] else None
                for name in names
            }
        if len(ended):
            self.mask[ended] = info["response_mask"][ended]
            if "token_rewards" in info:
                self.dense[ended] = info["token_rewards"][ended]

    def rollout(self, **others: Any) -> Rollout:
        """Return the batch, with the fields that only ``rollout`` knows."""
        lengths = self.observations["length"] - self.prompt_lengths
        response_ids = np.zeros(self.mask.shape, dtype=np.int32)
        for slot, (start, length) in enumerate(zip(self.prompt_lengths, lengths, strict=True)):
            written = self.observations["input_ids"][slot, start : start + length]
            response_ids[slot, :length] = written
        return Rollout(
            prompt_ids=self.prompt_ids,
            prompt_lengths=self.prompt_lengths,
            response_ids=response_ids,
            response_lengths=lengths,
            mask=self.mask,
            sampling_logprobs=np.where(self.mask, self.logprobs, np.float32(0)),
            rewards=self.returns,
            dense_rewards=self.dense,
            terminated=self.terminated,
            versions=self.versions,
            responses=self.texts["response"],
            answers=self.texts["answer"],
            verifier_status=self.texts[STATUS],
            scores=self.scores,
            **others,
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
