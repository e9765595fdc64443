import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmrl_env import linear as module
from lmrl_env.linear import OneDNNLinear, linear, use_onednn
from lmrl_env.policy import load_model


@pytest.fixture(autouse=True)
def _even_small_layers(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_PRODUCTS", 1)


@pytest.fixture
def products(monkeypatch):
    """Return a list that grows with every product of oneDNN."""
    made = []
    multiply = module._multiply
    monkeypatch.setattr(
        module, "_multiply", lambda *args: made.append(args[0].shape) or multiply(*args)
    )
    return made


def tensors(shape, out, bias, needed=(True, True, True)):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape), torch.randn(out, shape[-1])
    made = [x, weight, torch.randn(out) if bias else None]
    return [t if t is None else t.requires_grad_(n) for t, n in zip(made, needed, strict=True)]


def in_float64(x, weight, bias, output_gradient):
    """Return output and gradients by plain formulas: y = xWᵀ + b."""
    x, weight, gradient = x.detach().double(), weight.detach().double(), output_gradient.double()
    y = x @ weight.T + (0 if bias is None else bias.detach().double())
    rows, inputs = gradient.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
    return y, gradient @ weight, rows.T @ inputs, rows.sum(0)


def close(own, expected):
    return (own - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "out"), [((48,), 32), ((7, 48), 32), ((2, 5, 48), 96), ((2, 3, 4, 16), 1)]
)
def test_output_and_gradients_are_those_of_float64(products, shape, out, bias):
    x, weight, b = tensors(shape, out, bias)
    y = linear(x, weight, b)
    output_gradient = torch.randn(*shape[:-1], out)
    y.backward(output_gradient)
    expected = in_float64(x, weight, b, output_gradient)
    assert len(products) == 3
    assert close(y, expected[0])
    assert close(x.grad, expected[1])
    assert close(weight.grad, expected[2])
    assert b is None or close(b.grad, expected[3])


def test_inputs_and_gradients_that_are_not_contiguous_are_read_rightly(products):
    x = torch.randn(6, 48, 5).transpose(1, 2)[::2].requires_grad_()
    weight = torch.randn(48, 32).T.requires_grad_()
    output_gradient = torch.randn(32, 5, 3).permute(2, 1, 0)
    y = linear(x, weight)
    own = torch.autograd.grad(y, (x, weight), output_gradient)
    expected = in_float64(x, weight, None, output_gradient)
    assert len(products) == 3
    assert all(close(a, b) for a, b in zip((y, *own), expected[:3], strict=True))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False,) * 3])
def test_gradients_that_nobody_needs_are_not_computed(products, needed):
    x, weight, bias = tensors((5, 16), 16, True, needed)
    y = linear(x, weight, bias)
    if any(needed):
        y.sum().backward()
    assert len(products) == 1 + needed[0] + needed[1]
    assert [t.grad is not None for t in (x, weight, bias)] == list(needed)


def test_no_rows_have_no_output_and_a_gradient_of_zero(products):
    x, weight, bias = tensors((0, 16), 16, True)
    y = linear(x, weight, bias)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert not products
    assert weight.grad.eq(0).all()
    assert bias.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(products, dtype):
    x, weight, bias = (t.detach().to(dtype) for t in tensors((5, 16), 16, True))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not products


def test_autocast_and_other_devices_are_left_to_pytorch(products):
    x, weight, bias = tensors((5, 16), 16, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x.to("meta"), weight.to("meta"), None).device.type == "meta"
    assert not products


def test_a_small_layer_is_left_to_pytorch(products, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_PRODUCTS", 5 * 16 * 16)
    linear(torch.ones(4, 16), torch.ones(16, 16))
    assert not products
    linear(torch.ones(5, 16), torch.ones(16, 16))
    assert len(products) == 1


def test_a_second_derivative_and_vmap_fail_clearly():
    x, weight, _ = tensors((5, 16), 16, False)
    (gradient,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(linear, (0, None))(x[:, None], weight)


def test_a_model_keeps_its_parameters_names_and_kinds():
    model = nn.Sequential(nn.Linear(16, 16), nn.Bilinear(4, 4, 4))
    before = model.state_dict()
    use_onednn(model)
    assert type(model[0]) is OneDNNLinear
    assert isinstance(copy.deepcopy(model)[0], OneDNNLinear)
    assert list(model.state_dict()) == list(before)
    assert all(model.state_dict()[name].data_ptr() == t.data_ptr() for name, t in before.items())


def test_all_layers_of_a_loaded_model_use_onednn_and_give_its_gradients(products):
    model, plain = load_model("tiny"), load_model("tiny")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert all(type(layer) is OneDNNLinear for layer in layers)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for layer in plain.modules():
        if type(layer) is OneDNNLinear:
            layer.__class__ = nn.Linear
    ids = torch.randint(400, (3, 40), generator=torch.Generator().manual_seed(0))
    logprobs = [m(input_ids=ids).logits.log_softmax(-1) for m in (model, plain)]
    assert len(products) == len(layers)
    assert (logprobs[0] - logprobs[1]).abs().max() < 5e-5
    for output in logprobs:
        output[..., 7].sum().backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-5 * other.grad.norm()


def test_a_loaded_model_in_float64_is_left_to_pytorch(products):
    model = load_model("tiny").double()
    assert model(input_ids=torch.ones(2, 20, dtype=torch.int64)).logits.dtype == torch.float64
    assert not products


def test_subclasses_such_as_quantised_layers_stay_as_they_are():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4))
    use_onednn(model)
    assert [type(layer) for layer in model] == [Own, OneDNNLinear]
