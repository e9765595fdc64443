"""The grading service: its verdicts, its deadlines, and that nothing brings it down."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest
import scripted_verifiers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.errors import ConfigurationError, GradingError
from lmrl_env.grading import Grader, shared_grader, verifier_path
from lmrl_env.grading_process import WorkerProcess
from lmrl_env.types import Question
from lmrl_env.verifiers import Verdict, answer_tag_math, boxed_math

SCRIPTED = "scripted_verifiers:scripted"
OK = Verdict(1.0, "correct", "ok")


@pytest.fixture(scope="module")
def grader():
    with Grader(SCRIPTED, timeout=0.3) as grader:
        yield grader


@pytest.fixture(scope="module")
def math_grader():
    with Grader(answer_tag_math) as grader:
        yield grader


def grade_one(grader, command):
    """Grade a command among well-behaved responses, which must be spared."""
    before, verdict, after = grader.grade(["ok", command, "ok"], ["ok"] * 3)
    assert before == after == OK
    return verdict


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_verdicts_come_in_the_order_of_the_responses(grader):
    responses = [str(i) for i in range(300)]
    responses[7] = "busy 0.1"
    verdicts = grader.grade(responses, [str(i // 2 * 2) for i in range(300)])
    assert [v.extracted for v in verdicts] == responses
    assert [v.score for v in verdicts[8:]] == [1.0, 0.0] * 146


def test_no_responses_get_no_verdicts(grader):
    assert grader.grade([], []) == []


def test_all_workers_share_the_work(grader):
    pids = {v.extracted for v in grader.grade(["busy 0.05", "pid"] * 20, ["?"] * 40)[1::2]}
    assert len(pids) == 2


def test_a_verifier_that_computes_for_ever_times_out(grader):
    verdict = grade_one(grader, "compute")
    assert verdict == (0.0, "timeout", None, "more than 0.3 s of processor time")


def test_a_verifier_that_waits_for_ever_times_out():
    with Grader(SCRIPTED, workers=1, timeout=0.05) as grader:
        verdict = grade_one(grader, "sleep 1000")
    assert verdict == (0.0, "timeout", None, "no verdict in 0.5 s")


def test_waiting_is_not_computing(grader):
    assert grade_one(grader, "sleep 0.6").status == "wrong"


@pytest.mark.parametrize(
    ("command", "detail"),
    [
        ("exit 3", "the worker died: exit status 3"),
        ("exit 0", "the worker died: exit status 0"),
        ("segfault", "the worker died: SIGSEGV"),
        ("signal", "the worker died: SIGUSR1"),
        (f"hog {5 * 2**30}", "out of memory"),
        ("raise boom", "ValueError: boom"),
        ("sys.exit boom", "SystemExit: boom"),
    ],
)
def test_a_crash_is_the_verdict_on_one_item_alone(grader, command, detail):
    assert grade_one(grader, command) == (0.0, "crash", None, detail)


@pytest.mark.parametrize("what", ["none", "nan", "float"])
def test_what_is_no_verdict_is_a_crash(grader, what):
    verdict = grade_one(grader, f"return {what}")
    assert verdict.status == "crash"
    assert "expected a Verdict with a finite score" in verdict.detail


def test_many_failures_in_one_batch_spare_the_others(grader):
    bad = ["compute", "exit 1", "raise x", "segfault"]
    verdicts = grader.grade([c for b in bad for c in ("ok", b, "ok")], ["ok"] * 12)
    assert [v.status for v in verdicts[1::3]] == ["timeout", "crash", "crash", "crash"]
    assert verdicts[0::3] == verdicts[2::3] == [OK] * 4


def test_a_verifier_that_prints_does_not_disturb_the_protocol(capfd):
    with Grader(SCRIPTED) as grader:
        assert grade_one(grader, "print 100000").status == "wrong"
    assert capfd.readouterr() == ("", "")


def test_megabytes_go_through_in_both_directions(grader):
    response = "\N{SNOWMAN}\n\0\ud800" * 10**6
    verdicts = grader.grade([response, "repeat 5000000"] * 3, [response] * 6)
    assert [v.score for v in verdicts] == [1.0] * 6
    assert {len(v.extracted) for v in verdicts} == {4 * 10**6, 5 * 10**6}


def test_a_worker_killed_between_batches_is_replaced(grader):
    pids = {int(v.extracted) for v in grader.grade(["pid"] * 40, [""] * 40)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert grader.grade(["ok"] * 4, ["ok"] * 4) == [OK] * 4


@pytest.fixture
def killed(monkeypatch):
    """Return a function that has the next workers killed by SIGKILL at a method's end."""
    left = {}

    def kill(method, count):
        original = getattr(WorkerProcess, method)
        left[method] = count

        def killing(self, *args):
            original(self, *args)
            if left[method]:
                left[method] -= 1
                os.kill(self._process.pid, signal.SIGKILL)

        monkeypatch.setattr(WorkerProcess, method, killing)
        return left

    return kill


