"""Verifiers beside the mathematical ones: what the labelled cases do not say of them."""

import functools
import re

import pytest
import scripted_verifiers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env import verifiers
from lmrl_env.errors import ConfigurationError
from lmrl_env.grading import Grader
from lmrl_env.types import Question
from lmrl_env.verifiers import boxed_math, choice, code, exact, last_number, numeric, regex
from lmrl_env.verifiers.paths import load_verifier, verifier_path

PROGRAM = "```python\ndef square(x):\n    return {}\n```"


# --- what a verdict says


def test_a_wrong_answer_says_what_was_expected():
    assert exact("a", ("b", "c")) == (0.0, "wrong", "a", "expected b or c")
    assert last_number("it is 3", "4") == (0.0, "wrong", "3", "expected 4")
    assert numeric("it is 3", "4") == (0.0, "wrong", "3", "expected 4")
    assert choice("(C)", "B") == (0.0, "wrong", "C", "expected B")
    assert regex("a1", "2", pattern=r"\d") == (0.0, "wrong", "1", "expected 2")


def test_a_missing_answer_says_what_is_missing():
    assert last_number("none", "4").detail == "no number"
    assert numeric(r"\boxed{x}", "4") == (0.0, "unparseable", "x", "the answer is not a number")
    assert choice("perhaps", "B").detail == "no letter of a choice"
    assert regex("a", "2", pattern=r"\d").detail == r"nothing matches \d"
    assert code("none", "assert True").detail == "no fenced block of Python"


@pytest.mark.parametrize("verifier", [last_number, numeric, exact, choice])
def test_thinking_alone_is_no_answer(verifier):
    assert verifier("it is (4) </think>", "4").status == "unparseable"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("x + x", "test 2 of 3: assert square(3) == 9: got 6"),
        ("x * x * (x < 9)", "test 3 of 3: AssertionError: not 81"),
        ("1 / 0", "test 1 of 3: ZeroDivisionError: division by zero"),
        ("exit()", "test 1 of 3: ended with exit status 0"),
        ("[x for x in iter(int, 1)]", "test 1 of 3: more than 0.3 s"),
        ("print('x' * 10 ** 8)", "test 1 of 3: assert square(2) == 4: got None"),
    ],
)
def test_a_program_is_told_which_test_it_fails(body, detail):
    tests = ["assert square(2) == 4", "assert square(3) == 9"]
    tests.append("for i in (0, 9):\n    assert square(i) == i * i, f'not {i * i}'")
    row = Question("row", "?", "", {"tests": tests})
    verdict = code(PROGRAM.format(body), "", question=row, timeout=0.3, memory_limit=2**28)
    assert verdict == (0.0, "wrong", f"def square(x):\n    return {body}\n", detail)


def test_a_program_is_told_what_it_should_have_written():
    row = Question("row", "?", "", {"tests": [{"input": "2", "output": "4\n"}]})
    assert code("```\nprint(5)\n```", "", question=row).detail == (
        "test 1 of 1: wrote '5\\n', expected '4\\n'"
    )
    for written in (r"'4  \n\n'", "'4'"):
        assert code(f"```\nprint({written})\n```", "", question=row).status == "correct"


def test_what_a_test_expects_does_not_enter_the_process_of_the_program():
    spy = "import gc, sys\ndef f(x):\n    known = str(gc.get_objects()) + str(sys.argv)\n"
    spy += "    return 'seen' if '7878637'[::-1] in known else 'not seen'"
    fenced = f"```python\n{spy}\n```"
    assert "got 'not seen'" in code(fenced, "assert f(1) == 7368787").detail
    assert "got 'seen'" in code(fenced, "assert f(7368787) == 1").detail  # it can see


def test_lines_between_the_comparisons_run_in_their_order():
    test = "import math\nx = math.sqrt(16)\nassert square(x) == 16\nx += 1\nassert square(x) == 25"
    assert code(PROGRAM.format("x * x"), test).status == "correct"
    assert code(PROGRAM.format("16"), test).detail.endswith("assert square(x) == 25: got 16")
    assert code(PROGRAM.format("x * x"), f"{test}\nassert x != 5").status == "wrong"


