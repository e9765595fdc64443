"""Tests in Python, cut into what the program computes and what is asked of its values.

``assert abs(area(2) - 12.57) < 0.01`` becomes the expression ``area(2)``, for the process of the
program, and the condition ``abs(v[0] - 12.57) < 0.01`` on its value, for another process. So the
program never holds the number to hit, and an object that is equal to everything does not help it.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

_TRUSTED = frozenset(
    (
        *("abs", "all", "any", "bool", "complex", "dict", "enumerate", "float", "frozenset", "int"),
        *("len", "list", "math", "max", "min", "pow", "range", "reversed", "round", "set"),
        *("sorted", "str", "sum", "tuple", "zip"),
    )
)
"""What a condition may call; where it calls nothing else, the program's function of that name."""

_NEEDS_OBJECTS = frozenset(("type", "isinstance", "issubclass"))
"""What cannot be asked of a value alone."""


class Step(NamedTuple):
    """Something to do in the process of the program.

    Attributes:
        test: index of the test that it belongs to.
        source: Python.
        mode: ``eval`` where its value is asked for, ``exec`` where it must not raise.
    """

    test: int
    source: str
    mode: Literal["eval", "exec"]


class Check(NamedTuple):
    """What must hold of values that the program computes.

    Attributes:
        source: of the assertion.
        condition: an expression in ``v``, the list of the values.
        steps: where these come from, by their places in the list of steps.
    """

    source: str
    condition: ast.expr
    steps: range


def cut(tests: Iterable[tuple[int, str]], program: str) -> tuple[list[Step], list[Check]]:
    """Return what the program has to do, in order, and what must hold of it.

    A function of a test that is called once, as ``check`` is by ``check(double)``, is read as if
    its lines stood in place of the call. What cannot be cut is one step with its assertion.

    Args:
        tests: the index of each, and its Python.
        program: that is tested.

    Raises:
        SyntaxError: if a test is no Python.
    """
    bound = _bound_names(program)
    steps: list[Step] = []
    checks: list[Check] = []
    for test, source in tests:
        for statement in _assertions_apart(_called_functions_inline(ast.parse(source).body)):
            parts = _Parts()
            condition = parts.condition(statement, _TRUSTED)
            if condition is None and _TRUSTED & bound:
                condition = parts.condition(statement, _TRUSTED - bound)
            if condition is None:
                _add_to_last(steps, Step(test, ast.unparse(statement), "exec"))
                continue
            places = range(len(steps), len(steps) + len(parts.sources))
            steps += [Step(test, part, "eval") for part in parts.sources]
            checks.append(Check(ast.unparse(statement), condition, places))
    return steps, checks


def _add_to_last(steps: list[Step], step: Step) -> None:
    """Add a statement, to the statements before it where it follows on some."""
    if steps and steps[-1][::2] == step[::2]:
        step = step._replace(source=f"{steps.pop().source}\n{step.source}")
    steps.append(step)


def _bound_names(program: str) -> set[str]:
    """Return all names to which a program gives a meaning."""
    try:
        nodes = list(ast.walk(ast.parse(program)))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return set()  # it will fail by itself
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {node.name for node in nodes if isinstance(node, definitions)}
    return names | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _assertions_apart(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements, and each part of ``assert a and b`` by itself, without messages."""
    for statement in body:
        match statement:
            case ast.Assert(test=ast.BoolOp(op=ast.And(), values=values), msg=message):
                yield from _assertions_apart(ast.Assert(value, message) for value in values)
            case _:
                yield statement


def _called_functions_inline(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a test, functions that it calls once in place of the call."""
    names = [node.id for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Name)]
    functions = {
        f.name: f
        for f in body
        if isinstance(f, ast.FunctionDef) and _is_plain(f) and names.count(f.name) == 1
    }
    for statement in body:
        match statement:
            case ast.Expr(ast.Call(func=ast.Name(id=name), args=args, keywords=[])) if (
                name in functions
                and len(args) == len(functions[name].args.args)
                and all(isinstance(arg, ast.Name | ast.Constant) for arg in args)
            ):
                yield from _body(functions[name], args)
            case _:
                yield statement


