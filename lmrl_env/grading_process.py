"""A worker process of the grading service, as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import IO

from lmrl_env.errors import GradingError
from lmrl_env.verifiers import Status, Verdict

OUT_OF_MEMORY = 86
"""Exit status of a worker that hit its memory limit and may hold on to what filled it."""

WALL_FACTOR = 10
"""Seconds of wall clock that an item may take for each second of processor time."""

_START_SECONDS = 300.0
_SECONDS_PER_BYTE = 1e-6
"""What the largest items take longer to reach a busy worker."""


class WorkerProcess:
    """One process of the pool, as its parent sees it.

    Args:
        verifier: its path ``"module:function"``.
        timeout: seconds of processor time for one item.
        memory_limit: bytes of address space.

    Attributes:
        items: indices of the items that it has and has not answered; it works at the first.
        deadline: when it counts as hung, by the monotonic clock; infinite while it is idle.
        ready: whether it has loaded the verifier.
        ended: whether it will say no more.
    """

    def __init__(self, verifier: str, timeout: float, memory_limit: int):
        self._verifier = verifier
        self._timeout = timeout
        self.items: deque[int] = deque()
        self.deadline = time.monotonic() + _START_SECONDS
        self.ready = False
        self.ended = False
        self._start_error: str | None = None
        self._transfer_seconds = 0.0
        setup = {"verifier": verifier, "timeout": timeout, "memory_limit": memory_limit}
        self._outgoing = bytearray(encode_line(setup))
        self._incoming = bytearray()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lmrl_env.grading_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    dict.fromkeys(str(p) or os.getcwd() for p in sys.path)
                ),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
        self.write()  # it loads the verifier while its parent does other things

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL ended it that was not its parent's."""
        said_why = self._start_error is not None
        return self.ended and not said_why and self._process.returncode == -signal.SIGKILL

    def send(self, chunk: dict[int, bytes]) -> None:
        """Give it items to work at, by index."""
        self.items.extend(chunk)
        self._outgoing += b"".join(chunk.values())
        self._transfer_seconds = _SECONDS_PER_BYTE * sum(map(len, chunk.values()))
        self._set_deadline()
        self.write()

    def _set_deadline(self) -> None:
        seconds = WALL_FACTOR * self._timeout + self._transfer_seconds
        self.deadline = time.monotonic() + seconds if self.items else math.inf

    def register(self, selector: selectors.BaseSelector) -> None:
        """Wait for what it says, and for room in its pipe if there is more to tell it."""
        stdin, stdout = self._pipes
        selector.register(stdout, selectors.EVENT_READ)
        if self._outgoing:
            selector.register(stdin, selectors.EVENT_WRITE)

    def write(self) -> None:
        """Write as much as the pipe takes."""
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._pipes[0].fileno(), self._outgoing)]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it died, and reading will tell
            self._outgoing.clear()

    def receive(self) -> dict[int, Verdict]:
        """Return the verdicts that have come since, by index."""
        self.write()
        self._read()
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = rest
        verdicts = {}
        for line in lines:
            value = json.loads(line)
            if not self.ready:
                if value is not None:
                    self._start_error = value
                    self.ended = True
                    break
                self.ready = True
            else:
                verdicts[self.items.popleft()] = Verdict(*value)
            self._set_deadline()
        return verdicts

    def _read(self) -> None:
        try:
            while data := os.read(self._pipes[1].fileno(), 1 << 16):
                self._incoming += data
            self.ended = True
        except BlockingIOError:
            pass

    def stop(self) -> None:
        """Kill it and every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in self._pipes:
            pipe.close()

    def bury(self) -> dict[int, Verdict]:
        """Stop a worker that failed, and return the verdict on the item that it failed at.

        Raises:
            GradingError: if it failed before it was ready, unless it was killed from outside.
        """
        self.stop()
        code = self._process.returncode
        status: Status
        if not self.ready and not self.was_killed:
            raise GradingError(
                f"a worker for the verifier {self._verifier} did not start: "
                f"{self._start_error or 'it said nothing'} "
                f"(exit status {code}). Check that 'import {self._verifier.partition(':')[0]}' "
                "works in a new Python process, and within the memory limit"
            )
        if not self.items:
            return {}
        if not self.ended:
            status, why = "timeout", f"no verdict in {WALL_FACTOR * self._timeout:g} s"
        elif code == -signal.SIGPROF:
            status, why = "timeout", f"more than {self._timeout:g} s of processor time"
        elif code == OUT_OF_MEMORY:
            status, why = "crash", "out of memory"
        else:
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            status, why = "crash", f"the worker died: {how}"
        return {self.items.popleft(): Verdict(0.0, status, detail=why)}


def encode_line(value: object) -> bytes:
    """Return one line of JSON."""
    return json.dumps(value).encode() + b"\n"


def wait(pool: Sequence[WorkerProcess]) -> None:
    """Wait until a worker says something, can be told more, or is overdue."""
    with selectors.DefaultSelector() as selector:
        for worker in pool:
            worker.register(selector)
        deadline = min(worker.deadline for worker in pool)
        seconds = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        selector.select(seconds)