SOLVED = """
import math
from collections import Counter, namedtuple
def square(x): return x * x
def area(r): return math.pi * r * r
def letters(text): return Counter(text)
def pair(): return namedtuple("Pair", "a b")(1, 2)
def infinite(): return float("inf")
def three(): import numpy; return numpy.int64(3)
def nothing(x): return None if x < 0 else Stack()
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def __len__(self): return len(self.items)
"""
TAMPERING = """
import builtins, math
class Equal:
    items = ()
    def __init__(self, *_): pass
    def push(self, x): pass
    def __iter__(self): return iter((self, self))
    def __index__(self): return 1
    __len__ = __index__
for name in "eq ne lt gt le ge contains bool".split():
    setattr(Equal, f"__{name}__", lambda *_: True)
for name in "sub rsub abs add getattr hash pow rpow round".split():
    setattr(Equal, f"__{name}__", lambda self, *_: self if name != "hash" else 1)
def abs(x): return Equal()
builtins.abs = builtins.round = builtins.max = builtins.sorted = abs
math.isclose = lambda *a, **b: True
candidate = _check_got = got = square = area = letters = pair = infinite = three = nothing = Equal
Stack = Equal
"""
SAFE_TESTS = [
    "assert square(2) == 4",
    "assert 4 == square(2), 'not 4'",
    "assert square(2) == 2 ** 2",
    "assert square(2) != 5 and square(3) in (8, 9)",
    "assert 3 < square(2) < 5",
    "assert abs(area(2) - 12.566) < 0.01",
    "assert round(area(1), 2) == 3.14",
    "import math\nassert math.isclose(area(1), 3.14159265, rel_tol=1e-6)",
    "assert letters('aab') == {'a': 2, 'b': 1}",
    "assert pair() == (1, 2)",
    "assert infinite() == float('inf')",
    "assert three() == 3",
    "assert nothing(-1) is None and nothing(1) is not None",
    "assert not nothing(-1)",
    "assert {'a': square(2), 'b': [square(3)]} == {'a': 4, 'b': [9]}",
    "assert sorted([square(2), square(1)])[0] == 1",
    "assert max(square(2), 3) == 4",
    "s = Stack()\ns.push(3)\nassert len(s) == 1 and len(Stack()) == 0",
    "x = [square(2)]\nassert x == [4]",
    "def check(candidate):\n    got = candidate(3)\n    assert got == 9\ncheck(square)",
]


@pytest.mark.parametrize("test", SAFE_TESTS)
def test_a_right_program_passes_and_one_that_tampers_does_not(test):
    assert code(f"```\n{SOLVED}\n```", test).status == "correct"
    assert code(f"```\n{TAMPERING}\n```", test).status == "wrong"


@pytest.mark.parametrize(
    "test",
    [
        "for i in range(3):\n    assert square(i) == i * i",
        "assert all(square(i) == i * i for i in range(4))",
        "assert isinstance(nothing(1), Stack) and type(square(2)) == int",
        "assert square(2) == 4 or square(2) == 5",
        "try:\n    square('a')\n    assert False\nexcept TypeError:\n    pass",
        "def check(f):\n    return f(2) == 4\nassert check(square)",
        "from collections import Counter\nassert letters('ab') == Counter('ba')",
    ],
)
def test_what_cannot_be_cut_runs_beside_the_program(test):
    assert code(f"```\n{SOLVED}\n```", test).status == "correct"
    wrong = SOLVED.replace("x * x", "str(x)").replace("Counter(text)", "text")
    assert code(f"```\n{wrong}\n```", test).status == "wrong"


def test_a_program_may_have_to_define_what_python_has():
    assert (
        code("```\ndef pow(a, b): return a ** b\n```", "assert pow(2, 3) == 8").status == "correct"
    )
    assert code("```\ndef pow(a, b): return 7\n```", "assert pow(2, 3) == 8").detail == (
        "test 1 of 1: assert pow(2, 3) == 8: got 7"
    )


