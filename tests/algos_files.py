"""The algorithm files as modules, by name."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("cispo", "dapo", "dr_grpo", "gspo", "grpo", "lite_ppo", "ppo", "reinforce_pp", "rloo")
ALGORITHMS = {name: importlib.import_module(f"algos.{name}") for name in NAMES}
HALF_STEPS = ("grpo_without_length", "grpo_without_std")
"""Files from GRPO half of the way to Dr. GRPO, which stand beside the paper's scripts."""
WITHOUT_CRITIC = tuple(name for name in NAMES if name != "ppo")
BY_GROUP = tuple(name for name in WITHOUT_CRITIC if name != "reinforce_pp")
WITH_EPS = ("cispo", "dapo", "gspo", "grpo", "lite_ppo", "reinforce_pp")


def file_of(name: str) -> Path:
    """Return where an algorithm file stands."""
    return ROOT / ("examples/paper" if name in HALF_STEPS else "algos") / f"{name}.py"


def each(*names: str) -> pytest.MarkDecorator:
    """Run a test for each of some algorithm files, which it takes as ``name``."""
    return pytest.mark.parametrize("name", names)
