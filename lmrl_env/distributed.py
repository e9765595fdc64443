"""Ranks: the only module of the library that knows Accelerate.

Losses are shares of an objective that is normalised by counts over all ranks (``BatchTotals``),
so gradients must be *summed* over micro-batches and ranks. Accelerate divides by accumulation
steps and DDP averages over ranks; both are undone here, in ``backward``, and nowhere else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn

from lmrl_env.batches import MicroBatch, Rows, micro_batch_rows, micro_batches
from lmrl_env.errors import ConfigurationError, TrainingError, WeightSyncError
from lmrl_env.policy import Policy, TokenBatch
from lmrl_env.prompts import QuestionStream
from lmrl_env.questions import Part
from lmrl_env.rollout import Rollout, response_seeds
from lmrl_env.types import BatchTotals, Sampling

if TYPE_CHECKING:
    from lmrl_env.engines.engine import Engine

CANARY_TOKENS = 8
CANARY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest accepted difference of a token's log-prob between trainer and engine, in nats."""


def make_accelerator(device: str, dtype: str, tracker: str | None, run_dir: str) -> Accelerator:
    """Start Accelerate on this rank.

    Args:
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.
        dtype: ``bfloat16`` computes in mixed precision over float32 master weights.
        tracker: ``tensorboard`` or ``wandb``.
        run_dir: where a tracker writes.

    Raises:
        ConfigurationError: for ``cuda`` where there is none, or a tracker that is not installed.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch sees no CUDA device; use --device cpu")
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise ConfigurationError(
            f"--tracker {tracker}: it is not installed; run pip install {tracker}"
        )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        log_with=tracker,
        project_dir=run_dir,
    )


def micro_step(
    accelerator: Accelerator, policy: nn.Module, last: bool
) -> AbstractContextManager[Any]:
    """Return the context of one micro-batch's forward and backward.

    Gradients are exchanged once an optimiser step, with its last micro-batch.
    """
    return nullcontext() if last else accelerator.no_sync(policy)


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """Add the gradient of a share of the loss, to be summed over micro-batches and ranks."""
    accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)


def all_sum(accelerator: Accelerator, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the sum over ranks of an array of one shape."""
    tensor = torch.as_tensor(np.asarray(values, dtype=np.float64), device=accelerator.device)
    return accelerator.reduce(tensor, reduction="sum").cpu().numpy()


