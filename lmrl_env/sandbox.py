"""Runs a Python program that nobody trusts, in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from lmrl_env.errors import ConfigurationError

logger = logging.getLogger(__name__)

SandboxStatus = Literal["ok", "error", "timeout", "output"]

_PROGRAM = str(Path(__file__).with_name("sandbox_program.py"))


class SandboxResult(NamedTuple):
    """What a program did.

    Attributes:
        status: ``ok`` if it ended by itself with exit status 0; ``timeout`` if a limit of time
            ended it; ``output`` if it wrote more than it may; ``error`` for everything else.
        stdout: what it wrote, cut at the limit.
        stderr: likewise; a traceback if it raised.
        returncode: its exit status, or minus the number of the signal that ended it.
    """

    status: SandboxStatus
    stdout: str
    stderr: str
    returncode: int


def run_python(
    source: str,
    *,
    stdin: str = "",
    timeout: float = 2.0,
    wall_timeout: float | None = None,
    memory_limit: int = 2**30,
    output_limit: int = 2**16,
) -> SandboxResult:
    r"""Run a Python program under limits, and return what it wrote.

    The program runs with this interpreter and its installed packages, in an empty temporary
    directory, without the environment variables and the open files of the caller.

    What the kernel enforces on every Unix: processor time, wall clock, memory (not on macOS) and
    the size of every file. Where it is Linux on an x86-64 processor, and lets a process filter its
    system calls, it also refuses sockets, new processes, signals to other processes, and every
    change to the file system; no program can take that off. Where any user may make namespaces,
    the program has no network and cannot read the memory or environment of other processes.
    Elsewhere Python itself refuses the same, which stops an honest mistake but not an attack, and
    a warning says so once.
    Nowhere is a program kept from reading the files that the user of this process may read, and
    nothing here replaces a virtual machine where an attacker, not a model, writes the programs.

    >>> run_python("print(6 * 7)")
    SandboxResult(status='ok', stdout='42\n', stderr='', returncode=0)
    >>> run_python("while True: pass", timeout=0.2).status
    'timeout'
    >>> run_python("import os; os.system('ls')").stderr.splitlines()[-1]
    'PermissionError: not allowed in the sandbox: os.system'

    Args:
        source: the program.
        stdin: what it reads from its standard input, which then ends.
        timeout: seconds of processor time, not counting the start of the interpreter.
        wall_timeout: seconds by the clock; five times ``timeout`` and one more by default.
        memory_limit: bytes of address space, at least some 2**26 for the interpreter itself.
        output_limit: bytes of its standard output, of its standard error, and of any file.

    Raises:
        ConfigurationError: if a limit is not positive.
    """
    if wall_timeout is None:
        wall_timeout = 5 * timeout + 1
    limits = {
        "timeout": timeout,
        "wall_timeout": wall_timeout,
        "memory_limit": memory_limit,
        "output_limit": output_limit,
    }
    if min(limits.values()) <= 0:
        raise ConfigurationError(f"{limits}: expected positive limits, in seconds and bytes")
    warn_unless_filtered()
    return _run(source, stdin, limits)


@functools.cache
def warn_unless_filtered() -> None:
    """Warn, once in a process, where the kernel does not filter a program's system calls."""
    source = "print(*(s for s in open('/proc/self/status') if s.startswith('Seccomp:')))"
    limits = {"timeout": 5.0, "wall_timeout": 20.0, "memory_limit": 2**30, "output_limit": 2**16}
    if _run(source, "", limits).stdout.split() != ["Seccomp:", "2"]:
        logger.warning(
            "the sandbox cannot filter system calls on %s %s: a program that sets out to can open "
            "sockets, start processes and change files of this user; expected Linux on x86-64 with "
            "seccomp. Run here only programs that you trust, or all of it in a container",
            *(platform.system(), platform.machine()),
        )


def _run(source: str, stdin: str, limits: dict[str, Any]) -> SandboxResult:
    """Run a program under limits that are given."""
    wall_timeout, output_limit = limits["wall_timeout"], limits["output_limit"]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-"))
        program, given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in "1234")
        for file, text in ((program, source), (given, stdin)):
            file.write(text.encode("utf-8", "surrogatepass"))
            file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-IB", _PROGRAM, json.dumps(limits), str(program.fileno())],
            stdin=given,
            stdout=out,
            stderr=err,
            cwd=folder,
            env=_environment(folder),
            pass_fds=(program.fileno(),),
            start_new_session=True,
        )
        try:
            returncode = process.wait(wall_timeout + 1)
        except subprocess.TimeoutExpired:
            returncode = -signal.SIGALRM
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stdout, stderr = _content(out, output_limit), _content(err, output_limit)
        is_cut = max(os.fstat(file.fileno()).st_size for file in (out, err)) >= output_limit
    return SandboxResult(_status(returncode, is_cut), stdout, stderr, returncode)


def _environment(folder: str) -> dict[str, str]:
    return {
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _content(file: IO[bytes], limit: int) -> str:
    file.seek(0)
    return file.read(limit).decode("utf-8", "replace")


def _status(returncode: int, is_cut: bool) -> SandboxStatus:
    if is_cut:
        return "output"
    if -returncode in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL):
        return "timeout"
    return "ok" if returncode == 0 else "error"
