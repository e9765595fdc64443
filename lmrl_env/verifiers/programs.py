"""The verifier of programs: Python that passes tests."""

from __future__ import annotations

import ast
import json
import secrets
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from lmrl_env.errors import ConfigurationError
from lmrl_env.sandbox import SandboxResult, run_python, warn_unless_filtered
from lmrl_env.types import Question
from lmrl_env.verifiers.assertions import Check, cut
from lmrl_env.verifiers.extraction import after_thinking, last_code_block, last_tag
from lmrl_env.verifiers.verdict import Verdict, all_golds

_OUTPUT_LIMIT = 2**20


def code(
    response: str,
    answer: str | Sequence[str],
    *,
    question: Question | None = None,
    timeout: float = 2.0,
    memory_limit: int = 2**30,
) -> Verdict:
    r"""Judge a Python program by the tests in the ``tests`` column of the question's row.

    The program is the last fenced block of Python after the thinking, else the last
    ``<answer>...</answer>``. A test is either Python that raises if the program is wrong, such as
    ``assert double(2) == 4``, or ``{"input": ..., "output": ...}``: what the program reads, and
    what it must write up to white space at the ends of lines. All tests must pass. Without that
    column, each gold answer is a test of the first kind, and any one suffices.

    The program runs in ``sandbox.run_python``; one that is too slow or crashes is wrong. It cannot
    tamper with a test whose expectation stays out of its process: an ``output``, or an assertion
    that compares what the program computes with constants, by operators, ``math`` and Python's own
    functions of values, as ``assert f(2) == 4``, ``assert math.isclose(f(2), 1.5)``,
    ``assert f(2) in (3, 4)`` or ``assert len(f(2)) > 1 and f(0) is None``, at the top of a test or
    in a function that it calls once, as ``check(f)``. The values themselves must be numbers, texts,
    booleans, None, or collections of them. All else runs beside the program, which can pass it if
    it sets out to: assertions in loops, comprehensions, ``or`` and ``try``; ``isinstance`` and
    ``type``; and what compares with variables or objects that the test makes, or two things that
    the program computes. Where a policy is trained on tests, write them in the safe forms.

    >>> block = "```python\ndef double(x):\n    return 2 * x\n```"
    >>> code(block, "assert double(2) == 4").status
    'correct'
    >>> code(block, "assert double(2) == 5").detail
    'test 1 of 1: assert double(2) == 5: got 4'

    Args:
        response: see ``Verifier``.
        answer: see ``Verifier``; not read where the row has tests.
        question: see ``Verifier``.
        timeout: seconds of processor time, for each ``input`` and for all other tests together. A
            ``Grader`` stops an item at ten times its own timeout by the clock: give it more if
            many slow tests are to run.
        memory_limit: bytes of address space of the program.

    Raises:
        ConfigurationError: if there are no tests, or they are of another form.
    """
    text = after_thinking(response)
    program = last_code_block(text)
    if program is None:
        program = last_tag(text)
    if program is None or not program.strip():
        return Verdict(0.0, "unparseable", program, "no fenced block of Python")
    suites = _suites(answer, question)
    detail = ""
    for suite in suites:
        failure = next(_failures(program, suite, timeout, memory_limit), None)
        if failure is None:
            return Verdict(1.0, "correct", program)
        detail = f"test {failure[0] + 1} of {len(suite)}: {failure[1]}"
    return Verdict(0.0, "wrong", program, detail)


def warm_up() -> None:
    """Say at the start, where it is heard, if programs cannot be confined here."""
    warn_unless_filtered()


def _suites(answer: str | Sequence[str], question: Question | None) -> list[list[Any]]:
    """Return the lists of tests of which a program must pass one."""
    tests = question and question.extra.get("tests")
    if not tests:
        suites = [[gold] for gold in all_golds(answer) if gold.strip()]
    else:
        suites = [list(tests) if isinstance(tests, list | tuple) else [tests]]
    for test in (test for suite in suites for test in suite):
        if not isinstance(test, str) and not (isinstance(test, dict) and "output" in test):
            raise ConfigurationError(
                f"test {test!r}: expected Python that raises if the program is wrong, or "
                '{"input": text, "output": text}'
            )
    if not suites:
        raise ConfigurationError(
            "no tests: expected a column 'tests' in the question's row, or tests as the answer"
        )
    return suites


Failure = tuple[int, str]
"""The index of the test that failed, and how."""


def _failures(
    program: str, suite: list[Any], timeout: float, memory_limit: int
) -> Iterator[Failure]:
    """Run the tests, those in Python first, and yield those that fail."""
    asserted = [(i, test) for i, test in enumerate(suite) if isinstance(test, str)]
    if asserted and (failure := _run_asserts(program, asserted, timeout, memory_limit)):
        yield failure
    for i, test in enumerate(suite):
        if not isinstance(test, str) and (
            failure := _run_on_input(program, i, test, timeout, memory_limit)
        ):
            yield failure


