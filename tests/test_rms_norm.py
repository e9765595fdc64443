import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from lmrl_env.policy import load_model
from lmrl_env.rms_norm import FusedRMSNorm, use_fused_norms


def pair(size=48, dtype=torch.float32):
    torch.manual_seed(0)
    plain = nn.Sequential(Qwen2RMSNorm(size, 1e-3)).to(dtype)
    nn.init.normal_(plain[0].weight)
    fused = copy.deepcopy(plain)
    use_fused_norms(fused)
    return fused[0], plain[0]


def close(own, other):
    return (own - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("shape", [(48,), (1, 7, 48), (2, 3, 4, 48)])
def test_values_and_gradients_are_those_of_transformers(shape):
    fused, plain = pair()
    assert type(fused) is FusedRMSNorm
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [norm(y) for norm, y in zip((fused, plain), inputs, strict=True)]
    assert close(*outputs)
    gradient = torch.randn(shape)
    for output in outputs:
        output.backward(gradient)
    assert close(inputs[0].grad, inputs[1].grad)
    assert close(fused.weight.grad, plain.weight.grad)


def test_frozen_weights_and_inputs_have_no_gradient():
    fused, _ = pair()
    x = torch.randn(5, 48)
    fused(x).sum().backward()
    assert fused.weight.grad is not None
    fused.requires_grad_(False)
    fused(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_transformers(dtype):
    fused, plain = pair(dtype=dtype)
    x = torch.randn(5, 48, dtype=dtype)
    assert torch.equal(fused(x), plain(x))


def test_norms_of_another_formula_stay_as_they_are(monkeypatch):
    model = nn.Sequential(GemmaRMSNorm(16))
    use_fused_norms(model)
    assert type(model[0]) is GemmaRMSNorm
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: x * (1 + self.weight))
    model = nn.Sequential(LlamaRMSNorm(16))
    use_fused_norms(model)
    assert type(model[0]) is LlamaRMSNorm


def test_all_norms_of_a_loaded_model_are_fused():
    names = [type(m).__name__ for m in load_model("tiny").modules() if "Norm" in type(m).__name__]
    assert set(names) == {"FusedRMSNorm"}
    assert len(names) == 9
