"""The scripts of ``examples/paper/`` as modules, and the option parsers of what they start."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from lmrl_env.cli.eval import eval_command
from lmrl_env.options import run_command

ROOT = Path(__file__).parents[2]


def load(path: str) -> ModuleType:
    """Return a script of ``examples/``, under a name that shadows no package."""
    file = ROOT / "examples" / f"{path}.py"
    name = f"script_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(file.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
    return sys.modules[name]


def dry_run(script: ModuleType, *options: str) -> list[list[str]]:
    """Return the commands that a script would run, without the interpreter."""
    result = CliRunner().invoke(script.main, ["--dry-run", *options])
    assert result.exit_code == 0, result.output
    return [shlex.split(line)[1:] for line in result.output.splitlines()]


def parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the settings of a command, by the parser of the program that it starts."""
    if command[:3] == ["-m", "lmrl_env", "eval"]:
        return eval_command.make_context("eval", command[3:]).params
    program = Path(command[0])
    if program.parent.name == "examples":
        return load(program.stem).main.make_context(program.stem, command[1:]).params
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(sys, "argv", command)
    args = importlib.import_module(f"algos.{program.stem}").Args
    with pytest.raises(SystemExit) as ended:
        run_command(args, lambda values: seen.append(vars(values)))
    assert ended.value.code == 0
    return seen[0]
