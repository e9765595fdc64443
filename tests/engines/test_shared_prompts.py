from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import letter_tokenizer, random_model

from lmrl_env.attention import use_packed_attention
from lmrl_env.engines import prefill, shared_prompts
from lmrl_env.engines.local import LocalEngine
from lmrl_env.engines.shared_prompts import SharedPromptCache
from lmrl_env.errors import ModelError
from lmrl_env.types import Sampling

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [0, 0, 1]]
BEGINNING = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]
WAYS = {
    "ragged": PROMPTS,
    "even": [[1, 2, 3], [4, 5, 6]],
    "common beginning": [BEGINNING + prompt for prompt in PROMPTS],
    "common beginning, even": [[*BEGINNING, 1], [*BEGINNING, 2]],
    "one begins the other": [[*BEGINNING, 1], BEGINNING, [*BEGINNING, 1, 2]],
}


@pytest.mark.parametrize("fewest", [0, 24])
@pytest.mark.parametrize("prompts", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
def test_samples_are_those_of_each_prompt_alone_by_transformers_own_attention(
    architecture, prompts, fewest, monkeypatch
):
    monkeypatch.setattr(shared_prompts, "FEWEST_SHARED", fewest)
    model = random_model(architecture, torch.float32)
    engine = LocalEngine(model, letter_tokenizer())
    sampling = Sampling(40, 0.8)
    model.set_attn_implementation("sdpa")
    expected = [
        completion
        for i, prompt in enumerate(prompts)
        for completion in engine.generate([prompt], sampling, 6, range(6 * i, 6 * i + 6))
    ]
    together = engine.generate(prompts, sampling, 6, range(6 * len(prompts)))
    assert [x.token_ids.tolist() for x in together] == [x.token_ids.tolist() for x in expected]
    use_packed_attention(model)
    completions = engine.generate(prompts, sampling, 6, range(6 * len(prompts)))
    assert len({len(completion.token_ids) for completion in completions}) > 4
    for completion, other in zip(completions, expected, strict=True):
        assert completion.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(completion.logprobs, other.logprobs, rtol=0, atol=5e-5)


def test_prompts_in_parts_give_the_same_samples(monkeypatch):
    model = random_model("llama", torch.float32)
    use_packed_attention(model)
    engine = LocalEngine(model, letter_tokenizer())
    arguments = WAYS["common beginning"], Sampling(20), 3, range(9)
    expected = [x.token_ids.tolist() for x in engine.generate(*arguments)]
    shapes = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: shapes.append(tuple(args[0].shape))
    )
    monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 5)
    assert [x.token_ids.tolist() for x in engine.generate(*arguments)] == expected
    # By length: two own tokens, three, and five, each behind the common ones; then rows.
    assert shapes[:3] == [(1, len(BEGINNING) + own) for own in (2, 3, 5)]


SAMPLINGS = {
    "greedy": Sampling(30, temperature=0),
    "truncated": Sampling(30, 0.9, top_p=0.8, top_k=6),
    "stops": Sampling(30, stop=("ab", "cd", "ee", "fk")),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_samples_of_any_sampling_are_those_of_transformers_own_attention(sampling):
    model = random_model("qwen2", torch.float32)
    engine = LocalEngine(model, letter_tokenizer())
    arguments = PROMPTS, sampling, 6, range(18)
    model.set_attn_implementation("sdpa")
    expected = engine.generate(*arguments)
    use_packed_attention(model)
    for completion, other in zip(engine.generate(*arguments), expected, strict=True):
        assert completion.token_ids.tolist() == other.token_ids.tolist()
        assert completion.finish_reason == other.finish_reason
        np.testing.assert_allclose(completion.logprobs, other.logprobs, rtol=0, atol=5e-5)


def test_log_probs_in_bfloat16_are_as_near_to_float32_as_by_transformers_own_attention():
    model = random_model("llama", torch.float32)
    arguments = PROMPTS, Sampling(2, 0.8), 40, range(120)
    exact = LocalEngine(model, letter_tokenizer()).generate(*arguments)
    engine = LocalEngine(model, letter_tokenizer(), dtype="bfloat16")
    model.set_attn_implementation("sdpa")
    by_sdpa = engine.generate(*arguments)
    use_packed_attention(model)
    errors = [
        [abs(completion.logprobs - other.logprobs).mean() for completion in (mine, theirs)]
        for mine, theirs, other in zip(engine.generate(*arguments), by_sdpa, exact, strict=True)
        if mine.token_ids.tolist() == theirs.token_ids.tolist() == other.token_ids.tolist()
    ]
    assert len(errors) > 100
    mine, theirs = np.mean(errors, axis=0)
    assert 0 < mine < 1.25 * theirs


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_attention_is_that_to_prompts_copied_for_every_row_whichever_rows_end(data):
    heads, d, width = 2, 4, 3
    index = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    common = data.draw(st.integers(0, 2))
    lengths = torch.tensor([1, width, 2])
    is_token = torch.arange(width) < lengths[:, None]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    prompts = torch.randn(2, 3, heads, width, d, generator=generator, dtype=torch.float64)
    beginning = torch.randn(2, 1, heads, common, d, generator=generator, dtype=torch.float64)
    rows = torch.tensor(index)
    fewest = data.draw(st.sampled_from([0, 24]))
    with mock.patch.object(shared_prompts, "FEWEST_SHARED", fewest):
        cache = SharedPromptCache([(*beginning,)], [(*prompts,)], is_token, rows, 4)
    whole = torch.cat([beginning.expand(-1, 3, -1, -1, -1), prompts], dim=3)
    row_keys, row_values = whole[0, rows], whole[1, rows]
    is_token = torch.cat([torch.ones(3, common) > 0, is_token], dim=1)
    width += common
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
    with pytest.raises(ModelError, match="in 1 of 2 layers"):
        LocalEngine(model, letter_tokenizer()).generate(PROMPTS, Sampling(4), 1, [1, 2, 3])
