"""How a verifier and its arguments are named, so that another process can import it."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from lmrl_env.errors import ConfigurationError, UnknownNameError
from lmrl_env.verifiers.verdict import Verifier

_LIBRARY = "lmrl_env.verifiers"
_PATH = re.compile(r"(?:(?P<module>[\w.]+):)?(?P<name>\w+)(?P<call>\(.*\))?", re.S)


def verifier_path(verifier: Verifier | str) -> str:
    """Return the path that a worker imports a verifier by, with its arguments if it has any.

    >>> from functools import partial
    >>> from lmrl_env.verifiers import exact, numeric
    >>> verifier_path(exact), verifier_path("exact")
    ('lmrl_env.verifiers:exact', 'lmrl_env.verifiers:exact')
    >>> verifier_path(partial(numeric, tolerance=0.01))
    'lmrl_env.verifiers:numeric(tolerance=0.01)'

    Args:
        verifier: a function at the top level of an importable module, a ``functools.partial`` of
            one with keyword arguments that are literals, or a path: ``"module:function"`` or
            ``"module:function(key=value)"``, without a module for those of this library.

    Raises:
        ConfigurationError: if there is no such path, or a verifier of this library has no such
            arguments, or a pattern that is none.
        UnknownNameError: if this library has no verifier of that name.
    """
    if isinstance(verifier, str):
        module, name, arguments = _split(verifier)
        path = _joined(module, name, arguments)
        function = None
    else:
        function, arguments = _function_and_arguments(verifier)
        module = function.__module__
        if module.startswith(f"{_LIBRARY}."):
            module = _LIBRARY
        name = getattr(function, "__qualname__", type(function).__name__)
        path = _joined(module, name, arguments)
    if module == "__main__":
        raise ConfigurationError(
            f"the verifier {path} is defined in the program or notebook that is running, which a "
            "worker process must not run again: move it to a module of its own and import it"
        )
    if module == _LIBRARY:
        library = importlib.import_module(_LIBRARY)
        if name not in library.NAMES:
            raise UnknownNameError(
                f"unknown verifier {name!r}: expected one of {', '.join(library.NAMES)}, or "
                "'module:function' for one of your own"
            )
        _check_call(path, getattr(library, name), arguments)
        _check_pattern(path, arguments)
    if function is not None and getattr(sys.modules.get(module), name, None) is not function:
        raise ConfigurationError(
            f"the verifier {path} is not what its module holds under that name: expected a "
            "function at the top level of a module"
        )
    return path


def load_verifier(path: str) -> Verifier:
    """Import a verifier by its path.

    >>> load_verifier("numeric(tolerance=0.1)")("about 10.5", "10").status
    'correct'

    Raises:
        ConfigurationError: if the path is not of the form that ``verifier_path`` returns, or what
            it names cannot be called as a verifier.
        ImportError: if there is no such module.
        AttributeError: if the module holds no such function.
    """
    module, name, arguments = _split(path)
    function = getattr(importlib.import_module(module), name)
    _check_call(path, function, arguments)
    return functools.partial(function, **arguments) if arguments else function


def _check_call(path: str, function: Any, arguments: dict[str, Any]) -> None:
    """Raise unless a function can be called as a verifier, with these arguments besides."""
    try:
        inspect.signature(function).bind("", "", question=None, **arguments)
    except TypeError as error:
        raise ConfigurationError(
            f"the verifier {path} cannot be called: {error}; expected a function "
            "(response, answer, *, question=None, ...) -> Verdict that has the arguments named"
        ) from error


def _check_pattern(path: str, arguments: dict[str, Any]) -> None:
    """Raise for a pattern that no response could be searched with."""
    try:
        re.compile(arguments.get("pattern", ""))
    except (re.error, TypeError) as error:
        raise ConfigurationError(
            f"the verifier {path} has no usable pattern ({error}): expected a regular expression "
            r"of Python's re, such as pattern='Answer: (\d+)'"
        ) from error


def _function_and_arguments(verifier: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """Return a function and the keyword arguments that a partial of it sets."""
    if not isinstance(verifier, functools.partial):
        return verifier, {}
    for key, value in verifier.keywords.items():
        try:
            same = ast.literal_eval(repr(value)) == value
        except (ValueError, SyntaxError):
            same = False
        if not same:
            raise ConfigurationError(
                f"the verifier's argument {key}={value!r} cannot be sent to a worker process: "
                "expected numbers, text, True, False, None, or lists and dicts of them"
            )
    if verifier.args:
        raise ConfigurationError(
            f"the verifier {verifier} has positional arguments: name them, as in "
            "partial(numeric, tolerance=0.01)"
        )
    return verifier.func, verifier.keywords


def _joined(module: str, name: str, arguments: dict[str, Any]) -> str:
    call = ", ".join(f"{key}={arguments[key]!r}" for key in sorted(arguments))
    return f"{module}:{name}" + (f"({call})" if call else "")


def _split(path: str) -> tuple[str, str, dict[str, Any]]:
    """Return the module, function and keyword arguments of a path."""
    match = _PATH.fullmatch(path)
    arguments: dict[str, Any] = {}
    try:
        if match is None:
            raise SyntaxError
        if match["call"]:
            call = ast.parse(f"f{match['call']}", mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise SyntaxError
            arguments = {word.arg or "**": ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError):
        raise ConfigurationError(
            f"the verifier {path!r} cannot be imported by name: expected a function at the top "
            "level of a module, its path 'module:function' or 'module:function(key=value)', or "
            f"one of {_LIBRARY}, such as 'boxed_math'"
        ) from None
    return match["module"] or _LIBRARY, match["name"], arguments
