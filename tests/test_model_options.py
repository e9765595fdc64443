"""``--attention``, ``--gradient-checkpointing`` and ``--dtype``: other ways to the same numbers."""

from __future__ import annotations

import re

import pytest
import torch
from random_models import VOCAB_SIZE, random_model
from safetensors.torch import load_file
from test_algos_run import train
from test_policy import loss_gradients, token_batch

from algos.dr_grpo import Args
from lmrl_env.adapters import add_adapters
from lmrl_env.critic import Critic
from lmrl_env.errors import ConfigurationError
from lmrl_env.policy import Policy, load_model
from lmrl_env.run_setup import load_trained_model

RIGHT_AND_WRONG = {"steps": 1, "checkpoint_every": 0}
FLASH = "attention 'flash_attention_2' on the device 'cpu': expected a CUDA device"


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("lmrl_env.run.plot_curves", lambda *args: None)


@pytest.fixture
def folder(tmp_path):
    """A model that is far from uniform, in the Transformers format."""
    random_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def count_forwards(model) -> list[str]:
    """Return a list that grows by an entry with every forward of the first block."""
    forwards: list[str] = []
    model.base_model.layers[0].register_forward_pre_hook(lambda *_: forwards.append("block"))
    return forwards


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointed_gradients_are_the_same_though_each_block_runs_twice(folder, attention, lora):
    def gradients(checkpointed: bool):
        torch.manual_seed(1)
        model = load_model(
            folder, dtype="float64", attention=attention, gradient_checkpointing=checkpointed
        )
        if lora:
            add_adapters(model, 2)
        forwards = count_forwards(model)
        policy = Policy(model, VOCAB_SIZE)
        forwards.clear()
        logprobs, _ = policy(token_batch(), temperature=1.0)
        assert len(forwards) == 1
        logprobs.square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return found, len(forwards)

    expected, once = gradients(False)
    found, twice = gradients(True)
    assert (once, twice) == (1, 2)
    assert any(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_critic_recomputes_its_blocks_too(folder):
    def gradients(checkpointed: bool):
        critic = Critic(load_model(folder, gradient_checkpointing=checkpointed)).double()
        torch.nn.init.ones_(critic.head.weight)
        forwards = count_forwards(critic.model)
        critic(token_batch()).square().sum().backward()
        found = {n: p.grad for n, p in critic.named_parameters() if p.requires_grad}
        return found, len(forwards)

    expected, once = gradients(False)
    found, twice = gradients(True)
    assert (once, twice) == (1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_gives_the_same_logprobs_and_gradients(folder, attention):
    batch = token_batch()
    packed, other = (
        Policy(load_model(folder, attention=name), VOCAB_SIZE) for name in ("packed", attention)
    )
    assert other.model.config._attn_implementation == attention
    expected, _ = packed(batch, temperature=1.0)
    logprobs, _ = other(batch, temperature=1.0)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-5)
    expected_gradients = loss_gradients(packed.model, expected)
    gradients = loss_gradients(other.model, logprobs)
    scale = max(float(g.abs().max()) for g in expected_gradients.values())
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=2e-5 * scale)


def test_flash_attention_without_cuda_or_in_float32_is_refused_by_name(folder):
    with pytest.raises(ConfigurationError, match=re.escape(FLASH)):
        load_model(folder, attention="flash_attention_2")
    with pytest.raises(ConfigurationError, match=re.escape(FLASH)):
        args = Args(attention="flash_attention_2", dtype="bfloat16")
        load_trained_model(args, None, "cpu")
    with pytest.raises(ConfigurationError, match="has no float32: add --dtype bfloat16"):
        load_trained_model(Args(attention="flash_attention_2"), None, "cpu")


def test_a_model_that_cannot_do_without_its_activations_is_named(folder, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(ConfigurationError, match="does not fit LlamaForCausalLM"):
        load_model(folder, gradient_checkpointing=True)


def test_a_run_is_the_same_with_other_attention_and_recomputed_activations(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "lmrl_env.run_setup.load_model",
        lambda *args, **kw: loaded.append(kw) or load_model(*args, **kw),
    )
    options = {"attention": "eager", "gradient_checkpointing": True}
    expected = train("ppo", tmp_path / "packed", **RIGHT_AND_WRONG)
    found = train("ppo", tmp_path / "other", **RIGHT_AND_WRONG, **options)
    assert len(loaded) == 4  # policy and critic of each
    assert all(kwargs.items() >= options.items() for kwargs in loaded[2:])
    for row, other in zip(expected[1:], found[1:], strict=True):
        for key in ("policy/grad_norm", "policy/entropy", "critic/loss", "critic/grad_norm"):
            assert other[key] == pytest.approx(row[key], rel=1e-3) and row[key] > 0, key


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_mixed_precision_keeps_weights_and_optimizer_in_float32(tmp_path, lora_rank):
    (_, row) = train(
        "ppo",
        tmp_path,
        **RIGHT_AND_WRONG,
        dtype="bfloat16",
        lora_rank=lora_rank,
        gradient_checkpointing=True,
    )
    assert row["mismatch/canary_logprob_abs_max"] < 0.05
    assert row["policy/grad_norm"] > 0 and row["critic/loss"] > 0
    files = [
        file
        for file in (tmp_path / "checkpoints" / "step-1").rglob("*.safetensors")
        if file.stem != "random_states"
    ]
    assert len(files) == (4 if lora_rank is None else 5)
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}, file
