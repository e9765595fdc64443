from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import letter_tokenizer, random_model
from transformers import DynamicCache

from lmrl_env.attention import use_packed_attention
from lmrl_env.engines.local import LocalEngine
from lmrl_env.engines.shared_prompts import SharedPromptCache
from lmrl_env.errors import EngineError
from lmrl_env.types import Sampling

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [0, 0, 1]]


@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3], [4, 5, 6]]], ids=["ragged", "even"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_samples_are_those_of_transformers_own_attention(architecture, prompts):
    model = random_model(architecture, torch.float32)
    engine = LocalEngine(model, letter_tokenizer())
    arguments = prompts, Sampling(40, 0.8), 6, range(6 * len(prompts))
    model.set_attn_implementation("sdpa")
    expected = engine.generate(*arguments)
    use_packed_attention(model)
    completions = engine.generate(*arguments)
    assert len({len(completion.token_ids) for completion in completions}) > 4
    for completion, other in zip(completions, expected, strict=True):
        assert completion.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(completion.logprobs, other.logprobs, rtol=0, atol=5e-5)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_attention_is_that_to_prompts_copied_for_every_row_whichever_rows_end(data):
    heads, d, width = 2, 4, 3
    index = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    lengths = torch.tensor([1, width, 2])
    is_token = torch.arange(width) >= width - lengths[:, None]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    keys, values = torch.randn(2, 3, heads, width, d, generator=generator, dtype=torch.float64)
    prefilled = DynamicCache()
    prefilled.update(keys, values, 0)
    rows = torch.tensor(index)
    cache = SharedPromptCache([prefilled], rows, 4, is_token)
    row_keys, row_values = keys[rows], values[rows]
    layer = torch.nn.Module()
    layer.layer_idx = 0
    for _ in range(4):
        query = torch.randn(len(rows), 2 * heads, 1, d, generator=generator, dtype=torch.float64)
        new = torch.randn(2, len(rows), heads, 1, d, generator=generator, dtype=torch.float64)
        attended = cache.attend(layer, query, *cache.update(*new, 0), None)
        row_keys = torch.cat([row_keys, new[0]], dim=2)
        row_values = torch.cat([row_values, new[1]], dim=2)
        mask = torch.cat([is_token[rows], torch.ones(len(rows), row_keys.shape[2] - width) > 0], 1)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, row_keys, row_values, mask[:, None, None], enable_gqa=True
        )
        torch.testing.assert_close(attended, expected.transpose(1, 2), rtol=0, atol=1e-12)
        ended = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
        kept = cache.drop(ended)
        if not len(kept):
            return
        rows, row_keys, row_values = rows[kept], row_keys[kept], row_values[kept]


def test_a_model_that_does_not_attend_to_the_prompts_is_an_error():
    model = random_model("llama", torch.float32)
    use_packed_attention(model)
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "layout": None}), with_kwargs=True
    )
    with pytest.raises(EngineError, match="in 1 of 2 layers"):
        LocalEngine(model, letter_tokenizer()).generate(PROMPTS, Sampling(4), 1, [1, 2, 3])