def _is_plain(function: ast.FunctionDef) -> bool:
    """Return whether the lines of a function can stand outside of it."""
    arguments = function.args
    special = (arguments.vararg, arguments.kwarg, arguments.posonlyargs, arguments.kwonlyargs)
    leaves = (ast.Return, ast.Yield, ast.YieldFrom, ast.Global, ast.Nonlocal, ast.FunctionDef)
    return not (
        function.decorator_list
        or any(special)
        or arguments.defaults
        or _stored(function.body) & {argument.arg for argument in arguments.args}
        or any(isinstance(n, leaves) for line in function.body for n in ast.walk(line))
    )


def _stored(body: list[ast.stmt]) -> set[str]:
    names = (n for line in body for n in ast.walk(line) if isinstance(n, ast.Name))
    return {name.id for name in names if not isinstance(name.ctx, ast.Load)}


def _body(function: ast.FunctionDef, arguments: list[ast.expr]) -> Iterator[ast.stmt]:
    """Yield the lines of a function with the arguments of a call, and names of their own."""
    meanings: dict[str, ast.expr] = {
        name: ast.Name(f"_{function.name}_{name}") for name in _stored(function.body)
    }
    parameters = (parameter.arg for parameter in function.args.args)
    meanings.update(zip(parameters, arguments, strict=True))
    for line in copy.deepcopy(function.body):
        yield _Rename(meanings).visit(line)


class _Rename(ast.NodeTransformer):
    """Puts other names, or constants, in place of names."""

    def __init__(self, meanings: dict[str, ast.expr]):
        self.meanings = meanings

    def visit_Name(self, node: ast.Name) -> ast.expr:
        meaning = self.meanings.get(node.id, node)
        return ast.Name(meaning.id, node.ctx) if isinstance(meaning, ast.Name) else meaning


class _CannotCutError(Exception):
    """An assertion that only the process of the program can judge."""


_Kind = Literal["constant", "program", "mixed"]
_CUTTABLE = (
    *(ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Slice, ast.UnaryOp, ast.BinOp),
    *(ast.Compare, ast.List, ast.Tuple, ast.Set, ast.Dict),
)


class _Parts(ast.NodeTransformer):
    """Puts ``v[0]``, ``v[1]``, ... in place of what only the program can compute.

    Attributes:
        sources: of what was replaced.
    """

    def __init__(self) -> None:
        self.trusted: frozenset[str] = frozenset()
        self.sources: list[str] = []

    def condition(self, statement: ast.stmt, trusted: frozenset[str]) -> ast.expr | None:
        """Return what an assertion asks of ``v``, or None where it cannot be cut.

        Args:
            statement: an assertion, or anything else.
            trusted: names that mean what they mean in Python.
        """
        if not isinstance(statement, ast.Assert):
            return None
        self.trusted = trusted
        try:
            kind = self._kind(statement.test)
        except _CannotCutError:
            return None
        if kind == "constant":
            return None
        if kind == "mixed":
            return ast.fix_missing_locations(self.visit(copy.deepcopy(statement.test)))
        truth = ast.Call(ast.Name("bool", ast.Load()), [statement.test], [])
        return ast.fix_missing_locations(self._replace(truth))

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and not isinstance(node, ast.Slice):
            kind = self._kind(node)
            if kind == "program":
                return self._replace(node)
            if kind == "constant":
                return node
        return self.generic_visit(node)

    def _replace(self, node: ast.expr) -> ast.expr:
        self.sources.append(ast.unparse(node))
        place = ast.Constant(len(self.sources) - 1)
        return ast.Subscript(ast.Name("v", ast.Load()), place, ast.Load())

    def _kind(self, node: ast.AST) -> _Kind:
        """Return who can compute an expression: anybody, the program alone, or both together."""
        if isinstance(node, ast.Constant):
            return "constant"
        root = _root(node)
        if root in _NEEDS_OBJECTS:
            raise _CannotCutError
        if root is not None and root not in self.trusted:
            return "program"
        if isinstance(node, ast.Name):
            return "constant"
        if not isinstance(node, _CUTTABLE):
            raise _CannotCutError
        match node:
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant()]):
                return self._kind(left)  # an object may be None or not
        kinds = {
            self._kind(child)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.expr | ast.keyword)
        }
        if isinstance(node, ast.Call) and len(kinds) > 1 and self._kind(node.func) == "constant":
            kinds = {self._kind(argument) for argument in (*node.args, *node.keywords)}
        return "mixed" if len(kinds) > 1 else kinds.pop() if kinds else "constant"


def _root(node: ast.AST) -> str | None:
    """Return the name that calls, attributes and subscripts begin with."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
