"""Optimiser steps: their micro-batches, the exchange of gradients, and steps that fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lmrl_env import distributed, memory
from lmrl_env.batch_plan import BatchPlan
from lmrl_env.batches import MicroBatch, Rows
from lmrl_env.errors import TrainingError
from lmrl_env.ledger import spent_on
from lmrl_env.rollout import Rollout

MAX_SKIPPED = 5
"""Optimiser steps in a row whose loss or gradient is not finite that stop a run."""


class Updates:
    """The optimiser steps of a module, on one batch after another.

    A step whose loss or gradient is not finite is skipped, on all ranks alike, and the responses
    that cause it are reported. ``MAX_SKIPPED`` such steps in a row raise ``TrainingError``.

    ::

        for micro in updates.micro_batches(batch, rows):
            with updates.micro_step(micro):
                loss, metrics = ...  # this micro-batch's shares
                updates.backward(loss, metrics)
        updates.step()

    Args:
        plan: cuts the batch.
        module: as ``prepare`` returned it.
        optimizer: of the module, as ``prepare`` returned it.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        name: prefix of the metrics.
    """

    def __init__(
        self,
        plan: BatchPlan,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        name: str = "policy",
    ):
        self.plan = plan
        self.module = module
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.name = name
        self._shares: dict[str, Tensor] = {}  # of the optimiser step at hand
        self._sums: dict[str, Tensor] = {}  # of the steps since the last call of metrics
        self._grad_norms: list[float] = []  # of the same steps, those that were skipped left out
        self._norm = 0.0  # of the optimiser step at hand
        self._skipped, self._skipped_in_a_row = 0, 0
        self._out_of_memory = False
        self._closes = distributed.exchange_at_the_end(plan.accelerator, module)

    def micro_batches(self, batch: Rollout, rows: Rows) -> Iterator[MicroBatch]:
        """Yield the micro-batches of an optimiser step.

        Where memory runs out in one of them they start again, smaller. Where the gradient turns
        out not to be finite, its rows come once more, each alone, to find those that cause it.

        Args:
            batch: of this rank.
            rows: of the optimiser step.
        """
        yield from self._whole_step(batch, rows)
        accelerator = self.plan.accelerator
        with spent_on("optimizer"):
            self._norm = distributed.clip_grad_norm(accelerator, self.module, self.max_grad_norm)
        if not math.isfinite(self._norm):
            yield from self._one_by_one(batch, rows)

    def _one_by_one(self, batch: Rollout, rows: Rows) -> Iterator[MicroBatch]:
        """Yield each row alone, and report those that are not finite by themselves."""
        causes: dict[int, list[str]] = {}
        alone = self.plan.micro_batches(batch, rows, max_tokens=1)
        for index, micro in enumerate(alone):
            self.optimizer.zero_grad()
            self._shares = {}
            yield micro._replace(last=False)  # gradients stay on their rank
            names = [name for name, share in self._shares.items() if not share.isfinite()]
            if not names and not self._gradient_is_finite():
                names = ["gradient"]
            if index < len(rows):  # further ones are empty
                row = int(rows[index])
                names = [*_sampled_not_finite(batch, row), *names]
                causes |= {row: names} if names else {}
        self.optimizer.zero_grad()
        self.plan.report_not_finite(self.name, batch, rows, causes)

    def _gradient_is_finite(self) -> bool:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    def _whole_step(self, batch: Rollout, rows: Rows) -> Iterator[MicroBatch]:
        """Yield the micro-batches of an optimiser step, from the start again if memory ran out.

        They are then cut by half as many tokens, which does not change the gradient. With several
        ranks gradients are exchanged by an empty micro-batch at the end, once all have got through.
        Sharded modules exchange them in every micro-batch, of which none can be taken back.

        Args:
            batch: of this rank.
            rows: of the optimiser step.
        """
        while True:
            self._shares, self._out_of_memory = {}, False
            for micro in self.plan.micro_batches(batch, rows):
                yield micro._replace(last=False) if self._closes else micro
                if self._out_of_memory:
                    break
            if not distributed.any_rank(self.plan.accelerator, self._out_of_memory):
                break
            yield from self._let_go(batch)
            self.plan.halve_micro_batches(batch, rows)
        if self._closes:
            yield self.plan.empty_micro_batch(batch)

    def _let_go(self, batch: Rollout) -> Iterator[MicroBatch]:
        """Free what the failed pass holds.

        The loop's own names refer to the micro-batch that failed until another one takes its
        place: an empty one does so before the large ones come.
        """
        self.optimizer.zero_grad()
        memory.release()
        yield self.plan.empty_micro_batch(batch)._replace(last=False)
        self.optimizer.zero_grad()
        memory.release()

    @contextmanager
    def micro_step(self, micro: MicroBatch) -> Iterator[None]:
        """Return the context of one micro-batch's forward and backward."""
        part = "exchange" if self._closes and micro.last else "forward_backward"
        try:
            with (
                spent_on(part),
                distributed.micro_step(self.plan.accelerator, self.module, micro.last),
            ):
                yield
        except RuntimeError as error:
            self.plan.check_out_of_memory(error, others_wait=self._closes and micro.last)
            self._out_of_memory = True

    def backward(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add a micro-batch's gradient and its shares of the metrics to the optimiser step's.

        A loss that is not finite makes the gradient so too, and thereby that of all ranks.
        """
        finite = 1 + 0 * loss.detach()  # 1 exactly, or not a number
        distributed.backward(self.plan.accelerator, loss * finite)
        for name, share in {f"{self.name}/loss": loss, **metrics}.items():
            self._shares[name] = self._shares.get(name, 0) + share.detach()

    @spent_on("optimizer")
    def step(self) -> None:
        """Take the optimiser step, unless its loss or gradient is not finite.

        Raises:
            TrainingError: if ``MAX_SKIPPED`` steps in a row were not.
        """
        finite = math.isfinite(self._norm)
        if finite:
            self.optimizer.step()
            self._grad_norms.append(self._norm)
        self.optimizer.zero_grad()
        for name, share in self._shares.items():
            total = self._sums.get(name, torch.zeros_like(share))
            self._sums[name] = total + share if finite else total
        self._skipped += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == MAX_SKIPPED:
            raise TrainingError(
                f"{MAX_SKIPPED} optimiser steps of the {self.name} in a row had a loss or gradient "
                "that is not finite, and were skipped: expected numbers. faults.jsonl in the run's "
                "folder has the responses that caused it; where their reward is not finite, "
                "correct the verifier, otherwise go on with a lower --lr or with --dtype float32"
            )

    def metrics(self) -> dict[str, float | None]:
        """Return the means over the optimiser steps since the last call, over all ranks.

        Those that were skipped do not count; without any other the means are None.
        """
        count = len(self._grad_norms)
        row: dict[str, float | None] = dict.fromkeys([*self._sums, f"{self.name}/grad_norm"])
        if count:
            row |= distributed.mean_shares(self.plan.accelerator, self._sums, count)
            row[f"{self.name}/grad_norm"] = sum(self._grad_norms) / count
        row[f"{self.name}/skipped_updates"] = self._skipped
        row[f"{self.name}/micro_batch_tokens"] = self.plan.max_tokens
        self._sums, self._grad_norms, self._skipped = {}, [], 0
        return row


def _sampled_not_finite(batch: Rollout, row: int) -> list[str]:
    """Return what is not finite of a response before it is trained on."""
    sampled = {"reward": batch.rewards[row], "sampling_logprobs": batch.sampling_logprobs[row]}
    return [name for name, values in sampled.items() if not np.isfinite(values).all()]
