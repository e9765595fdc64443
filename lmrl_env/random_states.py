"""The states of the global random generators, as tensors that ranks can exchange."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_states() -> dict[str, Tensor]:
    """Return the states of the generators of torch, NumPy and Python, one-dimensional tensors.

    Words of 32 bits are float64 there, which holds them exactly.
    """
    words: Any
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, python_words, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(
            [*np.asarray(words).tolist(), position, has_gauss, gauss], dtype=torch.float64
        ),
        "python": torch.tensor(
            [*python_words, python_gauss is not None, python_gauss or 0.0], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Put the generators back into the states that ``random_states`` returned."""
    torch.set_rng_state(states["torch"].clone())  # it does not see the offset of a view
    *words, position, has_gauss, gauss = states["numpy"].tolist()
    keys = np.array(words, dtype=np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    *python_words, has_python_gauss, python_gauss = states["python"].tolist()
    random.setstate((3, tuple(map(int, python_words)), python_gauss if has_python_gauss else None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())
