"""Ranks: the only module of the library that knows Accelerate.

Losses are shares of an objective that is normalised by counts over all ranks (``BatchTotals``),
so gradients must be *summed* over micro-batches and ranks. Accelerate divides by accumulation
steps and DDP averages over ranks; both are undone here, in ``backward``, and nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    fsdp2_prepare_model,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations import unset_hf_deepspeed_config

from lmrl_env.errors import ConfigurationError
from lmrl_env.rollout import Rollout
from lmrl_env.sharding import full_tensor
from lmrl_env.waiting import begin_waiting, waiting

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers write the number of processes that they start."""

NEEDED_OF_PLUGINS = {
    "fsdp_version": 2,
    "cpu_ram_efficient_loading": False,
}
"""Settings of Accelerate's plugins that shard models."""


def make_accelerator(
    device: str,
    dtype: str,
    tracker: str | None,
    run_dir: str,
    *,
    wait_limit: float = 30.0,
    max_grad_norm: float = 1.0,
) -> Accelerator:
    """Start Accelerate on this rank.

    Args:
        device: ``auto`` (CUDA if there is one), ``cpu`` or ``cuda``.
        dtype: ``bfloat16`` computes in mixed precision over float32 master weights.
        tracker: ``tensorboard`` or ``wandb``.
        run_dir: where a tracker writes.
        wait_limit: minutes that a rank waits for the others.
        max_grad_norm: for DeepSpeed, which clips gradients itself.

    Raises:
        ConfigurationError: for ``cuda`` where there is none, a tracker that is not installed, or
            a launch that does not give what it asks for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch sees no CUDA device; use --device cpu")
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        raise ConfigurationError(
            f"--tracker {tracker}: it is not installed; run pip install {tracker}"
        )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    # Accelerate drops a timeout that equals its own default, which is not the backend's.
    timeout = timedelta(minutes=wait_limit, milliseconds=1)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        log_with=tracker,
        project_dir=run_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    check_launch(accelerator)
    begin_waiting(wait_limit)
    set_up_sharding(accelerator, max_grad_norm)
    return accelerator


def set_up_sharding(accelerator: Accelerator, max_grad_norm: float) -> None:
    """Replace what Accelerate chooses for sharded modules, where they would train otherwise.

    FSDP2 in bfloat16 would round log-probs and the sums of gradients to it; DeepSpeed would let
    Transformers load parts of models, which every rank checks before they are sharded.

    Args:
        accelerator: of this rank.
        max_grad_norm: for DeepSpeed.
    """
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1, gradient_clipping=max_grad_norm
        )
        unset_hf_deepspeed_config()


def check_launch(accelerator: Accelerator) -> None:
    """Refuse ranks or sharding that were asked for and did not come.

    Raises:
        ConfigurationError: that says what was asked for, what came, and what to do.
    """
    environment, ranks = os.environ, accelerator.num_processes
    asked = max(int(environment.get(name, 1)) for name in WORLD_SIZES)
    # This launcher starts one process, and tells it of further ones by an address alone.
    if "ACCELERATE_USE_CPU" in environment and "RANK" not in environment:
        asked = max(asked, 1 + ("MASTER_ADDR" in environment))
    if asked > ranks:
        raise ConfigurationError(
            f"the launch asked for {asked} or more processes and Accelerate runs {ranks}, which "
            "would do the whole work alone; for several on CPUs use torchrun --nproc_per_node "
            f"{asked}, or accelerate launch --config_file examples/accelerate/cpu_ranks.yaml "
            "(distributed_type MULTI_GPU with use_cpu, not MULTI_CPU and not --cpu)"
        )
    for name, kind in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        asked_for = environment.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"
        if asked_for and accelerator.distributed_type != kind:
            raise ConfigurationError(
                f"the launch asked for {name} and Accelerate runs "
                f"{accelerator.distributed_type.value} on {accelerator.device}, where every rank "
                "would hold the whole model: sharding needs one GPU a rank; launch with "
                "examples/accelerate/cpu_ranks.yaml or ddp.yaml"
            )
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or accelerator.state.deepspeed_plugin
    for setting, expected in NEEDED_OF_PLUGINS.items():
        given = getattr(plugin, setting, expected)
        if given != expected:
            raise ConfigurationError(
                f"the launch file sets {setting} to {given}: expected {expected}, since every rank "
                "checks the model before it is sharded; see examples/accelerate/"
            )


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether a rank holds a part of each module, so that ranks meet in every forward."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def exchange_at_the_end(accelerator: Accelerator, module: nn.Module) -> bool:
    """Let ranks meet in the last micro-batch of an optimiser step alone, where modules are whole.

    A rank may then do any number of micro-batches, and do them again.

    Args:
        accelerator: of this rank.
        module: as ``prepare`` returned it.

    Returns:
        Whether they do: there are several ranks, and the module is not sharded.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.forward_sync_buffers = False  # constants, which a forward would broadcast
    return accelerator.num_processes > 1 and not is_sharded(accelerator)


