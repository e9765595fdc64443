"""Where and with what a result was made, for its record."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "accelerate",
    "gymnasium",
    "lmrl_env",
    "math-verify",
    "numpy",
    "torch",
    "transformers",
    "vllm",
)


def provenance() -> dict[str, Any]:
    """Return command, commit of the checkout, hardware, and versions, as JSON can hold them."""
    return {
        "command": sys.argv,
        "commit": _git_commit(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {_gpus()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout that this file is in, or None outside of one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