@pytest.mark.parametrize("count", [1, 2])
def test_workers_that_are_killed_in_mid_batch_cost_no_verdict(killed, count):
    responses = ["busy 0.05", *map(str, range(40))]
    with Grader(SCRIPTED, workers=2) as grader:
        while not all(worker.ready for worker in grader._pool) or not grader._pool:
            grader.grade(["busy 0.05"] * 4, ["ok"] * 4)
        left = killed("send", count)
        verdicts = grader.grade(responses, responses)
        assert not left["send"]
    assert [v.status for v in verdicts] == ["correct"] * 41


def test_an_item_that_kills_every_worker_is_a_crash_and_the_others_are_spared(grader):
    assert grade_one(grader, "kill") == (0.0, "crash", None, "the worker died: SIGKILL")


def test_workers_that_are_killed_before_they_are_ready_are_replaced_but_not_for_ever(killed):
    killed("__init__", 3)
    with Grader(SCRIPTED, workers=2) as grader:
        assert grader.grade(["ok"], ["ok"]) == [OK]
    killed("__init__", 1000)
    refused = pytest.raises(GradingError, match="in a row were killed before they were ready")
    with Grader(SCRIPTED, workers=2) as grader, refused:
        grader.grade(["ok"], ["ok"])


def test_an_interrupted_batch_leaves_nothing_for_the_next(grader):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            grader.grade(["sleep 1"] * 4, ["?"] * 4)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert grader.grade(["ok", "other"], ["ok", "ok"]) == [OK, (0.0, "wrong", "other", "")]


def test_a_verdict_does_not_depend_on_how_busy_the_machine_is():
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(4 * (os.cpu_count() or 1))
    ]
    try:
        with Grader(SCRIPTED, timeout=0.5) as grader:
            # Half the time that it may take, which takes much longer than that by the clock.
            verdicts = grader.grade(["busy 0.25", "compute"] * 2, ["busy 0.25"] * 4)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [v.status for v in verdicts] == ["correct", "timeout"] * 2


def test_threads_may_share_a_grader(grader):
    results = {}

    def grade(name):
        results[name] = grader.grade([name] * 50, [name] * 50)

    threads = [threading.Thread(target=grade, args=(f"name{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {f"name{i}": [(1.0, "correct", f"name{i}", "")] * 50 for i in range(4)}


def test_a_forked_process_has_workers_of_its_own(grader):
    def pids():
        return {verdict.extracted for verdict in grader.grade(["pid"] * 40, [""] * 40)}

    ours = pids()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            theirs = pids()
            grader.close()
            status = int(not theirs.isdisjoint(ours) or any(map(is_running, theirs)))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pids() <= ours


def test_megabytes_are_not_sent_ahead(grader):
    items = [b"x", b"x", b"x" * 2**17, b"x" * 2**17, b"x"]
    todo = deque([0, 1, 2, 3, 4] + [4] * 20)
    assert [list(grader._take_chunk(todo, items)) for _ in range(3)] == [[0, 1], [2], [3]]


def test_the_verifier_gets_several_answers_and_the_row(grader):
    row = Question("set/1", "How many?", ("3", "three"), {"level": 2})
    verdict = grader.grade(["question"], [row.answer], [row])[0]
    assert verdict.extracted == "set/1 2 ('3', 'three')"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(max_size=5)), max_size=5))
def test_any_text_gets_the_verdict_that_the_verifier_gives_in_process(math_grader, texts):
    responses = [f"</think><answer>{text}</answer>" for text, _ in texts]
    answers = [answer for _, answer in texts]
    assert math_grader.grade(responses, answers) == [
        answer_tag_math(*pair) for pair in zip(responses, answers, strict=True)
    ]


def test_a_tower_of_powers_neither_hangs_nor_pays(math_grader):
    tower = "9^{" * 6 + "9" + "}" * 6
    responses = [f"</think> <answer>{text}</answer>" for text in (tower, "12", "10^{999999999}!")]
    verdicts = math_grader.grade(responses, ["12"] * 3)
    assert [v.score for v in verdicts] == [0.0, 1.0, 0.0]


