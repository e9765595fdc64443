"""Tensors of which every rank holds a part, made whole one after another.

They are those of plain modules, of modules under DDP, of FSDP2 (``DTensor``) and of DeepSpeed's
ZeRO-3. What is whole already is returned as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lmrl_env.waiting import waiting

if TYPE_CHECKING:
    from accelerate import Accelerator

ZERO3_STATE = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, besides the count of its steps."""


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor of which ranks may hold parts, whole and detached; every rank calls."""
    if isinstance(tensor, DTensor):
        with waiting(tensor.device):
            return tensor.detach().full_tensor()  # type: ignore[attr-defined]
    if hasattr(tensor, "ds_id"):  # a parameter under ZeRO-3
        import deepspeed

        with waiting(tensor.device), deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of a module's state dict, whole, one after another; every rank calls.

    Only one of them that was not there before exists at a time.

    Args:
        module: whole or sharded, without the wrapper of ``prepare``.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield name, full_tensor(tensor)


def load_full_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the entries of a state dict, which every rank has whole, into a module.

    Args:
        module: whole or sharded by FSDP2, without the wrapper of ``prepare``.
        tensors: by the names of its state dict; of tied ones one is enough.

    Raises:
        LookupError: if one is missing or unknown.
    """
    state = module.state_dict()
    if missing := sorted(names_once(module) - tensors.keys()):
        raise LookupError(f"without {missing[:5]} ({len(missing)} tensors)")
    for name, tensor in tensors.items():
        state[name].copy_(_part_like(state[name], tensor))


def names_once(module: nn.Module) -> set[str]:
    """Return the names of a module's state dict, of tensors that are tied to each other one."""
    once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return once & module.state_dict().keys()


def full_optimizer_state(
    accelerator: Accelerator, policy: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return an optimiser's state, whole and on the CPU, on the first rank; every rank calls.

    Args:
        accelerator: of this rank.
        policy: that it optimises, as ``prepare`` returned it.
        optimizer: as ``prepare`` returned it.

    Returns:
        Tensors by ``"INDEX.NAME"``, the place among the parameters that are trained and the
        state's name; nothing on the other ranks.
    """
    state = {}
    for key, value in _state_entries(policy, optimizer):
        whole = full_tensor(value)
        if accelerator.is_main_process:
            state[key] = whole.cpu().contiguous()
    return state


def _state_entries(
    policy: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    if not _is_zero3(policy):
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                yield f"{index}.{name}", value
        return
    from deepspeed.utils import safe_get_full_optimizer_state

    for i, parameter in enumerate(_trained(policy)):
        yield f"{i}.step", torch.as_tensor(_zero3_entries(optimizer)[0]["step"])
        for name in ZERO3_STATE:
            yield f"{i}.{name}", safe_get_full_optimizer_state(parameter, name)


def load_full_optimizer_state(
    policy: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Put an optimiser's state back, its hyper-parameters left as they are.

    Args:
        policy: that it optimises, as ``prepare`` returned it.
        optimizer: as ``prepare`` returned it; how its module is sharded may have changed.
        state: as ``full_optimizer_state`` returned it, on every rank.
    """
    parameters = _trained(policy)
    if _is_zero3(policy):
        from deepspeed.utils import safe_set_full_optimizer_state

        for i, parameter in enumerate(parameters):
            for name in ZERO3_STATE:
                safe_set_full_optimizer_state(parameter, state[f"{i}.{name}"], name)
        for entry in _zero3_entries(optimizer):
            entry["step"] = state["0.step"].clone()
        return
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, name = key.split(".", 1)
        own = parameters[int(index)]
        if value.shape == own.shape:  # a count of steps is not sharded
            value = _part_like(own, value)
        entries.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _trained(policy: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def _is_zero3(policy: nn.Module) -> bool:
    return hasattr(next(policy.parameters()), "ds_id")


def _zero3_entries(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the entries of the AdamW under DeepSpeed's and Accelerate's wrappers."""
    return list(optimizer.optimizer.optimizer.state.values())  # type: ignore[attr-defined]


def _part_like(own: Tensor, whole: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, as it holds its own."""
    if not isinstance(own, DTensor):
        return whole
    whole = whole.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
