"""The program that ``sandbox.run_python`` starts: it gives up its rights, then runs the source.

It is run by its path and imports nothing of the library. Its arguments are the limits as JSON and
the file descriptor of the source.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import linecache
import os
import platform
import resource
import signal
import socket
import struct
import sys
import traceback
import types
from typing import Any

_DENIED = {  # system calls of x86-64 Linux
    "processes": (56, 57, 58, 59, 322),  # clone fork vfork execve execveat
    "signals to others": (62, 129, 200, 234, 297, 424),  # kill tkill tgkill queueinfo pidfd
    "sockets": (41,),
    "files": (76, 82, 83, 84, 85, 86, 87, 88, 133, 258, 259, 263, 264, 265, 266, 316),
    "modes and owners": (90, 91, 92, 93, 94, 260, 268, 452),
    "times and attributes": (132, 188, 189, 190, 197, 198, 199, 235, 261, 280),
    "other processes": (101, 310, 311, 434, 438),
    "the kernel": (155, 165, 166, 272, 308, 321, 323, 425, 428, 429, 430, 442, 248, 249, 250),
}
_CLONE, _OPEN, _OPENAT, _ABSENT = 56, 2, 257, (435, 437)  # clone3 and openat2: as if too new
_CLONE_THREAD = 0x10000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_NAME = "program.py"

_AUDITED = (
    *("socket.connect", "socket.bind", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn"),
    *("os.system", "os.kill", "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir"),
    *("os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
)


def main() -> None:
    """Run the source under the limits."""
    limits, source_fd = json.loads(sys.argv[1]), int(sys.argv[2])
    with open(source_fd, encoding="utf-8", errors="surrogatepass", newline="") as file:
        source = file.read()
    _limit_resources(limits)
    if sys.platform == "linux":
        _leave_namespaces()
        _filter_system_calls()
    sys.addaudithook(_refuse)
    sys.argv = [_NAME]
    sys.excepthook = _report
    linecache.cache[_NAME] = (len(source), None, source.splitlines(True), _NAME)
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    signal.setitimer(signal.ITIMER_REAL, limits["wall_timeout"])
    signal.setitimer(signal.ITIMER_PROF, limits["timeout"])
    exec(compile(source, _NAME, "exec", dont_inherit=True), program.__dict__)


def _limit_resources(limits: dict[str, Any]) -> None:
    """Set the limits that every Unix enforces; macOS refuses that of memory."""
    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, signal.SIG_DFL)
    seconds = int(limits["timeout"]) + 2  # for a program that ignores SIGPROF
    wanted = {
        resource.RLIMIT_AS: limits["memory_limit"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: limits["output_limit"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def _leave_namespaces() -> None:
    """Move to a user and a network namespace of its own, where the system lets any user do it."""
    new_user, new_net, new_ipc = 0x10000000, 0x40000000, 0x08000000
    ctypes.CDLL(None).unshare(new_user | new_net | new_ipc)


def _filter_system_calls() -> None:
    """Have the kernel refuse what ``_DENIED`` lists, and opening a file to write, for good."""
    if platform.machine() != "x86_64":
        return
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    number, architecture, argument = 0, 4, lambda n: 16 + 8 * n
    denied = sorted({call for calls in _DENIED.values() for call in calls} - {_CLONE})
    program = [
        (load, 0, 0, architecture),
        (equal, 1, 0, 0xC000003E),
        (answer, 0, 0, kill),
        (load, 0, 0, number),
        (at_least, 0, 1, 0x40000000),  # the x32 calls
        (answer, 0, 0, refuse),
    ]
    for call in denied:
        program += [(equal, 0, 1, call), (answer, 0, 0, refuse)]
    for call in _ABSENT:
        program += [(equal, 0, 1, call), (answer, 0, 0, absent)]
    for call, which, bits, if_set, if_not in (
        (_CLONE, 0, _CLONE_THREAD, allow, refuse),
        (_OPEN, 1, _WRITES, refuse, allow),
        (_OPENAT, 2, _WRITES, refuse, allow),
    ):
        program += [
            (equal, 0, 4, call),
            (load, 0, 0, argument(which)),
            (any_bit, 0, 1, bits),
            (answer, 0, 0, if_set),
            (answer, 0, 0, if_not),
        ]
    program.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None)
    no_new_privileges, set_seccomp, with_filter = 38, 22, 2
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    libc.prctl(set_seccomp, with_filter, header, 0, 0)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise for what a program in the sandbox has no business doing."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    remote = event == "socket.__new__" and arguments[1] not in (-1, socket.AF_UNIX)
    if event in _AUDITED or writes or remote:
        raise PermissionError(f"not allowed in the sandbox: {event}")


def _report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print an error as the program's own, without the frames of this file."""
    report = traceback.TracebackException(kind, error, trace)
    report.stack[:] = [frame for frame in report.stack if frame.filename != __file__]
    print("".join(report.format()), end="", file=sys.stderr)


if __name__ == "__main__":
    main()
