"""Algorithm files by their paths: those of ``algos/``, and a user's own."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lmrl_env.errors import ConfigurationError, LmrlError

CHECKOUT = Path(__file__).parents[1]


class Algorithm(NamedTuple):
    """What an algorithm file does with a batch.

    Attributes:
        name: of the file, or its path where several files share a name.
        path: of the file.
        compute_advantages: of rewards and group size, or of rewards, values and mask.
        policy_loss: a micro-batch's share of the loss, and metrics.
    """

    name: str
    path: Path
    compute_advantages: Callable[..., Any]
    policy_loss: Callable[..., tuple[Tensor, Any]]

    @property
    def has_critic(self) -> bool:
        """Whether the advantages depend on a critic's values."""
        return "values" in inspect.signature(self.compute_advantages).parameters


def checkout_files() -> list[Path]:
    """Return the algorithm files of the checkout that this package lies in.

    Raises:
        ConfigurationError: if the package is installed without them.
    """
    folder = CHECKOUT / "algos"
    if not (folder / "dr_grpo.py").is_file():
        raise ConfigurationError(
            f"there are no algorithm files in {str(folder)!r}, as the package is installed without "
            "them: expected the paths of some, such as algos/grpo.py algos/dr_grpo.py"
        )
    return sorted(folder.glob("[!_]*.py"))


def load_algorithms(paths: Sequence[str | Path]) -> list[Algorithm]:
    """Load algorithm files as ``python FILE`` would, without running their programs.

    Raises:
        ConfigurationError: if a file is missing, given twice, fails, or lacks a function.
    """
    files = [Path(path) for path in paths]
    if len({file.resolve() for file in files}) < len(files):
        raise ConfigurationError(
            f"algorithm files {[str(file) for file in files]}: expected each of them once"
        )
    stems = [file.stem for file in files]
    return [_load(file, file.stem if stems.count(file.stem) == 1 else str(file)) for file in files]


def _load(path: Path, name: str) -> Algorithm:
    spec = importlib.util.spec_from_file_location(f"algorithm_file_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        shipped = CHECKOUT / "algos" / path.name
        example = shipped if shipped.is_file() else shipped.with_name("dr_grpo.py")
        raise ConfigurationError(
            f"there is no algorithm file {str(path)!r} in {str(Path.cwd())!r}: expected the path "
            f"of a .py file, such as {example}"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the types of their fields
    if (beside := str(path.resolve().parent)) not in sys.path:  # where the modules beside it are
        sys.path.append(beside)
    with errors_of(name, path):
        spec.loader.exec_module(module)
    expected = ("compute_advantages", "policy_loss")
    if missing := [function for function in expected if not hasattr(module, function)]:
        raise ConfigurationError(
            f"{str(path)!r} has no {' and no '.join(missing)}: expected the functions "
            f"{' and '.join(expected)}, as algos/dr_grpo.py has them"
        )
    return Algorithm(name, path, module.compute_advantages, module.policy_loss)


@contextmanager
def errors_of(name: str, path: Path) -> Iterator[None]:
    """Name the algorithm file, and the line, in whatever its code raises.

    Raises:
        ConfigurationError: from an exception of any kind.
    """
    try:
        yield
    except LmrlError as error:
        raise ConfigurationError(f"the algorithm file {name} cannot use this: {error}") from error
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        place = f" in line {lines[-1]}" if lines else ""
        raise ConfigurationError(
            f"the algorithm file {name} fails{place}: {type(error).__name__}: {error}; correct it, "
            "or compare without it"
        ) from error
