"""Command-line options from a dataclass: one flag a field, its docstring the help text."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import sys
import textwrap
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click

from lmrl_env.errors import ConfigurationError, LmrlError

ArgsT = TypeVar("ArgsT")


def run_command(args_class: type[ArgsT], main: Callable[[ArgsT], None]) -> None:
    """Parse the command line into an ``args_class`` and call ``main`` with it.

    With ``--resume RUN`` every flag that the command line does not name is taken from
    ``RUN/config.json``. Errors of this library end the program with their message alone.

    Args:
        args_class: a dataclass of ``int | float | str | bool | Literal | None`` fields with
            defaults, each with a docstring under it; it has the fields ``resume`` and ``run_dir``.
        main: the program.
    """
    if os.getcwd() not in sys.path:  # where the module of an id such as my_module:MyEnv-v0 may be
        sys.path.append(os.getcwd())
    docs = field_docs(args_class)
    hints = typing.get_type_hints(args_class)

    def callback(**values: Any) -> None:
        context = click.get_current_context()
        given = {
            name
            for name in values
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        }
        try:
            if values["resume"] is not None:
                values = _resumed(values, given)
            main(args_class(**values))
        except LmrlError as error:
            raise click.ClickException(str(error)) from error

    options = [
        click.Option(
            [_flag(field.name, hints[field.name])],
            type=_click_type(hints[field.name]),
            default=None if field.default is MISSING else field.default,
            show_default=True,
            help=docs[field.name],
        )
        for field in fields(args_class)  # type: ignore[arg-type]
    ]
    module = inspect.getmodule(main)
    click.Command(
        name=None,
        callback=callback,
        params=list(options),
        help=(module.__doc__ if module else None) or "",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )()


def check_range(
    args: Any,
    name: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> None:
    """Refuse a setting outside of its range; None is a setting that is not used.

    Args:
        args: has the setting.
        name: of the field.
        least: smallest value.
        most: largest value.
        above: values must exceed this.

    Raises:
        ConfigurationError: that names the flag and what was expected.
    """
    value = getattr(args, name)
    limits = {"at least": least, "at most": most, "above": above}
    if value is not None and not (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
    ):
        expected = " and ".join(
            f"{text} {limit}" for text, limit in limits.items() if limit is not None
        )
        raise ConfigurationError(f"--{name.replace('_', '-')} {value}: expected {expected}")


def field_docs(args_class: type) -> dict[str, str]:
    """Return the docstring that stands under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(args_class))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(doc))):
                docs[name] = inspect.cleandoc(doc)
    return docs


def _flag(name: str, hint: Any) -> str:
    flag = name.replace("_", "-")
    return f"--{flag}/--no-{flag}" if hint is bool else f"--{flag}"


def _click_type(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        (hint,) = [arg for arg in get_args(hint) if arg is not type(None)]
        return _click_type(hint)
    return hint


def _resumed(values: dict[str, Any], given: set[str]) -> dict[str, Any]:
    config_file = Path(values["resume"]) / "config.json"
    if not config_file.is_file():
        raise ConfigurationError(
            f"--resume {values['resume']!r}: there is no {config_file}; name the folder of a run"
        )
    config = json.loads(config_file.read_text())
    kept = {name: config[name] for name in values if name in config and name not in given}
    return {**values, **kept, "resume": values["resume"], "run_dir": values["resume"]}
