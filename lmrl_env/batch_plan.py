"""Which part of a rollout batch belongs to which rank, optimiser step and micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lmrl_env import memory
from lmrl_env.batches import MicroBatch, Rows, micro_batch_rows, micro_batches
from lmrl_env.distributed import all_gather, all_sum, any_rank, is_sharded
from lmrl_env.errors import ConfigurationError, TrainingError
from lmrl_env.ledger import spent_on
from lmrl_env.policy import TokenBatch
from lmrl_env.prompts import QuestionStream
from lmrl_env.questions import Part
from lmrl_env.rollout import Rollout, response_seeds
from lmrl_env.types import BatchTotals
from lmrl_env.waiting import waiting

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Report = Callable[[str, str, Rollout, Mapping[int, list[str]]], None]
"""Called on every rank with what happened, more of it, a batch, and what is wrong with its rows."""


def batch_problems(questions: int, ranks: int, updates: int) -> list[str]:
    """Return why a batch's questions cannot be shared out so, if they cannot.

    Args:
        questions: of a rollout batch over all ranks.
        ranks: number of processes.
        updates: optimiser steps an epoch.
    """
    problems = []
    if questions < 1 or questions % ranks:
        problems.append(
            f"--prompts-per-step {questions} is not a multiple of the {ranks} ranks: use "
            f"{max(1, questions // ranks) * ranks}"
        )
    if not 1 <= updates <= max(1, questions):
        problems.append(
            f"--updates-per-step {updates}: {questions} questions cannot be cut into so many "
            "parts; raise --prompts-per-step or lower --updates-per-step"
        )
    return problems


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
        report: is told of faults that the run survives; by default they are logged.

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
        report: Report | None = None,
    ):
        ranks = accelerator.num_processes
        if problems := batch_problems(questions, ranks, updates):
            raise ConfigurationError("; ".join(problems))
        self.accelerator = accelerator
        self.questions = questions
        self.group_size = group_size
        self.updates = updates
        self.epochs = epochs
        self.max_tokens = max_tokens
        self.seed = seed
        self.report = report or _log
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

    def micro_batches(
        self, batch: Rollout, rows: Rows, max_tokens: int | None = None
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of an optimiser step.

        A rank with fewer of them than another gets empty ones: sharded modules communicate in
        every forward, so that all ranks must make as many.

        Args:
            batch: of this rank.
            rows: of the optimiser step.
            max_tokens: of a micro-batch; the plan's by default.
        """
        cuts = micro_batch_rows(batch, rows, self.group_size, max_tokens or self.max_tokens)
        count = int(all_gather(self.accelerator, np.array([len(cuts)])).max())
        cuts += [np.zeros(0, dtype=np.int64)] * (max(count, 1) - len(cuts))
        return micro_batches(batch, cuts, self.group_size, self.accelerator.device)

    def empty_micro_batch(self, batch: Rollout) -> MicroBatch:
        """Return the smallest micro-batch, which adds nothing to any sum."""
        shortest = batch._replace(response_lengths=np.minimum(batch.response_lengths, 1))
        nothing = np.zeros(0, dtype=np.int64)
        (micro,) = micro_batches(shortest, [nothing], self.group_size, self.accelerator.device)
        return micro

    def check_out_of_memory(self, error: RuntimeError, others_wait: bool = False) -> None:
        """Raise an error again, unless it says that memory ran out and all ranks can begin anew.

        Args:
            error: of a micro-batch.
            others_wait: whether other ranks wait in it for this one, as they always do where a
                module is sharded.

        Raises:
            TrainingError: if others wait, in the middle of the micro-batch that one gave up.
        """
        if not memory.is_out_of_memory(error):
            raise error
        if others_wait or is_sharded(self.accelerator):
            raise TrainingError(
                f"rank {self.accelerator.process_index} is out of memory in a micro-batch of at "
                f"most {self.max_tokens} tokens, in which other ranks wait for it: go on with "
                f"--micro-batch-tokens {self.max_tokens // 2} or --gradient-checkpointing ({error})"
            ) from error

    def halve_micro_batches(self, batch: Rollout, rows: Rows) -> None:
        """Cut rows into more micro-batches from now on, of half as many tokens, on every rank.

        Raises:
            TrainingError: if none of them can be cut further.
        """
        rows_longest = int((batch.prompt_lengths + batch.response_lengths)[rows].max(initial=1))
        cuts = micro_batch_rows(batch, rows, self.group_size, self.max_tokens)
        tokens = self.max_tokens
        while tokens > rows_longest:  # a batch may be much smaller than the budget
            tokens = max(rows_longest, tokens // 2)
            if len(micro_batch_rows(batch, rows, self.group_size, tokens)) > len(cuts):
                break
        everywhere = all_gather(self.accelerator, np.array([[rows_longest, tokens]]))
        longest = int(everywhere[:, 0].max())
        if self.max_tokens <= longest:
            raise TrainingError(
                f"out of memory in a micro-batch of at most {self.max_tokens} tokens, and one "
                f"response with its question has {longest}: expected room for it; lower "
                "--max-new-tokens, take --gradient-checkpointing or --dtype bfloat16, or more ranks"
            )
        before, self.max_tokens = self.max_tokens, max(longest, int(everywhere[:, 1].min()))
        memory.release()
        self.report(
            f"out of memory in a micro-batch of at most {before} tokens",
            f"they have at most {self.max_tokens} from now on, and the same gradient; "
            f"--micro-batch-tokens {self.max_tokens} says so from the start",
            batch,
            {},
        )

    def report_not_finite(
        self, name: str, batch: Rollout, rows: Rows, causes: Mapping[int, list[str]]
    ) -> None:
        """Report an optimiser step that is not finite, once on the screen, on every rank.

        Args:
            name: of the module under training.
            batch: of this rank.
            rows: of the optimiser step.
            causes: what is not finite, by row.
        """
        found, total = all_sum(self.accelerator, [len(causes), len(rows)])
        rewards = all_sum(self.accelerator, sum("reward" in names for names in causes.values()))
        self.report(
            f"the loss or gradient of the {name} is not finite",
            "the optimiser step is skipped; "
            + (f"{found:.0f} of its {total:.0f} responses are" if found else "no response is")
            + " not finite alone"
            + (f", {rewards:.0f} by their reward" if rewards else ""),
            batch,
            causes,
        )

    def score(self, batch: Rollout, forward: Callable[[TokenBatch], Tensor]) -> Tensor:
        """Return what a module says of each token of this rank's responses, without gradient.

        Where memory runs out, micro-batches are cut smaller and it starts again.

        Args:
            batch: of this rank.
            forward: returns shape (n, k) for a micro-batch's tokens, as log-probs or values.

        Returns:
            Shape (N, K), 0 behind the responses.
        """
        rows = np.arange(len(batch.rewards))
        while True:
            scores = torch.zeros(batch.mask.shape, device=self.accelerator.device)
            out_of_memory = False
            for micro in self.micro_batches(batch, rows):
                try:
                    with torch.no_grad(), waiting(self.accelerator.device):
                        scores[micro.rows, : micro.width] = forward(micro.tokens)
                except RuntimeError as error:
                    self.check_out_of_memory(error)
                    out_of_memory = True
                    break
            if not any_rank(self.accelerator, out_of_memory):
                return scores
            self.halve_micro_batches(batch, rows)

    @spent_on("scoring")
    def logprobs(self, policy: nn.Module, batch: Rollout, temperature: float) -> Tensor:
        """Return a policy's log-probs of this rank's responses, shape (N, K), no gradient."""
        return self.score(batch, lambda tokens: policy(tokens, temperature=temperature)[0])


def _log(what: str, detail: str, batch: Rollout, causes: Mapping[int, list[str]]) -> None:
    logger.warning("%s: %s", what, detail)
