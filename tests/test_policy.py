from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import MODEL_WIDTH, VOCAB_SIZE, random_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel

import lmrl_env.policy
from lmrl_env import packed_row
from lmrl_env.attention import PACKED_ATTENTION, use_packed_attention
from lmrl_env.errors import ConfigurationError, ModelError
from lmrl_env.policy import Lengths, Policy, TokenBatch, load_model

PROMPT_LENGTHS = [5, 3, 7]
PROMPT_INDEX = [0, 0, 1, 2, 2, 2, 1]
RESPONSE_LENGTHS = [4, 1, 6, 2, 1, 9, 9]


def token_batch(
    prompt_lengths=PROMPT_LENGTHS,
    prompt_index=PROMPT_INDEX,
    response_lengths=RESPONSE_LENGTHS,
    *,
    extra: int = 0,
    seed: int = 1,
    common: int = 0,
) -> TokenBatch:
    """Return a batch of random tokens, padded wider than need be by ``extra``.

    All prompts begin with the same ``common`` tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(lengths):
        ids = torch.zeros(len(lengths), max(lengths) + extra, dtype=torch.int64)
        for row, length in zip(ids, lengths, strict=True):
            row[:length] = torch.randint(0, VOCAB_SIZE, (length,), generator=generator)
        return ids

    prompts = rows(prompt_lengths)
    prompts[:, :common] = prompts[0, :common]
    lengths = [prompt_lengths, prompt_index, response_lengths]
    return TokenBatch(
        prompts,
        torch.tensor(prompt_lengths),
        torch.tensor(prompt_index),
        rows(response_lengths),
        torch.tensor(response_lengths),
        Lengths(*(np.array(x, dtype=np.int64) for x in lengths), common) if common else None,
    )


def random_policy(architecture: str = "qwen2", dtype: torch.dtype = torch.float64) -> Policy:
    model = random_model(architecture, dtype)
    use_packed_attention(model)
    return Policy(model, VOCAB_SIZE)


def reference(
    model: PreTrainedModel, batch: TokenBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Forward every prompt and response by itself, by Transformers' own attention."""
    model.set_attn_implementation("sdpa")
    logprobs = torch.zeros(batch.response_ids.shape, dtype=torch.float64)
    entropies = torch.zeros(batch.response_ids.shape, dtype=torch.float64)
    for i, prompt in enumerate(batch.prompt_index):
        start, length = int(batch.prompt_lengths[prompt]), int(batch.response_lengths[i])
        response = batch.response_ids[i, :length]
        ids = torch.cat([batch.prompt_ids[prompt, :start], response])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1, :VOCAB_SIZE]
        probs = (logits.double() / temperature).softmax(-1)
        logprobs[i, :length] = probs[range(length), response].log()
        entropies[i, :length] = torch.distributions.Categorical(probs).entropy()
    return logprobs, entropies


