"""The grading service: a verifier in worker processes that are killed at their deadline.

The workers are programs of their own, started by name and spoken to in lines of JSON, so that
grading works from an unguarded script, a notebook, a thread, and under any start method.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import IO

from lmrl_env.errors import ConfigurationError, GradingError
from lmrl_env.grading_worker import OUT_OF_MEMORY
from lmrl_env.types import Question
from lmrl_env.verifiers import Verdict, Verifier

_START_SECONDS = 120.0
_WALL_FACTOR = 10
_LONGEST_CHUNK = 32


class Grader:
    r"""Runs a verifier in worker processes that can neither hang nor crash the caller.

    The deadline of an item is measured in processor time that the worker spends on it, and the
    kernel enforces it: a verdict does not depend on how busy the machine is. A verifier that
    waits instead of computing is stopped after ten times as many seconds of wall clock. Either
    gives the status ``timeout``. An exception, or a worker that dies, gives ``crash`` for that
    item alone. A stopped worker is replaced; its start, and the ``warm_up()`` of the verifier's
    module where there is one, count against no item.

    >>> with Grader("lmrl_env.verifiers:boxed_math", workers=1) as grader:
    ...     verdicts = grader.grade([r"It is \boxed{4}.", "It is 4."], ["4", "4"])
    >>> [verdict.status for verdict in verdicts]
    ['correct', 'unparseable']

    Args:
        verifier: a function at the top level of an importable module, or its path
            ``"module:function"``.
        workers: number of processes; they start with the first batch, or with ``start``.
        timeout: seconds of processor time for one item.
        memory_limit: bytes of address space of one worker, where the system can limit it.

    Raises:
        ConfigurationError: if the verifier cannot be imported by name, or a number is not
            positive.
    """

    def __init__(
        self,
        verifier: Verifier | str,
        *,
        workers: int = 2,
        timeout: float = 2.0,
        memory_limit: int = 4 * 2**30,
    ):
        if workers < 1 or timeout <= 0 or memory_limit <= 0:
            raise ConfigurationError(
                f"workers={workers}, timeout={timeout}, memory_limit={memory_limit}: expected at "
                "least one worker, and positive seconds and bytes"
            )
        self.verifier = verifier_path(verifier)
        self.workers = workers
        self.timeout = timeout
        self.memory_limit = memory_limit
        self.closed = False
        self._adopt()

    def _adopt(self) -> None:
        """Begin without workers: those of a process that this one was forked from are not ours."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._pid)

    def start(self) -> None:
        """Start the workers that are not running, without waiting for them.

        Raises:
            GradingError: if the grader has been closed.
        """
        if self.closed:
            raise GradingError(f"the grader of {self.verifier} has been closed: create another one")
        if self._pid != os.getpid():
            self._adopt()
        with self._lock:
            self._pool[:] = [worker for worker in self._pool if worker.alive]
            self._fill_pool()

    def grade(
        self,
        responses: Sequence[str],
        answers: Sequence[str | Sequence[str]],
        questions: Sequence[Question | None] | None = None,
    ) -> list[Verdict]:
        """Judge a batch of responses.

        Args:
            responses: the texts to judge.
            answers: the gold answer, or answers, of each.
            questions: the row of each, for verifiers that need it.

        Returns:
            The verdicts, in the order of the responses.

        Raises:
            ConfigurationError: if the arguments are not equally long.
            GradingError: if the grader has been closed, or its workers cannot start.
        """
        rows = [None] * len(responses) if questions is None else questions
        if not len(responses) == len(answers) == len(rows):
            raise ConfigurationError(
                f"{len(responses)} responses, {len(answers)} answers and {len(rows)} questions: "
                "expected one of each for every item"
            )
        self.start()
        items = [
            _encode([response, answer, row and {**row._asdict(), "extra": dict(row.extra)}])
            for response, answer, row in zip(responses, answers, rows, strict=True)
        ]
        with self._lock:
            try:
                return self._grade(items)
            except BaseException:  # answers under way would be taken for the next batch's
                _stop_all(self._pool, self._pid)
                raise

    def close(self) -> None:
        """Stop the workers; a second call does nothing."""
        self.closed = True
        self._finalizer()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill_pool(self) -> None:
        setup = {
            "verifier": self.verifier,
            "timeout": self.timeout,
            "memory_limit": self.memory_limit,
        }
        while len(self._pool) < self.workers:
            self._pool.append(_Worker(_encode(setup)))

    def _grade(self, items: list[bytes]) -> list[Verdict]:
        """Deal the items out to the workers in chunks, and replace the workers that fail."""
        verdicts: dict[int, Verdict] = {}
        todo = deque(range(len(items)))
        while len(verdicts) < len(items):
            for worker in self._pool:
                if worker.ready and not worker.items and todo:
                    size = min(_LONGEST_CHUNK, 1 + len(todo) // (2 * self.workers))
                    chunk = [todo.popleft() for _ in range(min(size, len(todo)))]
                    worker.send(chunk, items, self.timeout * _WALL_FACTOR)
            _wait(self._pool)
            for worker in list(self._pool):
                verdicts.update(worker.receive(self.timeout * _WALL_FACTOR))
                if worker.ended or time.monotonic() > worker.deadline:
                    self._pool.remove(worker)
                    verdicts.update(worker.bury(self.verifier, self.timeout))
                    todo.extendleft(reversed(worker.items))
            self._fill_pool()
        return [verdicts[i] for i in range(len(items))]


class _Worker:
    """One process of the pool, as its parent sees it.

    Attributes:
        items: indices of the items that it has and has not answered; it works at the first.
        deadline: when it counts as hung, by the monotonic clock; infinite while it is idle.
        ready: whether it has loaded the verifier.
        ended: whether it will say no more.
    """

    def __init__(self, setup: bytes):
        self.items: deque[int] = deque()
        self.deadline = time.monotonic() + _START_SECONDS
        self.ready = False
        self.ended = False
        self._start_error = "it said nothing"
        self._outgoing = bytearray(setup)
        self._incoming = bytearray()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lmrl_env.grading_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, chunk: list[int], items: list[bytes], wall_seconds: float) -> None:
        """Give it items to work at."""
        self.items.extend(chunk)
        self._outgoing += b"".join(items[i] for i in chunk)
        self.deadline = time.monotonic() + wall_seconds
        self.write()

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

    def receive(self, wall_seconds: float) -> dict[int, Verdict]:
        """Return the verdicts that have come since, by item."""
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
            self.deadline = time.monotonic() + wall_seconds if self.items else math.inf
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

    def bury(self, verifier: str, timeout: float) -> dict[int, Verdict]:
        """Stop a worker that failed, and return the verdict on the item that it failed at.

        Raises:
            GradingError: if it failed before it was ready.
        """
        self.stop()
        code = self._process.returncode
        if not self.ready:
            raise GradingError(
                f"a worker for the verifier {verifier} did not start: {self._start_error} (exit "
                f"status {code}). Check that 'import {verifier.partition(':')[0]}' works in a new "
                "Python process, within the memory limit"
            )
        if not self.items:
            return {}
        if not self.ended:
            verdict = Verdict(0.0, "timeout", detail=f"no verdict in {_WALL_FACTOR * timeout:g} s")
        elif code == -signal.SIGPROF:
            verdict = Verdict(0.0, "timeout", detail=f"more than {timeout:g} s of processor time")
        elif code == OUT_OF_MEMORY:
            verdict = Verdict(0.0, "crash", detail="out of memory")
        else:
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            verdict = Verdict(0.0, "crash", detail=f"the worker died: {how}")
        return {self.items.popleft(): verdict}


