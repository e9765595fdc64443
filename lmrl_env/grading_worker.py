"""The program that a ``Grader`` runs in each of its worker processes.

It reads items and writes verdicts, one JSON value a line. The first line it reads is the setup,
the first it writes an error, or null when it is ready.
"""

from __future__ import annotations

import json
import math
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, get_args

from lmrl_env.grading_process import OUT_OF_MEMORY
from lmrl_env.types import Question
from lmrl_env.verifiers import Status, Verdict, Verifier
from lmrl_env.verifiers.paths import load_verifier


def main() -> None:
    """Answer until the parent closes the pipe or dies."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # clusters send it to all: the parent decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # a verifier that prints must not write into the protocol
    lines = read_lines(0)
    setup = json.loads(next(lines))
    try:
        limit_memory(setup["memory_limit"])
        verifier = load(setup["verifier"])
    except Exception as error:
        reply(replies, f"{type(error).__name__}: {error}")
        return
    os.dup2(silence, 2)
    reply(replies, None)
    for line in lines:
        response, answer, question = json.loads(line)
        # The kernel ends the process at its limit of processor time, whatever it is doing then.
        signal.setitimer(signal.ITIMER_PROF, setup["timeout"])
        verdict = judge(verifier, response, answer, question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(replies, verdict)


def read_lines(fd: int) -> Iterator[bytes]:
    """Yield lines as they come; end the process when there will be no more.

    A thread reads, so that the parent never waits for a busy worker to take its input, and so
    that a worker ends with its parent even in the middle of an item.
    """
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        with os.fdopen(fd, "rb", closefd=False) as pipe:
            for line in pipe:
                lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def limit_memory(limit: int) -> None:
    """Limit the address space in bytes, where the system can: macOS refuses."""
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def load(path: str) -> Verifier:
    """Import a verifier, and let its module load what it needs if it has a ``warm_up``."""
    verifier = load_verifier(path)
    module = sys.modules[getattr(verifier, "func", verifier).__module__]
    if hasattr(module, "warm_up"):
        module.warm_up()
    return verifier


def judge(
    verifier: Verifier, response: str, answer: str | list[str], question: dict[str, Any] | None
) -> Verdict:
    """Return the verifier's verdict; an error of the verifier is a verdict too."""
    golds = answer if isinstance(answer, str) else tuple(answer)
    row = None if question is None else Question(**{**question, "answer": golds})
    try:
        verdict = verifier(response, golds, question=row)
        check(verdict)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except (Exception, SystemExit) as error:
        return Verdict(0.0, "crash", detail=f"{type(error).__name__}: {error}"[:1000])
    return verdict._replace(score=float(verdict.score))


def check(verdict: object) -> None:
    """Raise TypeError unless a verifier returned what it should."""
    if not (
        isinstance(verdict, Verdict)
        and math.isfinite(verdict.score)
        and verdict.status in get_args(Status)
        and isinstance(verdict.extracted, str | None)
        and isinstance(verdict.detail, str)
    ):
        raise TypeError(
            f"the verifier returned {verdict!r}: expected a Verdict with a finite score, a status "
            f"among {get_args(Status)}, and text"
        )


def reply(fd: int, value: object) -> None:
    """Write one line."""
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()
