from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import CONFIGS, HEADS, SIZES, letter_tokenizer, random_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import lmrl_env.engines.local
from lmrl_env.attention import use_packed_attention
from lmrl_env.engines.decoder import FEWEST_TOKENS, Decoder
from lmrl_env.engines.local import LocalEngine
from lmrl_env.linear import use_onednn
from lmrl_env.rms_norm import use_fused_norms
from lmrl_env.types import Completion, Sampling

CONFIGS["qwen3"] = lambda: Qwen3Config(
    **SIZES, **HEADS, head_dim=12, intermediate_size=48, max_position_embeddings=64
)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [0, 0, 1], [3]]
BUDGET, EACH = 40, 6


def loaded(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Return a random model, changed as ``load_model`` changes what it loads."""
    model = random_model(architecture, torch.float32, seed)
    use_packed_attention(model)
    use_onednn(model)
    use_fused_norms(model)
    return model


def generate(model: PreTrainedModel, temperature: float = 0.8) -> list[Completion]:
    sampling = Sampling(BUDGET, temperature)
    return LocalEngine(model, letter_tokenizer()).generate(
        PROMPTS, sampling, EACH, range(EACH * len(PROMPTS))
    )


def pays(model: PreTrainedModel) -> bool:
    return Decoder.pays(model, FEWEST_TOKENS)


@pytest.fixture
def made(monkeypatch) -> list[Decoder]:
    """Return the decoders that engines have made."""
    decoders: list[Decoder] = []

    class Counted(Decoder):
        def __init__(self, model, length):
            super().__init__(model, length)
            decoders.append(self)

    monkeypatch.setattr(lmrl_env.engines.local, "Decoder", Counted)
    return decoders


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_samples_are_those_of_the_models_own_forward(architecture, temperature, made, monkeypatch):
    model = loaded(architecture)
    completions = generate(model, temperature)
    assert len(made) == 1
    monkeypatch.setattr(Decoder, "pays", lambda *_: False)
    expected = generate(model, temperature)
    assert len(made) == 1
    assert len({len(completion.token_ids) for completion in completions}) > 2
    for completion, other in zip(completions, expected, strict=True):
        assert completion.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(completion.logprobs, other.logprobs, rtol=0, atol=5e-5)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_angles_are_those_of_the_model(kind, made, monkeypatch):
    config = CONFIGS["llama"]()
    config.rope_parameters = {"rope_theta": 10000.0, **ROPES[kind]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    use_packed_attention(model)
    use_onednn(model)
    use_fused_norms(model)
    completions = generate(model)
    assert len(made) == (kind != "dynamic")  # whose angles depend on the length
    monkeypatch.setattr(Decoder, "pays", lambda *_: False)
    for completion, other in zip(completions, generate(model), strict=True):
        assert completion.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(completion.logprobs, other.logprobs, rtol=0, atol=5e-5)


def test_weights_that_were_changed_in_place_are_sampled_from(made):
    model, other = loaded(seed=0), loaded(seed=1)
    before = generate(model)
    with torch.no_grad():
        for own, new in zip(model.parameters(), other.parameters(), strict=True):
            own.data.copy_(new)
    after = generate(model)
    assert len(made) == 2
    assert [x.token_ids.tolist() for x in after] != [x.token_ids.tolist() for x in before]
    assert [x.token_ids.tolist() for x in after] == [x.token_ids.tolist() for x in generate(other)]


def test_a_batch_of_few_tokens_is_left_to_the_model():
    assert Decoder.pays(loaded(), FEWEST_TOKENS)
    assert not Decoder.pays(loaded(), FEWEST_TOKENS - 1)


def hooked() -> PreTrainedModel:
    model = loaded()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def with_adapters() -> PreTrainedModel:
    model = loaded()
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    return model


def with_another_activation() -> PreTrainedModel:
    config = CONFIGS["llama"]()
    config.hidden_act = "gelu"
    model = AutoModelForCausalLM.from_config(config)
    use_packed_attention(model)
    use_onednn(model)
    use_fused_norms(model)
    return model


def by_sdpa() -> PreTrainedModel:
    model = loaded()
    model.set_attn_implementation("sdpa")
    return model


OTHERS = {
    "another architecture": lambda: loaded("gpt2"),
    "bfloat16": lambda: loaded().bfloat16(),
    "a hook": hooked,
    "adapters": with_adapters,
    "another activation": with_another_activation,
    "another attention": by_sdpa,
    "not loaded here": lambda: random_model("llama", torch.float32),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_model_that_computes_something_else_is_left_to_itself(make):
    assert pays(loaded())
    assert not pays(make())


def test_mixed_precision_is_left_to_the_model():
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(loaded())


def test_a_subclass_of_a_known_model_is_left_to_itself():
    model = loaded()
    own = copy.copy(model)
    own.__class__ = type("Own", (type(model),), {})
    assert pays(model)
    assert not pays(own)
