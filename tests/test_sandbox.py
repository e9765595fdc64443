"""What a program in the sandbox may do, and what it may not."""

import contextlib
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env import sandbox
from lmrl_env.errors import ConfigurationError
from lmrl_env.sandbox import run_python

FILTERED = sys.platform == "linux" and platform.machine() == "x86_64"
needs_filter = pytest.mark.skipif(not FILTERED, reason="the filter is for x86-64 Linux")


def last_line(result):
    return result.stderr.strip().splitlines()[-1]


def test_a_program_reads_its_input_and_writes_its_output():
    result = run_python("import sys\nprint(input() + sys.stdin.read())", stdin="one\ntwo ☃\0")
    assert result == ("ok", "onetwo ☃\0\n", "", 0)


def test_its_input_is_empty_by_default():
    assert run_python("import sys; print(repr(sys.stdin.read()))").stdout == "''\n"


@pytest.mark.parametrize(
    ("source", "returncode", "error"),
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("x = (", 1, "SyntaxError: '(' was never closed"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import os; os._exit(4)", 4, ""),
        ("def f(): f()\nf()", 1, "RecursionError: maximum recursion depth exceeded"),
        # a ValueError before Python 3.11.4
        ("'\0'", 1, "Error: source code string cannot contain null bytes"),
    ],
)
def test_a_failure_is_an_error_with_its_exit_status(source, returncode, error):
    result = run_python(source)
    assert (result.status, result.returncode) == ("error", returncode)
    assert last_line(result).endswith(error) if error else result.stderr == ""


def test_a_traceback_shows_the_program_and_nothing_of_the_sandbox():
    lines = run_python("def f():\n    open('x', 'w')\nf()").stderr.splitlines()
    assert [line.strip() for line in lines if "^" not in line] == [
        "Traceback (most recent call last):",
        'File "program.py", line 3, in <module>',
        "f()",
        'File "program.py", line 2, in f',
        "open('x', 'w')",
        "PermissionError: not allowed in the sandbox: open",
    ]


def test_it_runs_as_the_main_module():
    source = "import dataclasses, sys\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
    result = run_python(source + "print(__name__, A(1), sys.modules['__main__'].A is A, sys.argv)")
    assert result.stdout == "__main__ A(x=1) True ['program.py']\n"


@pytest.mark.parametrize(
    "source",
    [
        "import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\nwhile True: pass",
        "9 ** 9 ** 9",
        "import re; re.fullmatch('(a*)*b', 'a' * 50)",
    ],
)
def test_computing_for_ever_is_a_timeout(source):
    start = time.monotonic()
    result = run_python(source, timeout=0.2, wall_timeout=2.0)
    assert result.status == "timeout"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("guard", ["", "signal.signal(signal.SIGALRM, signal.SIG_IGN);"])
def test_waiting_for_ever_is_a_timeout(guard):
    start = time.monotonic()
    source = f"import signal, time; {guard} time.sleep(1000)"
    assert run_python(source, timeout=0.2, wall_timeout=0.3).status == "timeout"
    assert 0.3 <= time.monotonic() - start < 10


def test_the_limit_of_processor_time_is_precise():
    result = run_python("while True: pass", timeout=0.2)
    assert (result.status, result.returncode) == ("timeout", -signal.SIGPROF)


def test_waiting_counts_against_the_clock_only():
    assert run_python("import time; time.sleep(0.5)", timeout=0.2).status == "ok"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS refuses a limit of memory")
def test_memory_is_limited():
    hog = "x = bytearray({})\nprint(len(x))"
    assert run_python(hog.format(10**8), memory_limit=2**29).status == "ok"
    result = run_python(hog.format(10**9), memory_limit=2**29)
    assert (result.status, last_line(result)) == ("error", "MemoryError")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_cut_at_its_limit(stream):
    source = f"import sys\nwhile True: sys.{stream}.write('x' * 99)"
    result = run_python(source, output_limit=5000)
    assert result.status == "output"
    assert getattr(result, stream)[:4000] == "x" * 4000
    assert len(result.stdout) <= 5000 and len(result.stderr) <= 5000


def test_the_folder_is_empty_and_goes_away():
    result = run_python("import os; print(os.listdir()); print(os.getcwd())")
    listing, folder = result.stdout.splitlines()
    assert listing == "[]"
    assert not Path(folder).exists()


def test_no_secret_of_the_environment_is_there(monkeypatch):
    monkeypatch.setenv("API_KEY", "hunter2")
    result = run_python("import os; print(sorted(os.environ))")
    assert "API_KEY" not in result.stdout and "HOME" in result.stdout


def test_no_open_file_of_the_caller_is_there(tmp_path):
    with open(tmp_path / "secret", "w") as file:
        os.set_inheritable(file.fileno(), True)
        source = "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in range(3, 64) "
        source += "if os.path.exists(f'/proc/self/fd/{n}')])"
        assert "secret" not in run_python(source).stdout


