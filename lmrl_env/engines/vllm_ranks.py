"""What the ranks of a run tell each other when they share vLLM servers."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from lmrl_env.waiting import waiting

T = TypeVar("T")


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Return whether this is rank 0, or the only one."""
    return not _several() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if _several():
        with waiting():
            dist.barrier()


def from_first(value: T) -> T:
    """Return rank 0's value on every rank."""
    if not _several():
        return value
    values = [value]
    with waiting():
        dist.broadcast_object_list(values, src=0)
    return values[0]