@contextmanager
def micro_step(accelerator: Accelerator, policy: nn.Module, last: bool) -> Iterator[None]:
    """Return the context of one micro-batch's forward and backward.

    Whole modules exchange gradients once an optimiser step, with its last micro-batch. Sharded
    ones do so in every micro-batch, lest a rank hold whole gradients.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.sync_gradients = last  # the engine takes its step with the last one
    with waiting(accelerator.device):
        if last or is_sharded(accelerator):
            yield
        else:
            with accelerator.no_sync(policy):
                yield


def prepare_frozen(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return a module that is not trained, such as a reference, as this rank computes with it.

    Args:
        accelerator: of this rank.
        module: without trainable parameters.
    """
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, module)
    prepared: nn.Module = accelerator.prepare_model(module, evaluation_mode=True)
    return prepared


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """Add the gradient of a share of the loss, to be summed over micro-batches and ranks."""
    accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)


def clip_grad_norm(accelerator: Accelerator, module: nn.Module, max_norm: float) -> float:
    """Scale gradients of a larger norm down to it, and return the norm that they had.

    DeepSpeed has done both by then.

    Args:
        accelerator: of this rank.
        module: as ``prepare`` returned it; sharded or not.
        max_norm: over all parameters and ranks.
    """
    with waiting(accelerator.device):
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return float(accelerator.deepspeed_engine_wrapped.get_global_grad_norm())
        norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        return full_tensor(norm).item()


def all_sum(accelerator: Accelerator, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the sum over ranks of an array of one shape."""
    tensor = torch.as_tensor(np.asarray(values, dtype=np.float64), device=accelerator.device)
    with waiting(accelerator.device):
        return accelerator.reduce(tensor, reduction="sum").cpu().numpy()


def all_gather(accelerator: Accelerator, values: npt.NDArray[Any] | Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of ranks, on this rank's device."""
    with waiting(accelerator.device):
        return accelerator.gather(torch.as_tensor(values, device=accelerator.device))


def all_rollouts(accelerator: Accelerator, batch: Rollout) -> Rollout:
    """Return the responses of all ranks, in the order of ranks, with this rank's times."""
    if accelerator.num_processes == 1:
        return batch
    with waiting(accelerator.device):
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


def wait_for_everyone(accelerator: Accelerator) -> None:
    """Go on when all ranks have come here."""
    with waiting(accelerator.device):
        accelerator.wait_for_everyone()


def all_lists(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """Return the items of all ranks, in the order of ranks."""
    if accelerator.num_processes == 1:
        return items
    with waiting(accelerator.device):
        return gather_object(items)


def shutdown(accelerator: Accelerator) -> None:
    """End trackers and the process group, after all ranks got here.

    Gloo aborts a process that still holds a DDP module when its group is destroyed: drop what
    ``prepare`` returned first.
    """
    wait_for_everyone(accelerator)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.free_memory()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # another run may start in this process
