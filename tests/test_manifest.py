"""What a run says it will do, before it does it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from algos_files import ALGORITHMS, NAMES, each
from hypothesis import given
from hypothesis import strategies as st
from test_batches import make_rollout
from test_run import ENVIRONMENT, command, train
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos.dr_grpo import Args
from lmrl_env.attention import use_packed_attention
from lmrl_env.batches import micro_batch_rows
from lmrl_env.errors import ConfigurationError, ModelError
from lmrl_env.manifest import most_micro_batches, questions_hash
from lmrl_env.model_size import model_size, training_memory, weights_fingerprint
from lmrl_env.normaliser import follows_contract, normaliser
from lmrl_env.packed_row import PackedLayout
from lmrl_env.policy import Policy, TokenBatch, load_model
from lmrl_env.questions import load_questions
from lmrl_env.settings import check_settings
from lmrl_env.tokenizer import TINY_MODEL

SEVEN_B = Qwen2Config(
    architectures=["Qwen2ForCausalLM"],
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory):
    """Return the folder of a 7B model without weights."""
    folder = tmp_path_factory.mktemp("models") / "seven-b"
    shutil.copytree(TINY_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", "gen*"))
    SEVEN_B.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmrl_env.run.plot_curves", lambda *args: None)
        train(folder, steps=1, eval_questions=99, updates_per_step=2)
    return json.loads((folder / "manifest.json").read_text())


def test_a_run_saves_what_its_steps_are(manifest):
    assert manifest["step"] == {
        "questions": 2,
        "group_size": 2,
        "responses": 4,
        "max_new_tokens": 64,
        "response_tokens_at_most": 256,
        "questions_per_rank": 2,
        "optimizer_steps": 2,
    }
    assert manifest["optimizer_step"] == {
        "questions": 1,
        "responses": 2,
        "response_tokens_at_most": 128,
        "micro_batch_tokens": 8192,
        "micro_batches_of_a_rank_at_most": 1,
        "normaliser": ["responses", "max_new_tokens"],
    }
    assert manifest["run"] == {
        "steps": 1,
        "responses": 4,
        "epochs_over_the_questions": 2 / 40,
        "evaluations": 2,
        "evaluation_responses": 80,
    }
    assert manifest["ranks"] == 1 and manifest["engine"] == "local" and manifest["device"] == "cpu"
    assert manifest["versions"]["torch"] and "commit" in manifest
    (note,) = manifest["notes"]
    assert note == "an evaluation asks all 40 held-out questions, fewer than --eval-questions 99"


def test_question_sets_and_weights_are_known_by_their_hashes(manifest, tmp_path):
    questions = load_questions("arithmetic:size=40", split="train")
    lines = [json.dumps([q.id, q.question, q.answer]) + "\n" for q in questions]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert manifest["train_questions"]["sha256"] == expected
    assert manifest["eval_questions"]["sha256"] not in ("", expected)
    assert questions_hash(questions[1:]) != expected
    assert manifest["model"]["weights"] == weights_fingerprint("tiny")
    shutil.copy(TINY_MODEL / "model.safetensors", tmp_path)
    assert weights_fingerprint(str(tmp_path)) == weights_fingerprint("tiny")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert weights_fingerprint(str(tmp_path)) != weights_fingerprint("tiny")


@each(*NAMES)
def test_the_normaliser_is_that_of_the_loss(name):
    expected = {
        ("dr_grpo", "ppo", "reinforce_pp"): ["responses", "max_new_tokens"],
        ("dapo", "cispo", "lite_ppo"): ["tokens"],
        ("grpo", "gspo"): ["responses", "length"],
        ("rloo",): ["responses"],
    }
    (counts,) = [counts for names, counts in expected.items() if name in names]
    assert normaliser(ALGORITHMS[name].policy_loss) == counts


def test_losses_of_another_shape_are_not_asked():
    assert follows_contract(ALGORITHMS["grpo"].policy_loss)
    assert not follows_contract(None)
    assert not follows_contract(lambda logprobs, mask: None)
    assert not follows_contract(lambda a, b, c, d, e, needed: None)


lengths = st.integers(1, 5).flatmap(
    lambda groups: st.tuples(
        st.lists(st.integers(1, 9), min_size=groups, max_size=groups),
        st.lists(st.integers(1, 6), min_size=2 * groups, max_size=2 * groups),
    )
)


@given(lengths, st.integers(1, 60))
def test_no_batch_makes_more_micro_batches_than_were_announced(lengths, max_tokens):
    rollout = make_rollout(*lengths, group_size=2)
    cuts = micro_batch_rows(rollout, np.arange(len(rollout.rewards)), 2, max_tokens)
    longest = int(rollout.prompt_lengths.max()), int(rollout.response_lengths.max())
    assert len(cuts) <= most_micro_batches(len(lengths[0]), 2, *longest, max_tokens)


# --- the model's size


def test_the_size_of_a_model_is_that_of_its_weights(seven_b):
    size = model_size("tiny")
    model = load_model("tiny")
    assert size.parameters == sum(p.numel() for p in model.parameters())
    # Each block: four attention matrices and their biases, three of the feed-forward part, two
    # norms; then the last norm and two embeddings.
    h, kv, inner, vocab = 3584, 512, 18944, 152064
    block = 2 * h * h + 2 * h * kv + h + 2 * kv + 3 * h * inner + 2 * h
    assert model_size(str(seven_b)).parameters == 28 * block + h + 2 * vocab * h


def test_a_model_without_a_configuration_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="the size of"):
        model_size(str(tmp_path))


def estimate(size, **kwargs):
    settings = {
        "tokens": 100,
        "bfloat16": False,
        "checkpointing": False,
        "lora_rank": None,
        "critic": False,
        "reference": False,
        "shards": 1,
    }
    return {item.name: item.bytes for item in training_memory(size, **{**settings, **kwargs})}


def test_the_memory_of_weights_and_optimiser_follows_the_settings():
    size = model_size("tiny")
    plain = estimate(size)
    assert plain["weights"] == plain["gradients"] == 4 * size.parameters
    assert plain["Adam"] == 8 * size.parameters and "reference" not in plain
    assert estimate(size, reference=True)["reference"] == 4 * size.parameters
    assert estimate(size, critic=True)["Adam"] == 2 * plain["Adam"]
    assert estimate(size, shards=4)["gradients"] == plain["gradients"] // 4
    assert estimate(size, lora_rank=2)["Adam"] == 8 * 2 * size.adapter_width
    assert estimate(size, checkpointing=True)["activations"] < plain["activations"] / 2
    assert estimate(size, bfloat16=True)["activations"] < plain["activations"]


@pytest.mark.parametrize(("hidden", "inner", "keys"), [(64, 96, 2), (64, 256, 1), (96, 128, 4)])
def test_activations_are_estimated_within_a_tenth_of_what_autograd_keeps(
    monkeypatch, hidden, inner, keys
):
    def attend_as_on_a_gpu(layout, module, *tokens_and_scaling):  # on the CPU it keeps less
        layout.attended += 1
        *tokens, scaling = tokens_and_scaling
        tokens = (x[0].transpose(0, 1) for x in tokens)
        return layout._attend_by_copies(module, *tokens, scaling)[None]

    monkeypatch.setattr(PackedLayout, "attend", attend_as_on_a_gpu)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=keys,
    )
    model = Qwen2ForCausalLM(config).eval()
    use_packed_attention(model)
    groups, group_size, prompt, response = 3, 4, 30, 40
    batch = TokenBatch(
        torch.randint(0, 64, (groups, prompt)),
        torch.full((groups,), prompt),
        torch.arange(groups).repeat_interleave(group_size),
        torch.randint(0, 64, (groups * group_size, response)),
        torch.full((groups * group_size,), response),
    )
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Policy(model, 64)(batch, temperature=1.0, with_entropy=True)
    logits = groups * group_size * response * 64 * 4
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - logits
    tokens = groups * prompt + groups * group_size * (response - 1)
    block = 10 * hidden + 4 * (keys * hidden // 4) + 4 * inner
    assert tokens * 3 * block * 4 == pytest.approx(measured, rel=0.1)


# --- the dry run


def test_a_dry_run_of_a_model_without_weights_prints_its_plan_and_leaves_nothing(seven_b, tmp_path):
    result = subprocess.run(
        [
            *command("--dry-run", f"--model={seven_b}", "--max-new-tokens=3000"),
            *("--prompts-per-step=128", "--updates-per-step=8", "--dtype=bfloat16"),
            "--questions=arithmetic:size=100",
        ],
        env={**ENVIRONMENT, "COLUMNS": "80"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = result.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 80 and not list(tmp_path.iterdir())
    text = " ".join(result.stdout.split())
    for expected in (
        "128 questions × 8 responses × 3,000 tokens = at most 3,072,000",
        "loss: sum over tokens / (responses × max_new_tokens) 128 × 3,000 = 384,000",
        "7,615,616,512 parameters",
        "28.37 GiB weights 7,615,616,512 × 4 B",
        "a step asks the 100 questions 1.3 times: the set goes round",
    ):
        assert expected in text


def test_a_dry_run_loads_no_weights_and_ends_with_0(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lmrl_env.run_setup.load_model", lambda *args, **kwargs: pytest.fail("loaded")
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "run", dry_run=True)
    assert signal.getsignal(signal.SIGINT) == before
    assert ended.value.code == 0 and not (tmp_path / "run").exists()


def test_a_rows_own_micro_batch_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", dry_run=True, micro_batch_tokens=100)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\d+ \+ 64 = \d+ tokens, more than --micro-batch-tokens 100", said)


def test_a_set_smaller_than_a_step_goes_round(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lmrl_env.run.plot_curves", lambda *args: None)
    questions = tmp_path / "two.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logged = train(tmp_path / "run", steps=1, questions=str(questions), prompts_per_step=5)
    said = " ".join(capsys.readouterr().out.split())
    assert "a step asks the 2 questions 2.5 times: the set goes round" in said
    assert logged[1]["step"] == 1 and logged[0]["eval/questions"] == 1


# --- settings


def test_settings_that_contradict_each_other_are_told_all_at_once_with_the_arithmetic():
    args = Args(
        steps=0,
        prompts_per_step=6,
        updates_per_step=7,
        max_new_tokens=9000,
        temperature=0.0,
    )
    with pytest.raises(ConfigurationError) as refused:
        check_settings(args, ranks=4)
    text = str(refused.value)
    assert text.startswith("5 settings cannot be meant:\n  --steps 0: expected at least 1\n")
    for expected in (
        "--temperature 0.0: expected above 0",
        "--prompts-per-step 6 is not a multiple of the 4 ranks: use 4",
        "--updates-per-step 7: 6 questions cannot be cut into so many parts",
        "the context of tiny leaves 8192 - 9000 = -808 tokens for a question",
    ):
        assert expected in text


@pytest.mark.parametrize(
    "settings", [{"engine": "vllm_server"}, {"engine": "local", "servers": "http://127.0.0.1:8000"}]
)
def test_an_engine_without_its_servers_and_servers_without_their_engine_are_refused(settings):
    with pytest.raises(ConfigurationError, match=r"^--servers .* with --engine .*: expected"):
        check_settings(Args(**settings), ranks=1)
    check_settings(Args(engine="vllm_server", servers="http://127.0.0.1:8000"), ranks=1)


def test_a_single_contradiction_stands_alone():
    with pytest.raises(ConfigurationError, match=r"^--steps 0: expected at least 1$"):
        check_settings(Args(steps=0), ranks=1)
    check_settings(Args(), ranks=1)