def _run_on_input(
    program: str, index: int, test: dict[str, Any], timeout: float, memory_limit: int
) -> Failure | None:
    """Compare what a program writes with what it should."""
    result = run_python(
        program,
        stdin=str(test.get("input") or ""),
        timeout=timeout,
        memory_limit=memory_limit,
        output_limit=_OUTPUT_LIMIT,
    )
    if result.status != "ok":
        return index, _what_happened(result, timeout)
    if _lines(result.stdout) == _lines(str(test["output"])):
        return None
    return index, f"wrote {result.stdout[:200]!r}, expected {str(test['output'])[:200]!r}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


_DRIVER = """
def main():
    import contextlib, io, json, sys

    def plain(value):
        if isinstance(value, dict):
            return {{plain(key): plain(item) for key, item in value.items()}}
        for kind in (list, tuple, set, frozenset):
            if isinstance(value, kind):
                return kind(map(plain, value))
        if type(value).__module__ == "numpy" and not getattr(value, "shape", 1):
            return value.item()
        return value

    out, space = sys.stdout, {{"__name__": "program"}}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile({program!r}, "program.py", "exec"), space)
        token, steps = json.loads(sys.stdin.read())
        for mode, source in steps:
            value = eval(compile(source, "test", mode), space)
            print(token + json.dumps(repr(plain(value))), file=out, flush=True)

main()
"""

_JUDGE = """
import json, math, sys

names = {"math": math, "inf": math.inf, "nan": math.nan}
for condition, values in json.loads(sys.stdin.read()):
    print(bool(eval(condition, {**names, "v": [eval(value, names) for value in values]})))
"""


def _run_asserts(
    program: str, tests: list[tuple[int, str]], timeout: float, memory_limit: int
) -> Failure | None:
    """Run tests that are Python beside the program, and judge the values that they ask for."""
    try:
        steps, checks = cut(tests, program)
    except SyntaxError as error:
        raise ConfigurationError(
            f"the tests {[test for _, test in tests]} are no Python ({error}): expected statements "
            "that raise if the program is wrong"
        ) from error
    token = secrets.token_hex(16)  # the program cannot say that it passed before the tests begin
    setup = (token, [(step.mode, step.source) for step in steps])
    result = run_python(
        _DRIVER.format(program=program),
        stdin=json.dumps(setup),
        timeout=timeout,
        memory_limit=memory_limit,
        output_limit=_OUTPUT_LIMIT,
    )
    told = [line[len(token) :] for line in result.stdout.split("\n") if line.startswith(token)]
    computed = [check for check in checks if check.steps.stop <= len(told)]
    values = [[_value(told[place]) for place in check.steps] for check in computed]
    held = _hold(computed, values, timeout, memory_limit)
    for check, is_held in zip(computed, held, strict=True):
        if not is_held:
            got = ", ".join(_text(told[place])[:200] for place in check.steps)
            return steps[check.steps[0]].test, f"{check.source}: got {got}"
    if len(told) < len(steps):
        return steps[len(told)].test, _what_happened(result, timeout)
    return None


def _hold(
    checks: list[Check], values: list[list[Value | None]], timeout: float, memory_limit: int
) -> list[bool]:
    """Return of each check, up to the first that does not, whether it holds of its values."""
    held = list(map(_equals_literal, checks, values))
    others = [i for i, known in enumerate(held) if known is None]
    if others:
        questions = [
            (ast.unparse(checks[i].condition), [repr(value[0]) for value in values[i] if value])
            for i in others
        ]
        result = run_python(
            _JUDGE, stdin=json.dumps(questions), timeout=timeout, memory_limit=memory_limit
        )
        for i, answer in zip_longest(others, result.stdout.split()):
            held[i] = answer == "True"  # it ends at a condition that raises
    return [is_held is True for is_held in held]


def _equals_literal(check: Check, values: list[Value | None]) -> bool | None:
    """Return whether a value equals a literal, or None where something else is asked."""
    if None in values:
        return False
    match check.condition:
        case ast.Subscript(value=ast.Name(id="v")):
            return values[0] == (True,)
        case ast.Compare(left=ast.Subscript(value=ast.Name()), ops=[ast.Eq()], comparators=[right]):
            try:
                return bool(values[0] == (ast.literal_eval(right),))
            except ValueError:
                return None
    return None


Value = tuple[Any]
"""A value that a program computed."""


class _Infinities(ast.NodeTransformer):
    """Makes constants of the numbers that have names."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def _value(told: str) -> Value | None:
    """Return what a program computed, or None where it is more than literals make."""
    try:
        tree = ast.parse(_text(told), mode="eval")
        return (ast.literal_eval(_Infinities().visit(tree)),)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _text(told: str) -> str:
    """Return the representation that a program gave of a value."""
    try:
        return str(json.loads(told))
    except ValueError:
        return told


def _what_happened(result: SandboxResult, timeout: float) -> str:
    """Say why a program did not come to its end."""
    if result.status == "timeout":
        return f"more than {timeout:g} s"
    if result.status == "output":
        return f"wrote more than {_OUTPUT_LIMIT} bytes"
    lines = result.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"ended with exit status {result.returncode}"
