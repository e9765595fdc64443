import hashlib
import itertools

import pytest
import torch
from click.testing import CliRunner
from paper.scripts import load
from safetensors.torch import load_file

pretrain = load("pretrain_tiny")


def drawn(diet, first=False, n=400):
    stream = pretrain.documents(0, pretrain.DIETS[diet])
    start = 0 if first else pretrain.FIRST_DOCUMENTS
    return list(itertools.islice(stream, start, start + n))


def test_the_shipped_model_read_these_documents():
    corpus = itertools.islice(pretrain.documents(0, pretrain.DIETS["mixed"]), 40000)
    digest = hashlib.sha256(repr([tuple(document) for document in corpus]).encode())
    expected = "8681230b123041a0d46455cc0531ac5473318332dc273993f567dc552e5be476"
    assert digest.hexdigest() == expected


def test_question_answer_text_has_no_template():
    for document in [*drawn("qa"), *drawn("qa", first=True)]:
        assert not document.prompt or document.prompt.endswith("?")
        assert "<" not in document.prompt


def test_in_text_no_solution_follows_a_bare_question():
    corpus = [*drawn("text"), *drawn("text", first=True)]
    for document in corpus:
        if document.prompt:
            assert document.prompt.startswith(("A conversation", "<|im_start|>", "Exercise:"))
        elif "?" in document.completion:
            assert "=" not in document.completion
    assert any("?" in d.completion and not d.prompt for d in corpus)


@pytest.mark.parametrize("diet", list(pretrain.DIETS))
def test_a_seed_makes_one_model(diet, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "FIRST_DOCUMENTS", 64)
    monkeypatch.setattr(pretrain, "CHUNK_DOCUMENTS", 256)
    monkeypatch.setattr(pretrain, "BATCH_TOKENS", 512)
    monkeypatch.setattr(pretrain, "EVAL_SAMPLES", 1)
    monkeypatch.setattr(pretrain, "MAX_NEW_TOKENS", 4)
    weights = []
    for run, seed in enumerate((3, 3, 4)):
        out = tmp_path / str(run)
        options = [f"--diet={diet}", "--steps=2", "--eval-questions=1"]
        command = [*options, f"--seed={seed}", f"--out={out}"]
        result = CliRunner().invoke(pretrain.main, command, catch_exceptions=False)
        assert result.exit_code == 0
        assert f"--diet {diet} --steps 2 --seed {seed}" in (out / "README.md").read_text()
        weights.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name], weights[2][name])