def test_a_condition_that_raises_or_never_ends_is_not_held():
    detail = code(PROGRAM.format("None"), "assert square(2) < 5").detail
    assert detail == "test 1 of 1: assert square(2) < 5: got None"
    assert code(PROGRAM.format("9"), "assert square(2) ** 9 ** 9 ** 9 > 1").status == "wrong"


# --- tolerance


@settings(max_examples=60)
@given(
    st.decimals(-1000, 1000, places=3),
    st.decimals(-1000, 1000, places=3),
    st.integers(0, 20).map(lambda n: n / 16),
)
def test_a_number_is_right_within_the_relative_tolerance(value, gold, tolerance):
    verdict = numeric(str(value), str(gold), tolerance=tolerance)
    assert (verdict.score == 1) == (abs(value - gold) * 16 <= int(tolerance * 16) * abs(gold))


def test_a_row_with_an_error_sets_an_absolute_tolerance():
    def status(value, error):
        row = Question("row", "?", "100", {"error": error})
        return numeric(value, "100", question=row, tolerance=0.5).status

    assert [status("102", error) for error in ("2", 2, "2e0", "1.9", 0)] == (
        ["correct"] * 3 + ["wrong"] * 2
    )
    assert [status("149", error) for error in (None, "")] == ["correct"] * 2


@pytest.mark.parametrize("error", ["much", "-1", "1.2.3", [1]])
def test_an_error_that_is_no_number_is_refused(error):
    with pytest.raises(ConfigurationError, match=rf"error={re.escape(repr(error))} in the row of"):
        numeric("1", "1", question=Question("row", "?", "1", {"error": error}))


def test_what_numeric_cannot_mean_is_refused():
    with pytest.raises(ConfigurationError, match="tolerance=-1: expected a number that is at"):
        numeric("1", "1", tolerance=-1)
    with pytest.raises(ConfigurationError, match="gold 'blue': expected a number"):
        numeric("1", "blue")


@pytest.mark.parametrize("tests", [[3], [{"input": "1"}], 5])
def test_tests_of_another_form_are_refused(tests):
    with pytest.raises(ConfigurationError, match="expected Python that raises if the program"):
        code("```\nx\n```", "", question=Question("row", "?", "", {"tests": tests}))


def test_a_test_that_is_no_python_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"\['assert f\(1'\] are no Python"):
        code("```\nx\n```", "assert f(1")


def test_code_without_tests_is_refused():
    with pytest.raises(ConfigurationError, match="no tests: expected a column 'tests'"):
        code("```\nx\n```", "")


# --- verifiers with arguments, in other processes


@pytest.mark.parametrize(
    ("verifier", "path"),
    [
        (boxed_math, "lmrl_env.verifiers:boxed_math"),
        ("boxed_math", "lmrl_env.verifiers:boxed_math"),
        ("numeric(tolerance=0.5)", "lmrl_env.verifiers:numeric(tolerance=0.5)"),
        ("numeric( tolerance = .5 )", "lmrl_env.verifiers:numeric(tolerance=0.5)"),
        ("numeric()", "lmrl_env.verifiers:numeric"),
        (
            functools.partial(regex, pattern=r"\((\d+)\)"),
            r"lmrl_env.verifiers:regex(pattern='\\((\\d+)\\)')",
        ),
        (
            functools.partial(code, timeout=1.0, memory_limit=2**28),
            "lmrl_env.verifiers:code(memory_limit=268435456, timeout=1.0)",
        ),
        (scripted_verifiers.scripted, "scripted_verifiers:scripted"),
    ],
)
def test_a_path_names_a_verifier_and_its_arguments(verifier, path):
    assert verifier_path(verifier) == verifier_path(path) == path
    loaded = load_verifier(path)
    function = getattr(loaded, "func", loaded)
    assert function.__module__.startswith(path.split(":")[0])
    if isinstance(verifier, functools.partial):
        assert (function, loaded.keywords) == (verifier.func, verifier.keywords)


def test_every_verifier_of_the_library_can_be_named():
    assert [getattr(load_verifier(name), "__name__", "") for name in verifiers.NAMES] == [
        *verifiers.NAMES
    ]
    assert set(verifiers.NAMES) < set(verifiers.__all__)


