"""Where the wall time of a training step goes: parts that sum to the whole.

Every second of a thread belongs to one part. What is opened inside another part interrupts it,
except that an evaluation keeps all of its own; what is in none is ``other``. A thread that samples
ahead keeps an account of its own, which is not read: the training thread's has the seconds that it
waited for it. GPU kernels run asynchronously and are counted where they are waited for, unless
``synchronize`` is asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

PARTS = (
    *("sampling", "grading", "env", "scoring", "forward_backward", "exchange", "optimizer"),
    *("sync", "evaluation", "checkpoint", "logging", "other"),
)
"""``scoring`` is of log-probs without gradient; ``exchange`` is of gradients between ranks."""

PREFIX = "time/ledger/"
"""Of the keys in ``metrics.jsonl``."""


class _Account(threading.local):
    """The seconds of a thread since its last lap."""

    def __init__(self) -> None:
        self.synchronize = False
        self.part, self.since = "other", time.perf_counter()
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def switch(self, part: str) -> str:
        """Count the time since the last switch, and return the part that it belongs to."""
        if self.synchronize:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        before, self.part, self.since = self.part, part, now
        return before


_account = _Account()


@contextmanager
def spent_on(part: str) -> Iterator[None]:
    """Count what is done inside as a part, less what parts inside it count.

    Args:
        part: one of ``PARTS``.
    """
    before = _account.switch("evaluation" if _account.part == "evaluation" else part)
    try:
        yield
    finally:
        _account.switch(before)


def synchronize(on: bool) -> None:
    """Wait for the GPU wherever a part of this thread begins or ends, which takes time itself."""
    _account.synchronize = on and torch.cuda.is_available()


def lap() -> dict[str, float]:
    """Return this thread's seconds by part since the last lap, and begin another."""
    _account.switch(_account.part)
    seconds, _account.seconds = _account.seconds, dict.fromkeys(PARTS, 0.0)
    return seconds


def shares(seconds: Mapping[str, float]) -> str:
    """Return the parts in words, the largest first.

    Args:
        seconds: by part, some of them above 0.

    >>> shares({"sampling": 6.1, "forward_backward": 3.0, "other": 0.9, "sync": 0.001})
    '61% sampling, 30% forward and backward, 9% other'
    """
    whole = sum(seconds.values())
    by_size = sorted(seconds.items(), key=lambda item: -item[1])
    named = [(name.replace("forward_", "forward and "), each / whole) for name, each in by_size]
    return ", ".join(f"{share:.0%} {name}" for name, share in named if share >= 0.005)
