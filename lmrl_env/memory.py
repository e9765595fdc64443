"""Memory that runs out: how it is recognised, and what is freed then."""

from __future__ import annotations

import gc

import torch

_ALLOCATORS_SAY = (
    "not enough memory",  # the CPU's, on Linux
    "can't allocate memory",  # the CPU's, elsewhere
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that no memory was left, of a GPU or of the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATORS_SAY)


def release() -> None:
    """Give back what nothing refers to any more, cycles and the allocator's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
