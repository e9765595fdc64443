from __future__ import annotations

import pytest
import torch
from padded_model import save_padded_model
from transformers import AutoModelForCausalLM

from lmrl_env.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_padded_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


@pytest.fixture
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


@pytest.fixture
def other_model(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def prompts(tokenizer):
    return [tokenizer.encode("the answer"), tokenizer.encode("a question and " * 4)]
