"""Optimiser steps: their micro-batches, the exchange of gradients, and steps that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmrl_env import distributed
from lmrl_env.batch_plan import BatchPlan
from lmrl_env.batches import MicroBatch, Rows
from lmrl_env.errors import TrainingError
from lmrl_env.rollout import Rollout


class Updates:
    """The optimiser steps of a module, on one batch after another.

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
        self._grad_norms: list[float] = []
        self._out_of_memory = False
        self._closes = distributed.exchange_at_the_end(plan.accelerator, module)

    def micro_batches(self, batch: Rollout, rows: Rows) -> Iterator[MicroBatch]:
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
            self.optimizer.zero_grad()
            self.plan.halve_micro_batches(batch)
        if self._closes:
            yield self.plan.closing_micro_batch(batch)

    @contextmanager
    def micro_step(self, micro: MicroBatch) -> Iterator[None]:
        """Return the context of one micro-batch's forward and backward."""
        try:
            with distributed.micro_step(self.plan.accelerator, self.module, micro.last):
                yield
        except torch.OutOfMemoryError as error:
            if distributed.is_sharded(self.plan.accelerator) or (self._closes and micro.last):
                raise TrainingError(
                    f"out of memory in a micro-batch of {micro.mask.numel()} response tokens, "
                    "where other ranks already wait for this one's part; lower "
                    f"--micro-batch-tokens {self.plan.max_tokens}, or take --gradient-checkpointing"
                ) from error
            self._out_of_memory = True

    def backward(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add a micro-batch's gradient and its shares of the metrics to the optimiser step's."""
        distributed.backward(self.plan.accelerator, loss)
        for name, share in metrics.items():
            self._shares[name] = self._shares.get(name, 0) + share.detach()

    def step(self) -> None:
        """Take the optimiser step, unless its gradient is not finite."""
        accelerator = self.plan.accelerator
        norm = distributed.clip_grad_norm(accelerator, self.module, self.max_grad_norm)
        self._grad_norms.append(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, share in self._shares.items():
            self._sums[name] = self._sums.get(name, 0) + share

    def metrics(self) -> dict[str, float]:
        """Return the means over the optimiser steps since the last call, over all ranks."""
        count = len(self._grad_norms)
        row = distributed.mean_shares(self.plan.accelerator, self._sums, count)
        row[f"{self.name}/grad_norm"] = sum(self._grad_norms) / count
        self._sums, self._grad_norms = {}, []
        return row
