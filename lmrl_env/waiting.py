"""Waits for other ranks: each has a deadline, and a message that names rank and phase.

A collective of a rank whose peer died ends with an error of the backend's, or never. What runs
inside ``waiting`` says instead which rank waited, in which phase, and where the others were seen
last: every rank leaves its phase in the store of the process group.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lmrl_env.errors import RankError

NAMED_AT_MOST = 8
"""Other ranks that a message names."""

WARNED_BEFORE = 0.95
"""Share of the limit after which a wait on a GPU is reported, before NCCL ends the process."""


class _Place:
    """Where this rank is, in the one place that knows."""

    phase = "start"
    limit: float | None = None  # minutes


def begin_waiting(limit: float | None) -> None:
    """Begin a run.

    Args:
        limit: minutes that a rank waits for the others, as messages tell it.
    """
    _Place.phase, _Place.limit = "start", limit


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say what this rank is doing, here and to the other ranks.

    An error leaves the phase as it is, since that is where the rank was seen last.

    Args:
        name: such as ``"sampling"``.
    """
    before = _Place.phase
    _enter(name)
    yield
    _enter(before)


def _enter(name: str) -> None:
    _Place.phase = name
    if dist.is_initialized() and dist.get_world_size() > 1:
        with waiting():
            _get_default_store().set(_key(dist.get_rank()), name)


def _key(rank: int) -> str:
    return f"lmrl_env/phase/{rank}"


@contextmanager
def waiting(device: torch.device | None = None) -> Iterator[None]:
    """Name rank and phase where what is done inside fails for another rank.

    NCCL ends the process when its deadline has passed, and no exception can be caught: there the
    message is printed shortly before.

    Args:
        device: where the wait is.

    Raises:
        RankError: if another rank ended, or did not come within the limit.
    """
    alarm = None
    if device is not None and device.type == "cuda" and _Place.limit is not None:
        alarm = threading.Timer(60 * WARNED_BEFORE * _Place.limit, _warn)
        alarm.daemon = True
        alarm.start()
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RankError(_message(error)) from error
    finally:
        if alarm is not None:
            alarm.cancel()


def _warn() -> None:
    print(_message(None), file=sys.stderr, flush=True)


def _message(error: Exception | None) -> str:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    limit = "" if _Place.limit is None else f" within {_Place.limit:g} minutes (--wait-limit)"
    cause = "" if error is None else f" ({str(error).partition('. This is')[0]})"
    return (
        f"rank {rank} of {ranks}, in the phase {_Place.phase!r}: another rank ended, or did not "
        f"come{limit}; {_others(rank, ranks)}. Read their output above for the first error; go on "
        f"from the last checkpoint with --resume{cause}"
    )


def _others(rank: int, ranks: int) -> str:
    """Return where the other ranks were seen last."""
    seen = []
    try:
        store = _get_default_store()
        for other in range(ranks):
            if other != rank and store.check([_key(other)]):
                seen.append((other, store.get(_key(other)).decode()))
    except RuntimeError:
        return "their phases are unknown, since the rank that kept them is gone"
    elsewhere = [f"rank {other} in {name!r}" for other, name in seen if name != _Place.phase]
    listed = ", ".join(elsewhere[:NAMED_AT_MOST])
    if len(elsewhere) > NAMED_AT_MOST:
        listed += f" and {len(elsewhere) - NAMED_AT_MOST} more"
    return f"last seen: {listed}" if listed else "the others were last seen in the same phase"
