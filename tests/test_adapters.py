from __future__ import annotations

import json
import re
import shutil
import weakref

import pytest
import torch
from accelerate import Accelerator
from algos_files import NAMES, each
from peft import PeftModel
from random_models import VOCAB_SIZE, random_model
from safetensors.torch import load_file
from test_algos_run import TINY, train
from test_policy import token_batch
from test_run import rows, timeless
from transformers import AutoModelForCausalLM

from lmrl_env.adapters import (
    ADAPTER_FOLDER,
    WithoutAdapters,
    adapter_weights,
    adapters_disabled,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from lmrl_env.attention import use_attention
from lmrl_env.critic import Critic
from lmrl_env.engines.local import LocalEngine
from lmrl_env.errors import ModelError
from lmrl_env.policy import Policy, load_model
from lmrl_env.tokenizer import TINY_MODEL, load_tokenizer
from lmrl_env.weight_sync import sync_weights

ARCHITECTURES = pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
LINEAR_LAYERS = {"qwen2": 7, "llama": 7, "gpt2": 4}  # of a block
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("lmrl_env.run.plot_curves", lambda *args: None)


def adapted_model(architecture: str, *, rank: int = 3, trained: bool = True):
    model = random_model(architecture)
    add_adapters(model, rank)
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
    return model


def merged(model):
    return dict(merge_adapters(model, model.state_dict().items()))


def save(folder, model):
    save_adapters(folder, model, adapter_weights(model.state_dict().items()))


@ARCHITECTURES
def test_a_model_with_new_adapters_is_the_base_exactly(architecture):
    expected = random_model(architecture)(input_ids=IDS).logits
    model = adapted_model(architecture, trained=False)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    base = random_model(architecture).state_dict()
    assert merged(model).keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged(model).items())


@ARCHITECTURES
def test_two_small_matrices_of_each_linear_layer_of_the_blocks_are_trained(architecture):
    model = adapted_model(architecture)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * LINEAR_LAYERS[architecture]
    assert all("lora_" in name and 3 in parameter.shape for name, parameter in trained.items())
    assert not any("lm_head" in name for name in trained)


@ARCHITECTURES
def test_merged_weights_are_those_that_peft_merges_from_the_files(architecture, tmp_path):
    model = adapted_model(architecture)
    save(tmp_path / "adapter", model)
    theirs = PeftModel.from_pretrained(random_model(architecture), tmp_path / "adapter")
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(theirs(input_ids=IDS).logits, logits, rtol=0, atol=1e-12)
    expected = theirs.merge_and_unload().state_dict()
    torch.testing.assert_close(merged(model), dict(expected), rtol=0, atol=1e-12)

    plain = random_model(architecture, seed=1)
    plain.load_state_dict(merged(model))
    torch.testing.assert_close(plain(input_ids=IDS).logits, logits, rtol=0, atol=1e-10)


def test_tied_embeddings_stay_tied_in_merged_weights():
    weights = merged(adapted_model("qwen2"))
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    assert embedding.data_ptr() == head.data_ptr()


def test_one_merged_matrix_exists_at_a_time():
    model = adapted_model("llama")
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    before = None
    for _, tensor in merge_adapters(model, model.state_dict().items()):
        assert before is None or before() is None
        before = weakref.ref(tensor) if tensor.data_ptr() not in own else None
        del tensor


