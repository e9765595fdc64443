"""The grading service: a verifier in worker processes that are killed at their deadline.

The workers are programs of their own, started by name and spoken to in lines of JSON, so that
grading works from an unguarded script, a notebook, a thread, and under any start method.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence

from lmrl_env.errors import ConfigurationError, GradingError
from lmrl_env.grading_process import WorkerProcess, encode_line, wait
from lmrl_env.ledger import spent_on
from lmrl_env.types import Question
from lmrl_env.verifiers import Status, Verdict, Verifier, verdict_at_once
from lmrl_env.verifiers.paths import verifier_path

LOST_STARTS = 8
"""Workers in a row that may be killed from outside before they are ready."""

_LONGEST_CHUNK = 32
_LARGEST_CHUNK = 1 << 16
"""Bytes of items sent together: to read the next ones would count against a heavy first one."""


class Grader:
    r"""Runs a verifier in worker processes that can neither hang nor crash the caller.

    The deadline of an item is measured in processor time that the worker spends on it, and the
    kernel enforces it: a verdict does not depend on how busy the machine is. A verifier that
    waits instead of computing is stopped after ten times as many seconds of wall clock. Either
    gives the status ``timeout``. An exception, or a worker that dies, gives ``crash`` for that
    item alone; after a SIGKILL, as the system sends where memory runs out, another worker tries
    it once more. A stopped worker is replaced; its start, and the ``warm_up()`` of the verifier's
    module where there is one, count against no item. What a look can settle, such as a response
    without an answer, is settled without a worker (``verifiers.verdict_at_once``).

    >>> with Grader("lmrl_env.verifiers:boxed_math", workers=1) as grader:
    ...     verdicts = grader.grade([r"It is \boxed{4}.", "It is 4."], ["4", "4"])
    >>> [verdict.status for verdict in verdicts]
    ['correct', 'unparseable']

    Args:
        verifier: a function at the top level of an importable module, a ``functools.partial`` of
            one, or its path, such as ``"my_module:mine"`` or ``"numeric(tolerance=0.01)"``; see
            ``verifiers.paths.verifier_path``.
        workers: number of processes; they start with the first batch, or with ``start``.
        timeout: seconds of processor time for one item.
        memory_limit: bytes of address space of one worker, where the system can limit it.

    Attributes:
        counts: how many verdicts of each status it has given.

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
        self.counts: Counter[Status] = Counter()
        self.closed = False
        self._adopt()

    def _adopt(self) -> None:
        """Begin without workers: those of a process that this one was forked from are not ours."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool: list[WorkerProcess] = []
        self._finalizer = weakref.finalize(self, _stop_all, self._pool, self._pid)

    def start(self) -> None:
        """Start the workers that are not running, without waiting for them.

        Raises:
            GradingError: if the grader has been closed.
        """
        with self._own_lock():
            self._start()

    @spent_on("grading")
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
        verdicts: dict[int, Verdict] = {}
        items: dict[int, bytes] = {}
        for i, (response, answer, row) in enumerate(zip(responses, answers, rows, strict=True)):
            verdict = verdict_at_once(self.verifier, response, answer)
            if verdict is not None:
                verdicts[i] = verdict
            else:
                question = row and {**row._asdict(), "extra": dict(row.extra)}
                items[i] = encode_line([response, answer, question])
        with self._own_lock():
            self._start()
            try:
                verdicts.update(self._grade(items))
            except BaseException:  # answers under way would be taken for the next batch's
                _stop_all(self._pool, self._pid)
                raise
            self.counts.update(verdict.status for verdict in verdicts.values())
        return [verdicts[i] for i in range(len(verdicts))]

    def close(self) -> None:
        """Stop the workers; a second call does nothing."""
        with self._own_lock():
            self.closed = True
            self._finalizer()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own_lock(self) -> threading.Lock:
        if self._pid != os.getpid():
            self._adopt()
        return self._lock

    def _start(self) -> None:
        if self.closed:
            raise GradingError(f"the grader of {self.verifier} has been closed: create another one")
        self._pool[:] = [worker for worker in self._pool if worker.alive]
        self._fill_pool()

    def _fill_pool(self) -> None:
        while len(self._pool) < self.workers:
            self._pool.append(WorkerProcess(self.verifier, self.timeout, self.memory_limit))

    def _grade(self, items: dict[int, bytes]) -> dict[int, Verdict]:
        """Deal the items out to the workers, and replace the workers that fail."""
        verdicts: dict[int, Verdict] = {}
        todo = deque(items)
        tried_again: set[int] = set()
        lost_starts = 0
        while len(verdicts) < len(items):
            for worker in self._pool:
                if worker.ready and not worker.items and todo:
                    worker.send(self._take_chunk(todo, items))
            wait(self._pool)
            for worker in list(self._pool):
                verdicts.update(worker.receive())
                lost_starts = 0 if worker.ready else lost_starts
                if worker.ended or time.monotonic() > worker.deadline:
                    self._pool.remove(worker)
                    failed = worker.bury()
                    todo.extendleft(reversed(worker.items))
                    if worker.was_killed and not tried_again.issuperset(failed):
                        tried_again.update(failed)
                        todo.extendleft(failed)
                    else:
                        verdicts.update(failed)
                    lost_starts += not worker.ready
                    if lost_starts > LOST_STARTS:
                        raise GradingError(
                            f"{lost_starts} workers for the verifier {self.verifier} in a row were "
                            "killed before they were ready: expected one to start; is memory "
                            "running out, or a process killing them?"
                        )
            self._fill_pool()
        return verdicts

    def _take_chunk(self, todo: deque[int], items: dict[int, bytes]) -> dict[int, bytes]:
        """Take items off the list: many while many are left, so that all workers end together."""
        longest = min(_LONGEST_CHUNK, 1 + len(todo) // (2 * self.workers))
        chunk: dict[int, bytes] = {}
        size = 0
        while todo and len(chunk) < longest:
            size += len(items[todo[0]])
            if chunk and size > _LARGEST_CHUNK:
                break
            i = todo.popleft()
            chunk[i] = items[i]
        return chunk


def _stop_all(pool: list[WorkerProcess], pid: int) -> None:
    """Stop the workers of a pool, in the process that started them."""
    if os.getpid() == pid:
        while pool:
            pool.pop().stop()


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
