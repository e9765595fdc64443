from __future__ import annotations

import pytest
from hypothesis import settings

from lmrl_env.tokenizer import Tokenizer, load_tokenizer

# Examples are derived, not drawn anew: a run of the suite is the same on every machine.
settings.register_profile("derandomized", derandomize=True, deadline=None)
settings.load_profile("derandomized")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("tiny")