def all_gather(accelerator: Accelerator, values: npt.NDArray[Any] | Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of ranks, on this rank's device."""
    return accelerator.gather(torch.as_tensor(values, device=accelerator.device))


def all_rollouts(accelerator: Accelerator, batch: Rollout) -> Rollout:
    """Return the responses of all ranks, in the order of ranks, with this rank's times."""
    if accelerator.num_processes == 1:
        return batch
    joined = Rollout.concatenate(gather_object([batch]))
    return joined._replace(sample_seconds=batch.sample_seconds, env_seconds=batch.env_seconds)


def mean_shares(
    accelerator: Accelerator, shares: Mapping[str, Tensor], updates: int
) -> dict[str, float]:
    """Return metrics from their shares, summed over ranks, as means over optimiser steps.

    Args:
        accelerator: of this rank.
        shares: scalars, summed over this rank's micro-batches of all updates.
        updates: number of optimiser steps.
    """
    sums = all_sum(accelerator, [float(value) for value in shares.values()])
    return dict(zip(shares, (sums / updates).tolist(), strict=True))


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return bool(all_sum(accelerator, float(flag)) > 0) if accelerator.num_processes > 1 else flag


class BatchPlan:
    """Which part of a rollout batch belongs to which rank, optimiser step and micro-batch.

    Questions, seeds and minibatches are functions of the run's seed and the step over *all*
    ranks, of which a rank takes its slice: more ranks do the same work, faster.

    Args:
        accelerator: of this rank.
        questions: questions of a rollout batch over all ranks, a multiple of their number.
        group_size: G, responses to each.
        updates: optimiser steps an epoch, at most ``questions``.
        epochs: passes over a batch.
        max_tokens: of a micro-batch.
        seed: of the run.

    Attributes:
        groups: number of this rank's questions.
        first_group: index of the first of them among those of all ranks.
        own: this rank's rows among those of all ranks.

    Raises:
        ConfigurationError: if the questions cannot be shared out so.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        questions: int,
        group_size: int,
        updates: int,
        epochs: int,
        max_tokens: int,
        seed: int,
    ):
        ranks = accelerator.num_processes
        if questions < 1 or questions % ranks:
            raise ConfigurationError(
                f"--prompts-per-step {questions} is not a multiple of the {ranks} ranks: use "
                f"{max(1, questions // ranks) * ranks}"
            )
        if not 1 <= updates <= questions:
            raise ConfigurationError(
                f"--updates-per-step {updates}: {questions} questions cannot be cut into so many "
                "parts; raise --prompts-per-step or lower --updates-per-step"
            )
        self.accelerator = accelerator
        self.questions = questions
        self.group_size = group_size
        self.updates = updates
        self.epochs = epochs
        self.max_tokens = max_tokens
        self.seed = seed
        self.groups = questions // ranks
        self.first_group = accelerator.process_index * self.groups
        self.own = slice(
            self.first_group * group_size, (self.first_group + self.groups) * group_size
        )

    def question_ids(self, step: int, parts: Sequence[Part] | int, refill: int = 0) -> list[int]:
        """Return this rank's questions of a step, from one shuffle of the set after another.

        Args:
            step: from 1.
            parts: of the set, which take turns by their shares; or the set's size.
            refill: number of a further rollout of the step, which has a stream of its own.
        """
        stream = QuestionStream(parts)
        start = (step - 1) * self.questions + self.first_group
        seed = self._stream_seed(refill)
        return [stream.question_id(seed, start + i) for i in range(self.groups)]

    def seeds(self, step: int, refill: int = 0) -> npt.NDArray[np.int64]:
        """Return the seeds of this rank's responses of a step, or of a further rollout of it."""
        count = self.questions * self.group_size
        return response_seeds(self._stream_seed(refill), step, count)[self.own]

    def _stream_seed(self, refill: int) -> int:
        if refill == 0:
            return self.seed
        return int(np.random.default_rng((self.seed, refill, 1)).integers(2**62))

    def advantages(
        self,
        rewards: npt.NDArray[np.float64] | Tensor,
        kept: npt.NDArray[np.bool_],
        compute: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """Return this rank's advantages against the kept rows of all ranks, and 0 for the others.

        For advantages by statistics of the whole batch, on which groups that were dropped must
        have no influence.

        Args:
            rewards: shape (N, ...), of this rank.
            kept: shape (N,), bool, of this rank; groups are kept or not as a whole.
            compute: returns advantages from the rewards of all ranks and the group size.
        """
        everywhere = all_gather(self.accelerator, rewards)
        counted = all_gather(self.accelerator, kept).bool()
        advantages = torch.zeros_like(everywhere)
        if counted.any():
            advantages[counted] = compute(everywhere[counted], self.group_size)
        return self.own_rows(advantages)

    def own_rows(self, values: Tensor) -> Tensor:
        """Return this rank's part of the rows of all ranks, as float32."""
        return values[self.own].float()

    def minibatches(self, step: int) -> Iterator[Rows]:
        """Yield this rank's rows of each optimiser step; groups stay whole."""
        for epoch in range(self.epochs):
            order = np.arange(self.questions)
            if self.updates > 1:
                order = np.random.default_rng((self.seed, step, epoch)).permutation(self.questions)
            for groups in np.array_split(order, self.updates):
                own = np.sort(groups) - self.first_group
                own = own[(own >= 0) & (own < self.groups)]
                yield (own[:, None] * self.group_size + np.arange(self.group_size)).ravel()

    def totals(self, batch: Rollout, rows: Rows) -> BatchTotals:
        """Return the counts of an optimiser step over all ranks, at least 1 each.

        Responses without actions, whose group was dropped, do not count.
        """
        counts = [batch.kept[rows].sum(), batch.mask[rows].sum()]
        responses, tokens = (max(1, int(count)) for count in all_sum(self.accelerator, counts))
        return BatchTotals(responses, tokens, batch.mask.shape[1])

    def micro_batches(self, batch: Rollout, rows: Rows) -> Iterator[MicroBatch]:
        """Yield the micro-batches of an optimiser step.

        A rank with fewer of them than another gets empty ones: sharded modules communicate in
        every forward, so that all ranks must make as many.
        """
        cuts = micro_batch_rows(batch, rows, self.group_size, self.max_tokens)
        count = int(all_gather(self.accelerator, np.array([len(cuts)])).max())
        cuts += [np.zeros(0, dtype=np.int64)] * (max(count, 1) - len(cuts))
        return micro_batches(batch, cuts, self.group_size, self.accelerator.device)

    def halve_micro_batches(self, batch: Rollout) -> None:
        """Cut micro-batches by half as many tokens from now on, on every rank.

        Raises:
            TrainingError: if none of them can be cut further.
        """
        longest = int(max(batch.prompt_lengths + batch.response_lengths))
        if self.max_tokens <= longest:
            raise TrainingError(
                f"out of memory in a micro-batch of one response of {longest} tokens: expected "
                "room for it; lower --max-new-tokens, or take --gradient-checkpointing"
            )
        self.max_tokens = max(longest, self.max_tokens // 2)

    def score(self, batch: Rollout, forward: Callable[[TokenBatch], Tensor]) -> Tensor:
        """Return what a module says of each token of this rank's responses, without gradient.

        Args:
            batch: of this rank.
            forward: returns shape (n, k) for a micro-batch's tokens, as log-probs or values.

        Returns:
            Shape (N, K), 0 behind the responses.
        """
        scores = torch.zeros(batch.mask.shape, device=self.accelerator.device)
        with torch.no_grad():
            for micro in self.micro_batches(batch, np.arange(len(batch.rewards))):
                scores[micro.rows, : micro.width] = forward(micro.tokens)
        return scores

    def logprobs(self, policy: nn.Module, batch: Rollout, temperature: float) -> Tensor:
        """Return a policy's log-probs of this rank's responses, shape (N, K), no gradient."""
        return self.score(batch, lambda tokens: policy(tokens, temperature=temperature)[0])


def full_weights(accelerator: Accelerator, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the policy's weights under the names of its Transformers model."""
    yield from accelerator.unwrap_model(policy).model.state_dict().items()


def sync_weights(
    accelerator: Accelerator,
    policy: nn.Module,
    engine: Engine,
    version: int,
    *,
    prompt_ids: Sequence[int],
    temperature: float,
    max_new_tokens: int,
    dtype: str,
) -> float:
    """Give the engine the policy's weights, and check that it samples from them.

    The check is a canary: the engine writes a few tokens, and the log-probs that it reports for
    them must be the policy's.

    Args:
        accelerator: of this rank.
        policy: what to copy, as ``prepare`` returned it.
        engine: where to.
        version: stamped on what the engine writes from now on.
        prompt_ids: of the canary.
        temperature: of the canary and of training.
        max_new_tokens: most tokens that the engine is made for.
        dtype: chooses the tolerance.

    Returns:
        The largest difference of a canary token's log-prob, in nats.

    Raises:
        WeightSyncError: if it exceeds the tolerance, or the version is not the new one.
    """
    engine.update_weights(full_weights(accelerator, policy), version)
    sampling = Sampling(min(CANARY_TOKENS, max_new_tokens), temperature)
    (completion,) = engine.generate([prompt_ids], sampling, 1, [version])
    module: Policy = accelerator.unwrap_model(policy)
    device = accelerator.device
    batch = TokenBatch(
        prompt_ids=torch.tensor([list(prompt_ids)], device=device),
        prompt_lengths=torch.tensor([len(prompt_ids)], device=device),
        prompt_index=torch.zeros(1, dtype=torch.int64, device=device),
        response_ids=torch.as_tensor(completion.token_ids[None].astype(np.int64), device=device),
        response_lengths=torch.tensor([len(completion.token_ids)], device=device),
    )
    with torch.no_grad():
        logprobs, _ = module(batch, temperature=temperature)
    gap = float(np.abs(logprobs[0].cpu().numpy() - completion.logprobs).max())
    if completion.version != version or not gap <= CANARY_TOLERANCE[dtype]:
        raise WeightSyncError(
            f"after the sync to version {version} the engine samples version {completion.version} "
            f"and its log-probs differ from the policy's by up to {gap:.3g} nats (accepted: "
            f"{CANARY_TOLERANCE[dtype]}): policy {logprobs[0].tolist()}, engine "
            f"{completion.logprobs.tolist()}; check that --model and --dtype are the engine's too"
        )
    return gap


def shutdown(accelerator: Accelerator) -> None:
    """End trackers and the process group, after all ranks got here.

    Gloo aborts a process that still holds a DDP module when its group is destroyed: drop what
    ``prepare`` returned first.
    """
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.free_memory()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # another run may start in this process