def test_closing_twice_is_harmless_and_grading_afterwards_an_error():
    grader = Grader(SCRIPTED, workers=1)
    pid = int(grader.grade(["pid"], [""])[0].extracted)
    grader.close()
    grader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(GradingError, match="scripted has been closed"):
        grader.grade(["ok"], ["ok"])


def test_a_grader_that_nobody_holds_ends_its_workers():
    grader = Grader(SCRIPTED, workers=1)
    pid = int(grader.grade(["pid"], [""])[0].extracted)
    del grader
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_process_shares_one_grader_of_a_verifier():
    grader = shared_grader(boxed_math, workers=1)
    assert shared_grader("lmrl_env.verifiers:boxed_math", workers=1) is grader
    assert shared_grader(boxed_math, workers=2) is not grader
    grader.close()
    assert shared_grader(boxed_math, workers=1) is not grader


def test_a_verifier_is_named_by_its_module():
    assert verifier_path(scripted_verifiers.scripted) == SCRIPTED
    assert verifier_path(SCRIPTED) == SCRIPTED


def in_main(response, answer, *, question=None):
    raise NotImplementedError


in_main.__module__ = "__main__"


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (lambda response, answer: None, "expected a function at the top level of a module"),
        (in_main, "in_main is defined in the program or notebook.*move it to a module"),
        ("__main__:verifier", "move it to a module"),
        ("my module", "'my module' cannot be imported by name.*'module:function'"),
    ],
)
def test_a_verifier_that_no_worker_can_import_is_refused_at_once(verifier, message):
    with pytest.raises(ConfigurationError, match=message):
        Grader(verifier)


@pytest.mark.parametrize("path", ["no_such_module:f", "scripted_verifiers:no_such_function"])
def test_a_verifier_that_is_not_there_is_an_error_that_says_so(path):
    with (
        Grader(path, workers=1) as grader,
        pytest.raises(GradingError, match=r"did not start: .*no_such.*Check that 'import"),
    ):
        grader.grade(["ok"], ["ok"])


def test_lists_of_unequal_length_are_refused(grader):
    with pytest.raises(ConfigurationError, match="2 responses, 1 answers"):
        grader.grade(["a", "b"], ["a"])


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout": 0.0}, {"memory_limit": -1}])
def test_numbers_that_cannot_be_meant_are_refused(options):
    with pytest.raises(ConfigurationError, match="expected at least one worker"):
        Grader(SCRIPTED, **options)


SCRIPT = """
import time
from lmrl_env.grading import Grader
from lmrl_env.verifiers import boxed_math

grader = Grader("scripted_verifiers:scripted", timeout=60)
print(Grader(boxed_math).grade([r"\\boxed{12}"], ["12"])[0].status)
print(*(v.extracted for v in grader.grade(["pid", "pid"], ["", ""])), flush=True)
"""


def run_script(tmp_path, tail=""):
    """Start a script of a user, which has no ``if __name__ == "__main__"``."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + tail)
    root = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (root, root / "tests")))
    return subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def assert_gone(pids):
    assert Path("/proc/self/stat").exists(), "this test needs Linux"
    deadline = time.monotonic() + 30
    alive = set(pids)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = {pid for pid in alive if is_running(pid)}
    assert not alive


def test_an_unguarded_script_grades_and_leaves_no_workers_behind(tmp_path):
    output, _ = run_script(tmp_path).communicate(timeout=120)
    status, pids = output.splitlines()
    assert status == "correct"
    assert_gone(map(int, pids.split()))


@pytest.mark.parametrize("command", ["ok", "compute", "sleep 1000"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, command):
    process = run_script(tmp_path, f"grader.grade([{command!r}] * 2, [''] * 2); time.sleep(1000)")
    assert process.stdout.readline() == "correct\n"
    pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert_gone(pids)


def test_workers_that_were_started_long_before_the_first_batch_grade_it():
    with Grader("lmrl_env.verifiers:exact", workers=2) as grader:
        grader.start()
        for worker in grader._pool:
            says = select.select([worker._process.stdout], [], [], 60)[0]
            assert says, "it loads the verifier before it is given work"
            worker.deadline = time.monotonic() - 1  # its time to start is long over
        assert [verdict.score for verdict in grader.grade(["a", "b"] * 20, ["a"] * 40)] == [
            1,
            0,
        ] * 20


def test_a_path_that_names_a_place_many_times_does_not_keep_workers_from_starting(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, *["/no/such/place"] * 20_000])
    with Grader("exact") as grader:  # the variable would be longer than the system allows
        assert grader.grade(["a"], ["a"])[0].status == "correct"
