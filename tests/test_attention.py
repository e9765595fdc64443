from __future__ import annotations

import pytest
import torch
from random_models import MODEL_WIDTH, random_model
from transformers import AutoModelForCausalLM, Gemma2Config

from lmrl_env.attention import PACKED_ATTENTION, packed_attention, use_packed_attention
from lmrl_env.errors import ModelError


@pytest.mark.parametrize("mask", [None, "left padding"])
def test_without_a_layout_attention_is_that_of_transformers(mask):
    model = random_model("llama")
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [0, 9, 9, 1]])
    if mask:
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    expected = model(input_ids=ids, attention_mask=mask).logits
    use_packed_attention(model)
    assert model.config._attn_implementation == PACKED_ATTENTION
    logits = model(input_ids=ids, attention_mask=mask).logits
    real = slice(None) if mask is None else mask
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-10)


def test_models_with_windows_keep_their_attention():
    config = Gemma2Config(
        vocab_size=MODEL_WIDTH, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, head_dim=8,
    )  # fmt: skip
    for model in (random_model("mistral"), AutoModelForCausalLM.from_config(config)):
        use_packed_attention(model)
        assert model.config._attn_implementation == "sdpa"


def test_attention_with_terms_of_its_own_is_refused():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ModelError, match=r"Identity has the terms \['softcap'\]"):
        packed_attention(torch.nn.Identity(), x, x, x, None, softcap=50.0)