def _wait(pool: Sequence[_Worker]) -> None:
    """Wait until a worker says something, can be told more, or is overdue."""
    with selectors.DefaultSelector() as selector:
        for worker in pool:
            worker.register(selector)
        deadline = min(worker.deadline for worker in pool)
        seconds = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        selector.select(seconds)


def _stop_all(pool: list[_Worker], pid: int) -> None:
    """Stop the workers of a pool, in the process that started them."""
    if os.getpid() == pid:
        while pool:
            pool.pop().stop()


def _encode(value: object) -> bytes:
    """Return one line of JSON."""
    return json.dumps(value).encode() + b"\n"


def verifier_path(verifier: Verifier | str) -> str:
    """Return the path ``"module:function"`` that a worker imports a verifier by.

    Raises:
        ConfigurationError: if there is no such path.
    """
    if isinstance(verifier, str):
        path = verifier
    else:
        path = f"{verifier.__module__}:{getattr(verifier, '__qualname__', type(verifier).__name__)}"
    module, _, name = path.partition(":")
    if module == "__main__":
        raise ConfigurationError(
            f"the verifier {path} is defined in the program or notebook that is running, which a "
            "worker process must not run again: move it to a module of its own and import it"
        )
    if not re.fullmatch(r"[\w.]+:\w+", path):
        raise ConfigurationError(
            f"the verifier {path!r} cannot be imported by name: expected a function at the top "
            "level of a module, or its path 'module:function'"
        )
    if callable(verifier) and getattr(sys.modules.get(module), name, None) is not verifier:
        raise ConfigurationError(
            f"the verifier {path} is not what its module holds under that name: expected a "
            "function at the top level of a module"
        )
    return path


_shared: dict[tuple[str, int, float], Grader] = {}


def shared_grader(verifier: Verifier | str, *, workers: int = 2, timeout: float = 2.0) -> Grader:
    """Return the process's one grader of a verifier, which ends with the process.

    Args:
        verifier: see ``Grader``.
        workers: see ``Grader``.
        timeout: see ``Grader``.
    """
    key = verifier_path(verifier), workers, timeout
    if key not in _shared or _shared[key].closed:
        _shared[key] = Grader(verifier, workers=workers, timeout=timeout)
    return _shared[key]
