"""The verifier of programs: Python that passes tests."""

from __future__ import annotations

import ast
import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lmrl_env.errors import ConfigurationError
from lmrl_env.sandbox import SandboxResult, run_python
from lmrl_env.types import Question
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

    The program runs in ``sandbox.run_python``; one that is too slow or crashes is wrong. What a
    test expects does not enter its process where the test is an ``output``, or where the line is
    ``assert expression == literal``: such tests cannot be tampered with. Any other line runs
    beside the program, which passes it if it sets out to, for instance by an object that is equal
    to everything: write tests in those two forms where a policy is trained on them.

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


class _Step(NamedTuple):
    """One thing to run beside the program: its value is text to compare, if it has one."""

    test: int
    source: str
    mode: str
    expected: Any = None


_DRIVER = """
def main():
    import contextlib, io, json, sys
    out, space = sys.stdout, {{"__name__": "program"}}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile({program!r}, "program.py", "exec"), space)
        token, steps = json.loads(sys.stdin.read())
        for mode, source in steps:
            value = eval(compile(source, "test", mode), space)
            print(token + json.dumps(repr(value)), file=out, flush=True)

main()
"""


def _run_asserts(
    program: str, tests: list[tuple[int, str]], timeout: float, memory_limit: int
) -> Failure | None:
    """Run tests that are Python beside the program, and compare the values that they name."""
    steps = [step for index, test in tests for step in _steps(index, test)]
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
    for step, value in zip(steps, told, strict=False):
        if step.mode == "eval" and not _is_value(value, step.expected):
            return step.test, f"assert {step.source} == {step.expected!r}: got {value[1:-1][:200]}"
    if len(told) < len(steps):
        return steps[len(told)].test, _what_happened(result, timeout)
    return None


def _steps(index: int, test: str) -> Iterator[_Step]:
    """Cut a test into expressions to compare with literals, and what stands between them."""
    others: list[ast.stmt] = []
    for statement in ast.parse(test).body:
        pair = _compared_with_literal(statement)
        if pair is None:
            others.append(statement)
            continue
        if others:
            yield _Step(index, ast.unparse(ast.Module(others, [])), "exec")
            others = []
        yield _Step(index, pair[0], "eval", pair[1])
    if others:
        yield _Step(index, ast.unparse(ast.Module(others, [])), "exec")


def _compared_with_literal(statement: ast.stmt) -> tuple[str, Any] | None:
    """Return the two sides of ``assert expression == literal``."""
    match statement:
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
            try:
                return ast.unparse(left), ast.literal_eval(right)
            except ValueError:
                return None
    return None


def _is_value(told: str, expected: Any) -> bool:
    """Return whether the representation that a program gave is that of the expected value."""
    try:
        return bool(ast.literal_eval(json.loads(told)) == expected)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


def _what_happened(result: SandboxResult, timeout: float) -> str:
    """Say why a program did not come to its end."""
    if result.status == "timeout":
        return f"more than {timeout:g} s"
    if result.status == "output":
        return f"wrote more than {_OUTPUT_LIMIT} bytes"
    lines = result.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"ended with exit status {result.returncode}"
