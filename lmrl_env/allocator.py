"""Memory that tensors leave stays with the process, for the tensors of the next step."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of the parameters in malloc.h


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the system; elsewhere do nothing.

    It would give back every large block at once, and the next tensor would fault its pages in
    again one by one: 9 to 15% of the time of a training step on a CPU at 0.85 M parameters, 1 to 2%
    at 3 M. The process, which this holds for as a whole, then keeps the most memory that it ever
    needed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries lack it
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