FORBIDDEN = {
    "a socket": "import socket; socket.socket()",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "a request": "import urllib.request as r; r.urlopen('http://127.0.0.1:{port}')",
    "a fork": "import os; os.fork()",
    "a command": "import os; assert os.system('touch {file}') == 0",
    "a process": "import subprocess; subprocess.run(['touch', '{file}'], check=True)",
    "another program": "import os; os.execv('/bin/touch', ['touch', '{file}'])",
    "a file to write": "open('{file}', 'w').write('x')",
    "a file in its folder": "open('x', 'w')",
    "a deletion": "import os; os.remove('{victim}')",
    "deletions": "import shutil; shutil.rmtree('{folder}')",
    "a new name": "import os; os.rename('{victim}', '{file}')",
    "a new mode": "import os; os.chmod('{victim}', 0)",
    "a kill": "import os; os.kill({pid}, 9)",
}
BENEATH = {  # without the functions of Python that could refuse
    "a socket": "assert libc.socket(2, 1, 0) >= 0",
    "a fork": "assert libc.fork() >= 0",
    "a command": "assert libc.system(b'touch {file}') == 0",
    "another program": "libc.execl(b'/bin/true', b'true', None); 1 / 0",
    "a file to write": "assert libc.open(b'{file}', 0o102, 0o600) >= 0",
    "an old call to write": "assert libc.syscall(2, b'{file}', 0o101, 0o600) >= 0",
    "a file cut": "assert libc.truncate(b'{victim}', 0) == 0",
    "a deletion": "assert libc.unlink(b'{victim}') == 0",
    "a kill": "assert libc.kill({pid}, 9) == 0",
}


@pytest.fixture
def surroundings(tmp_path):
    """Something to destroy, a server to call, and a process to kill."""
    victim = tmp_path / "victim"
    victim.write_text("alive")
    called = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            with contextlib.suppress(OSError):
                called.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        yield {
            "port": server.getsockname()[1],
            "file": tmp_path / "made",
            "victim": victim,
            "folder": tmp_path,
            "pid": bystander.pid,
        }
        assert not called
        assert bystander.poll() is None
        bystander.communicate(b"\n")
    assert victim.read_text() == "alive" and victim.stat().st_mode & 0o400
    assert list(tmp_path.iterdir()) == [victim]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_it_may_not_have(what, surroundings):
    result = run_python(FORBIDDEN[what].format(**surroundings))
    assert result.status == "error"
    refusals = r"PermissionError|AssertionError|.*not allowed in the sandbox"
    assert re.match(refusals, last_line(result))


@needs_filter
@pytest.mark.parametrize("what", BENEATH)
def test_the_kernel_refuses_too(what, surroundings):
    source = "import ctypes; libc = ctypes.CDLL(None)\n" + BENEATH[what]
    assert run_python(source.format(**surroundings)).status == "error"


@needs_filter
def test_without_a_filter_python_itself_refuses(what_is_left, surroundings):
    for what in sorted(FORBIDDEN.keys() - {"a process"}):
        result = run_python(FORBIDDEN[what].format(**surroundings))
        assert "not allowed in the sandbox" in last_line(result), what


@needs_filter
def test_without_a_filter_the_size_of_a_file_is_limited(what_is_left, tmp_path):
    source = f"import ctypes; libc = ctypes.CDLL(None)\nfd = libc.creat(b'{tmp_path}/x', 0o600)\n"
    source += "import os\nwhile True: os.write(fd, b'x' * 1000)"
    assert last_line(run_python(source, output_limit=5000)) == "OSError: [Errno 27] File too large"
    assert (tmp_path / "x").stat().st_size == 5000


@needs_filter
def test_where_system_calls_are_not_filtered_a_warning_says_so_once(request, caplog):
    def warnings():
        sandbox.warn_unless_filtered.cache_clear()
        caplog.clear()
        assert run_python("print(1)").stdout == run_python("print(1)").stdout == "1\n"
        return [record.getMessage() for record in caplog.records]

    assert warnings() == []
    request.getfixturevalue("what_is_left")
    [message] = warnings()
    assert message.startswith("the sandbox cannot filter system calls on Linux x86_64: a program")
    sandbox.warn_unless_filtered.cache_clear()


@pytest.fixture
def what_is_left(monkeypatch, tmp_path_factory):
    """The sandbox of a system that can filter no system calls."""
    source = Path(sandbox._PROGRAM).read_text()
    program = tmp_path_factory.mktemp("sandbox") / "sandbox_program.py"
    program.write_text(source.replace('platform.machine() != "x86_64"', "True"))
    monkeypatch.setattr(sandbox, "_PROGRAM", str(program))


def test_honest_programs_work():
    sources = {
        "import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))": "3\n",
        "import threading as t\nx = t.Thread(target=print, args=(3,)); x.start(); x.join()": "3\n",
        "import numpy; print(int(numpy.ones((3, 3)).sum()))": "9\n",
        "print(len(open(__import__('os').__file__).read()) > 99)": "True\n",
    }
    assert {source: run_python(source, timeout=20).stdout for source in sources} == sources


@pytest.mark.parametrize("limit", ["timeout", "wall_timeout", "memory_limit", "output_limit"])
def test_limits_that_cannot_be_meant_are_refused(limit):
    with pytest.raises(ConfigurationError, match=f"'{limit}': 0.*expected positive limits"):
        run_python("", **{limit: 0})


@settings(max_examples=15)
@given(st.text(max_size=40))
def test_any_text_is_a_program_or_an_error(source):
    assert run_python(source, timeout=0.5).status in ("ok", "error", "timeout")


def test_a_string_comes_back_as_it_went_in():
    text = "\N{SNOWMAN}\\\"'\r\n\t\u202e"
    assert run_python(f"print({text!r}, end='')").stdout == text