def loss_gradients(model: PreTrainedModel, logprobs: Tensor) -> dict[str, Tensor]:
    """Return gradients of a loss in which every token has its own weight."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype)
    (logprobs.flatten() * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("longest_in_front", [0, 24])
@pytest.mark.parametrize(("common", "fewest_rounded"), [(0, 2048), (2, 2048), (2, 0)])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "mistral"])
def test_values_and_gradients_equal_those_of_one_row_at_a_time(
    architecture, common, fewest_rounded, longest_in_front, monkeypatch
):
    monkeypatch.setattr(packed_row, "LONGEST_IN_FRONT", longest_in_front)
    monkeypatch.setattr(packed_row, "FEWEST_ROUNDED", fewest_rounded)
    batch, temperature = token_batch(common=common), 0.7
    policy = random_policy(architecture)
    packs = policy.model.config._attn_implementation == PACKED_ATTENTION
    assert packs == (architecture != "mistral")  # whose window is shorter than the rows

    logprobs, entropy = policy(batch, temperature=temperature, with_entropy=True)
    gradients = loss_gradients(policy.model, logprobs + 0.3 * entropy)

    expected_logprobs, expected_entropy = reference(policy.model, batch, temperature)
    expected = loss_gradients(policy.model, expected_logprobs + 0.3 * expected_entropy)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-10)


def test_a_padded_forward_equals_the_packed_one():
    batch = token_batch()
    policy = random_policy("llama")
    packed, _ = policy(batch, temperature=1.0)
    packed_gradients = loss_gradients(policy.model, packed)
    policy.model.set_attn_implementation("sdpa")
    padded, _ = policy(batch, temperature=1.0)
    torch.testing.assert_close(padded, packed, rtol=0, atol=1e-10)
    padded_gradients = loss_gradients(policy.model, padded)
    torch.testing.assert_close(padded_gradients, packed_gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_gradient_checkpointing_changes_no_gradient(architecture):
    batch = token_batch()
    policy = random_policy(architecture)
    expected, _ = policy(batch, temperature=1.0)
    expected_gradients = loss_gradients(policy.model, expected)
    policy.model.gradient_checkpointing_enable()
    policy.train()
    logprobs, _ = policy(batch, temperature=1.0)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)
    gradients = loss_gradients(policy.model, logprobs)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_wider_padding_changes_no_number(architecture):
    policy = random_policy(architecture)
    batch = token_batch()
    narrow, _ = policy(batch, temperature=1.0)
    wide_batch = TokenBatch(
        torch.nn.functional.pad(batch.prompt_ids, (0, 4), value=7),
        batch.prompt_lengths,
        batch.prompt_index,
        torch.nn.functional.pad(batch.response_ids, (0, 3), value=7),
        batch.response_lengths,
    )
    wide, entropy = policy(wide_batch, temperature=1.0, with_entropy=True)
    torch.testing.assert_close(wide[:, : narrow.shape[1]], narrow, rtol=0, atol=1e-12)
    padding = torch.arange(wide.shape[1]) >= batch.response_lengths[:, None]
    assert (wide[padding] == 0).all()
    assert (entropy[padding] == 0).all()
    assert (entropy[~padding] > 0).all()


@settings(max_examples=25)
@given(st.data())
def test_a_row_has_the_same_logprobs_in_any_batch(data):
    prompt_lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    prompts = st.integers(0, len(prompt_lengths) - 1)
    rows = data.draw(st.lists(st.tuples(prompts, st.integers(1, 6)), min_size=1, max_size=40))
    batch = token_batch(prompt_lengths, *map(list, zip(*rows, strict=True)))
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    cut = data.draw(st.integers(0, len(rows)))

    policy = random_policy("llama")
    whole, _ = policy(batch, temperature=1.0)
    for part in (order[:cut], order[cut:]):
        if len(part):
            rows_of_part = batch._replace(
                prompt_index=batch.prompt_index[part],
                response_ids=batch.response_ids[part],
                response_lengths=batch.response_lengths[part],
            )
            logprobs, _ = policy(rows_of_part, temperature=1.0)
            torch.testing.assert_close(logprobs, whole[part], rtol=0, atol=1e-10)


def test_logits_in_pieces_give_the_same_numbers(monkeypatch):
    batch = token_batch()
    policy = random_policy()
    expected = policy(batch, temperature=0.7, with_entropy=True)
    expected_gradients = loss_gradients(policy.model, sum(expected))

    widths = []
    policy.model.lm_head.register_forward_hook(lambda _, args, out: widths.append(len(out)))
    monkeypatch.setattr(lmrl_env.policy, "LOGITS_AT_ONCE", 5 * VOCAB_SIZE)
    pieces = policy(batch, temperature=0.7, with_entropy=True)
    torch.testing.assert_close(pieces, expected, rtol=0, atol=1e-12)
    gradients = loss_gradients(policy.model, sum(pieces))
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-10)
    assert max(widths) == 5
    assert sum(widths) == 2 * sum(RESPONSE_LENGTHS)  # forward, and again for the backward
    assert policy(batch, temperature=0.7)[1] is None


class LiveTensors(TorchDispatchMode):
    """Keeps the most tensors of some shapes that have existed at one time."""

    def __init__(self, *shapes):
        super().__init__()
        self.shapes, self.alive, self.most = shapes, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.shape in self.shapes:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage)
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return made


@pytest.mark.parametrize("entropy_coef", [None, 0.0, 0.3])
def test_logits_of_one_piece_exist_at_a_time_whatever_is_in_the_loss(monkeypatch, entropy_coef):
    policy = random_policy()
    monkeypatch.setattr(lmrl_env.policy, "LOGITS_AT_ONCE", 2 * VOCAB_SIZE)
    assert sum(RESPONSE_LENGTHS) == 32  # 16 pieces
    with LiveTensors((2, MODEL_WIDTH), (2, VOCAB_SIZE)) as live:
        logprobs, entropy = policy(
            token_batch(), temperature=1.0, with_entropy=entropy_coef is not None
        )
        loss = logprobs.sum() + (entropy_coef * entropy.sum() if entropy_coef else 0)
        loss.backward()
    assert 3 <= live.most <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_of_the_vocabulary_alone_sum_to_one(dtype):
    batch = token_batch([5], [0] * VOCAB_SIZE, [1] * VOCAB_SIZE)
    batch = batch._replace(response_ids=torch.arange(VOCAB_SIZE)[:, None])
    logprobs, _ = random_policy(dtype=dtype)(batch, temperature=0.7)
    assert VOCAB_SIZE < MODEL_WIDTH
    assert logprobs.dtype == torch.float32
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)  # bfloat16 is off by 1e-3


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ConfigurationError, match=f"temperature {temperature}"):
        random_policy()(token_batch(), temperature=temperature)


def test_what_all_prompts_begin_with_is_forwarded_once():
    batch = token_batch(common=2)
    policy = random_policy()
    seen = []
    policy.model.model.embed_tokens.register_forward_hook(lambda *args: seen.append(args[1][0]))
    policy(batch, temperature=1.0)
    not_last = sum(RESPONSE_LENGTHS) - len(RESPONSE_LENGTHS)
    assert [ids.shape for ids in seen] == [(1, 2 + sum(PROMPT_LENGTHS) - 3 * 2 + not_last)]


def test_a_prompt_is_forwarded_once_and_padding_never():
    policy = random_policy()
    shapes = []
    policy.model.base_model.layers[0].register_forward_hook(
        lambda _, args, output: shapes.append(args[0].shape[:2])
    )
    policy(token_batch(extra=3), temperature=1.0)
    # Nothing is predicted from the last token of a response, so that it is not fed.
    assert shapes == [(1, sum(PROMPT_LENGTHS) + sum(k - 1 for k in RESPONSE_LENGTHS))]


def test_a_model_that_loses_the_layout_is_refused(monkeypatch):
    policy = random_policy()
    forward = policy.model.base_model.forward
    monkeypatch.setattr(
        policy.model.base_model, "forward", lambda layout, **kwargs: forward(**kwargs)
    )
    with pytest.raises(ModelError, match="0 of 2 layers"):
        policy(token_batch(), temperature=1.0)


def test_a_model_with_dropout_is_refused():
    model = random_model("qwen2")
    model.config.attention_dropout = 0.1
    with pytest.raises(ModelError, match=r"attention_dropout.*0\.1"):
        Policy(model, VOCAB_SIZE)


def test_a_model_that_scales_its_logits_is_refused():
    config = GraniteConfig(
        vocab_size=MODEL_WIDTH, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, logits_scaling=8.0,
    )  # fmt: skip
    with pytest.raises(ModelError, match="GraniteForCausalLM"):
        Policy(AutoModelForCausalLM.from_config(config), VOCAB_SIZE)
    config.logits_scaling = 1.0
    Policy(AutoModelForCausalLM.from_config(config), VOCAB_SIZE)


def test_fewer_logits_than_tokens_are_refused():
    with pytest.raises(ModelError, match=f"{MODEL_WIDTH} logits and the tokenizer 17 tokens"):
        Policy(random_model("qwen2"), MODEL_WIDTH + 1)


def test_a_loaded_model_does_not_drop_out_even_in_training_mode(tmp_path):
    model = random_model("gpt2", torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5})
    )
    loaded = load_model(str(tmp_path), dtype=torch.float64)
    assert not loaded.training
    policy = Policy(loaded.train(), VOCAB_SIZE)
    batch = token_batch()
    logprobs, _ = policy(batch, temperature=1.0)
    expected, _ = reference(copy.deepcopy(loaded).eval(), batch, 1.0)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()


def test_a_trained_model_is_saved_without_our_attention(tmp_path):
    policy = random_policy()
    policy.model.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_the_tiny_model_loads_in_the_dtype_asked_for():
    assert load_model("tiny", dtype="bfloat16").dtype == torch.bfloat16
    assert load_model("tiny").dtype == torch.float32


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"cannot load the model folder .* expected 'tiny'"):
        load_model(str(tmp_path))


def test_weights_that_are_missing_are_not_left_at_random(tmp_path):
    model = random_model("llama", torch.float32)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float33", "int64", torch.int32])
def test_a_dtype_that_is_none_is_refused(dtype):
    with pytest.raises(ConfigurationError, match="floating-point"):
        load_model("tiny", dtype=dtype)