@ARCHITECTURES
def test_gradients_of_adapters_are_those_through_the_merged_weights(architecture):
    model = adapted_model(architecture)
    use_attention(model, "packed")
    batch = token_batch()
    Policy(model, VOCAB_SIZE)(batch, temperature=1.0)[0].square().sum().backward()

    plain = random_model(architecture)
    plain.load_state_dict(merged(model))
    Policy(plain, VOCAB_SIZE)(batch, temperature=1.0)[0].square().sum().backward()
    adapted = [(n, layer) for n, layer in model.named_modules() if hasattr(layer, "lora_A")]
    for name, layer in adapted:
        full = plain.get_submodule(name).weight.grad
        full = full.T if architecture == "gpt2" else full  # (out, in)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # W = W₀ + (32 / 3) B A
        torch.testing.assert_close(up.grad, 32 / 3 * full @ down.T, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(down.grad, 32 / 3 * up.T @ full, rtol=1e-7, atol=1e-9)


def test_without_its_adapters_a_policy_is_the_base_and_has_no_gradient():
    batch = token_batch()
    base = Policy(random_model("llama"), VOCAB_SIZE)
    policy = Policy(adapted_model("llama"), VOCAB_SIZE)
    trained, _ = policy(batch, temperature=0.7)
    reference, _ = WithoutAdapters(policy)(batch, temperature=0.7)
    assert torch.equal(reference, base(batch, temperature=0.7)[0])
    assert not reference.requires_grad and not torch.equal(reference, trained)
    assert torch.equal(policy(batch, temperature=0.7)[0], trained)
    with pytest.raises(RuntimeError, match="by an error"), adapters_disabled(policy.model):
        raise RuntimeError("left by an error")
    assert torch.equal(policy(batch, temperature=0.7)[0], trained)


def test_the_critic_trains_its_adapters_and_its_head():
    critic = Critic(adapted_model("llama"))
    trained = [name for name, p in critic.named_parameters() if p.requires_grad]
    assert {"head.weight", "head.bias"} < set(trained)
    assert all("lora_" in name or name.startswith("head.") for name in trained)


def test_adapters_of_another_rank_or_none_are_refused_by_name(tmp_path):
    save(tmp_path / "adapter", adapted_model("llama"))
    with pytest.raises(ModelError, match=r"down_proj.*\(3, 48\), expected \(2, 48\).*--lora-rank"):
        load_adapters(tmp_path / "adapter", adapted_model("llama", rank=2))
    with pytest.raises(ModelError, match="expected adapters; resume a run of all weights"):
        load_adapters(tmp_path, adapted_model("llama"))


def test_an_engine_samples_from_the_merged_weights():
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny")
    add_adapters(model, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    policy = Policy(model, tokenizer.vocab_size)
    canary = {"prompt_ids": [5, 6, 7], "temperature": 1.0, "max_new_tokens": 8, "dtype": "float32"}
    engine = LocalEngine(load_model("tiny"), tokenizer)
    gap = sync_weights(Accelerator(cpu=True), policy, engine, 3, **canary)
    assert gap < 1e-4 and engine.version == 3


# --- runs


LORA = {**TINY, "lora_rank": 4, "lr": 1e-2}


@each(*NAMES)
def test_every_algorithm_trains_adapters(name, tmp_path):
    settings = {**LORA, "entropy_coef": 0.01}
    if name == "dapo":
        settings["overlong_filter"] = False  # all of such short responses are truncated
    (_, row) = train(name, tmp_path, **settings)
    assert row["policy/grad_norm"] > 0
    assert row["mismatch/canary_logprob_abs_max"] < 1e-4
    checkpoint = tmp_path / "checkpoints" / "step-1"
    adapters = load_file(checkpoint / ADAPTER_FOLDER / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)


def test_the_reference_of_a_run_of_adapters_is_its_start(tmp_path, monkeypatch):
    references = []
    monkeypatch.setattr(
        "lmrl_env.run_setup.WithoutAdapters",
        lambda policy: references.append(policy) or WithoutAdapters(policy),
    )
    (_, first, second) = train(
        "grpo", tmp_path, **LORA | {"steps": 2, "updates_per_step": 1, "entropy_coef": 0.01}
    )
    assert first["policy/ref_kl"] == 0.0 < second["policy/ref_kl"]
    assert len(references) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmrl_env.run.plot_curves", lambda *args: None)
        train("grpo", folder, **{**LORA, "steps": 2, "checkpoint_every": 1, "entropy_coef": 0.01})
    return folder


def test_a_run_of_adapters_goes_on_bit_for_bit(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step-2")
    settings = {**LORA, "steps": 2, "checkpoint_every": 1, "entropy_coef": 0.01}
    resumed = train("grpo", folder, **settings, resume=str(folder))
    assert timeless(resumed) == timeless(rows(finished))
    for file in (
        "model.safetensors",
        "trainer/optimizer.safetensors",
        f"{ADAPTER_FOLDER}/adapter_model.safetensors",
    ):
        expected = load_file(finished / "checkpoints/step-2" / file)
        found = load_file(folder / "checkpoints/step-2" / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), file


def test_the_checkpoint_of_a_run_of_adapters_is_a_model_like_any_other(finished):
    checkpoint = finished / "checkpoints" / "step-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() == load_file(TINY_MODEL / "model.safetensors").keys()
    ids = torch.arange(20)[None]
    logits = load_model(str(checkpoint))(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert (logits - base(input_ids=ids).logits).abs().max() > 1e-3
    theirs = PeftModel.from_pretrained(base, checkpoint / ADAPTER_FOLDER)
    torch.testing.assert_close(theirs(input_ids=ids).logits, logits, rtol=0, atol=1e-4)
    config = json.loads((checkpoint / ADAPTER_FOLDER / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 32
    assert re.fullmatch(r".*tiny", config["base_model_name_or_path"])