@pytest.mark.parametrize("path", ["scripted_verifiers:Verdict", "scripted_verifiers:os"])
def test_what_cannot_be_called_as_a_verifier_is_refused_when_it_is_loaded(path):
    with pytest.raises(ConfigurationError, match=f"the verifier {path} cannot be called"):
        load_verifier(path)


@given(
    st.dictionaries(
        st.sampled_from(["pattern", "x", "y"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=5,
        ).filter(lambda value: "inf" not in repr(value)),
    )
)
def test_any_arguments_come_through_a_path(arguments):
    verifier = functools.partial(scripted_verifiers.of_any_arguments, **arguments)
    loaded = load_verifier(verifier_path(verifier))
    assert getattr(loaded, "keywords", {}) == arguments


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (
            functools.partial(regex, pattern=re.compile("x")),
            "argument pattern=re.compile.*cannot be sent",
        ),
        (functools.partial(numeric, "response"), "positional arguments: name them"),
        (functools.partial(lambda response, answer: None), "top level of a module"),
        ("numeric(0.5)", "cannot be imported by name"),
        ("numeric(tolerance=x)", "cannot be imported by name"),
        ("numeric(tolerance=0.5", "cannot be imported by name"),
        ("a b:c", "cannot be imported by name"),
        ("nosuch", "expected one of boxed_math, answer_tag_math, .*, llm_judge, or 'module:func"),
        ("warm_up", "unknown verifier 'warm_up': expected one of boxed_math"),
        ("numeric(tol=0.5)", r"numeric\(tol=0.5\) cannot be called: .* argument 'tol'; expected"),
        (functools.partial(exact, pattern="x"), "cannot be called: .* argument 'pattern'"),
        ("regex(pattern='(')", r"pattern \(missing \).*\): expected a regular expression"),
        ("regex(pattern=3)", "no usable pattern"),
    ],
)
def test_a_path_that_no_worker_can_follow_is_refused_at_once(verifier, message):
    with pytest.raises(ConfigurationError, match=message):
        Grader(verifier)


def test_a_worker_gets_the_arguments():
    row = Question("row", "?", "", {"tests": ["assert square(3) == 9"]})
    for verifier, response, answer, question in (
        (functools.partial(numeric, tolerance=0.1), "10.5", "10", None),
        ("regex(pattern='<<(.*)>>')", "<<yes>>", ["no", "yes"], None),
        ("code(timeout=5.0)", PROGRAM.format("x * x"), "", row),
    ):
        with Grader(verifier, workers=1) as grader:
            assert grader.grade([response], [answer], [question])[0].status == "correct"


def test_a_verifier_that_raises_is_a_crash_with_the_reason():
    with Grader("numeric(tolerance=-1)", workers=1) as grader:
        verdict = grader.grade(["3"], ["3"])[0]
    assert verdict.status == "crash"
    assert "tolerance=-1: expected a number that is at least 0" in verdict.detail


def test_a_grader_counts_its_verdicts_by_status():
    with Grader("scripted_verifiers:scripted", timeout=0.2) as grader:
        assert grader.counts == {}
        grader.grade(["ok", "no", "raise x", "compute", "ok"], ["ok"] * 5)
        grader.grade(["ok"], ["ok"])
        assert grader.counts == {"correct": 3, "wrong": 1, "crash": 1, "timeout": 1}


def test_any_one_of_several_gold_answers_suffices_for_every_verifier():
    right = {
        "boxed_math": r"\boxed{12}",
        "answer_tag_math": "</think><answer>12</answer>",
        "math_answer": r"\boxed{12}",
        "last_number": "12",
        "numeric": "12",
        "exact": "12",
        "regex(pattern='x(.*)')": "x12",
    }
    for path, response in right.items():
        verifier = load_verifier(path)
        assert verifier(response, ("11", "12")).status == "correct", path
        assert verifier(response, ["12", "11"]).status == "correct", path
        assert verifier(response, ("11", "13")).status == "wrong", path
    assert choice("B", ("A", "B")).status == "correct"
    assert code(PROGRAM.format(4), ("assert square(1) == 1", "assert square(2) == 4")).score == 1
    assert set(verifiers.__all__) >= {path.partition("(")[0] for path in right}
