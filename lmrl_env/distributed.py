"""Ranks: the only module of the library that knows Accelerate.

Losses are shares of an objective that is normalised by counts over all ranks (``BatchTotals``),
so gradients must be *summed* over micro-batches and ranks. Accelerate divides by accumulation
steps and DDP averages over ranks; both are undone here, in ``backward``, and nowhere else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from lmrl_env.errors import ConfigurationError
from lmrl_env.rollout import Rollout

if TYPE_CHECKING:
    pass


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


def all_lists(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """Return the items of all ranks, in the order of ranks."""
    return gather_object(items) if accelerator.num_processes > 1 else items


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether ranks hold parts of a module, and exchange them in every forward."""
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return sharded and accelerator.num_processes > 1


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
