"""What this machine can do at most: its measured rates of multiplying and of copying."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

SIDE, COPIED_BYTES, REPEATS = 1024, 1 << 26, 9


def best_seconds(call: Callable[[], object]) -> float:
    """Return the least time of several calls, after one to warm up."""
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def matmul_flops_per_s() -> float:
    """Return the rate of float32 products of square matrices, by the faster of two libraries."""
    a, b = torch.randn(2, SIDE, SIDE)
    with torch.inference_mode():
        seconds = [best_seconds(lambda: a @ b)]
        if torch.backends.mkldnn.is_available():
            multiply = torch.ops.mkldnn._linear_pointwise
            seconds.append(best_seconds(lambda: multiply(a, b, None, "none", [], "")))
    return 2 * SIDE**3 / min(seconds)


def copied_bytes_per_s() -> float:
    """Return bytes read and written a second by a copy far larger than the caches, one thread."""
    source = np.ones(COPIED_BYTES, dtype=np.uint8)
    target = np.empty_like(source)
    return 2 * COPIED_BYTES / best_seconds(lambda: np.copyto(target, source))


def of_work(how: str, *, flops: float = 0.0, moved_bytes: float = 0.0) -> dict[str, Any]:
    """Return the least seconds that some work takes here, and what they are computed of.

    Args:
        how: in words, what was counted.
        flops: of its matrix products.
        moved_bytes: read and written.
    """
    matmul, copy = matmul_flops_per_s(), copied_bytes_per_s()
    return {
        "seconds": max(flops / matmul, moved_bytes / copy),
        "flops": flops,
        "matmul_flops_per_s": matmul,
        "moved_bytes": moved_bytes,
        "copied_bytes_per_s": copy,
        "how": f"the larger of FLOPs over the matmul rate and bytes over the copy rate: {how}",
    }
