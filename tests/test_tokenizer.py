from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmrl_env.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny")


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_decoding_by_the_backend_is_decoding_by_transformers(ids):
    assert TOKENIZER._backend is not None
    text = TOKENIZER._tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(np.array(ids, dtype=np.int32)) == text


def test_a_tokenizer_that_decodes_in_its_own_way_is_asked_itself():
    class Own(type(TOKENIZER._tokenizer)):
        def decode(self, token_ids, **kwargs):
            return f"mine: {token_ids}"

    own = Own(tokenizer_object=TOKENIZER._tokenizer.backend_tokenizer)
    assert type(TOKENIZER)(own, [0], 64).decode([3, 4]) == "mine: [3, 4]"
