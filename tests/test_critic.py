from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from random_models import random_model
from test_policy import token_batch
from torch import nn

from lmrl_env.attention import use_packed_attention
from lmrl_env.critic import Critic, explained_variance


def random_critic(architecture, dtype=torch.float64):
    """Return a critic whose head is not zero."""
    model = random_model(architecture, dtype)
    use_packed_attention(model)
    critic = Critic(model).to(dtype)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(2))
        critic.head.bias.fill_(0.5)
    return critic


def one_row_at_a_time(critic, batch):
    """Return the values by Transformers' own forward of every prompt and response by itself."""
    critic.model.set_attn_implementation("sdpa")
    values = torch.zeros(batch.response_ids.shape, dtype=torch.float64)
    for i, prompt in enumerate(batch.prompt_index):
        start, length = int(batch.prompt_lengths[prompt]), int(batch.response_lengths[i])
        ids = torch.cat([batch.prompt_ids[prompt, :start], batch.response_ids[i, :length]])
        states = critic.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        for t in range(length):  # the state before token t is that of prompt and t tokens
            state = states[start + t - 1]
            values[i, t] = (state * critic.head.weight[0]).sum() + critic.head.bias[0]
    return values


def gradients(critic, values):
    critic.zero_grad()
    (values.flatten() * torch.linspace(-1, 2, values.numel(), dtype=values.dtype)).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in critic.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral"])
def test_values_and_gradients_are_those_of_the_state_before_each_token(architecture):
    critic, batch = random_critic(architecture), token_batch()
    values = critic(batch)
    found = gradients(critic, values)
    expected_values = one_row_at_a_time(critic, batch)
    expected = gradients(critic, expected_values)
    assert values.dtype == torch.float64
    assert torch.allclose(values, expected_values, atol=1e-9)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-8), name


def test_values_are_zero_behind_the_responses_and_padding_changes_none():
    critic, batch = random_critic("qwen2"), token_batch()
    values, wide = critic(batch), critic(token_batch(extra=3))
    width = values.shape[1]
    behind = torch.arange(width) >= batch.response_lengths[:, None]
    assert (values[behind] == 0).all() and (values[~behind] != 0).all()
    assert torch.allclose(wide[:, :width], values, atol=1e-12) and (wide[:, width:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_new_critic_values_every_state_at_zero_in_float32(dtype):
    model = random_model("qwen2", dtype)
    use_packed_attention(model)
    values = Critic(model).to(dtype)(token_batch())
    assert values.dtype == torch.float32 and (values == 0).all()


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", True), ("llama", False)])
def test_an_output_embedding_of_its_own_is_not_trained(architecture, tied):
    critic = Critic(random_model(architecture))
    assert critic.model.get_output_embeddings().weight.requires_grad == tied
    frozen = [name for name, p in critic.named_parameters() if not p.requires_grad]
    assert len(frozen) == (0 if tied else 1)


def test_a_critic_learns_the_returns_of_a_batch():
    critic, batch = random_critic("qwen2", torch.float32), token_batch()
    mask = torch.arange(batch.response_ids.shape[1]) < batch.response_lengths[:, None]
    returns = torch.linspace(-1, 1, len(mask))[:, None] * mask
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(critic(batch)[mask], returns[mask])
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


MASK = torch.tensor([[True, True, False], [True, True, False]])
RETURNS = torch.tensor([[1.0, 0.0, 9.0], [1.0, 0.0, 9.0]])  # of variance 1/4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1.0, 0.0, 5.0], [1.0, 0.0, 5.0]], 1.0),
        ([[0.5, 0.5, 5.0], [0.5, 0.5, 5.0]], 0.0),  # a constant explains nothing
        ([[4.0, 3.0, 5.0], [3.0, 3.0, 5.0]], 1 / 4),  # errors -3, -3, -2, -3 of variance 3/16
        ([[0.0, 1.0, 5.0], [0.0, 1.0, 5.0]], -3.0),  # errors 1, -1, 1, -1 of variance 1
    ],
)
def test_explained_variance_is_that_by_hand(accelerator, values, expected):
    found = explained_variance(accelerator, torch.tensor(values), RETURNS, MASK)
    assert found == pytest.approx(expected, abs=1e-9)


def test_equal_returns_leave_nothing_to_explain(accelerator):
    returns = torch.full((2, 3), 0.1)
    assert explained_variance(accelerator, torch.zeros(2, 3), returns, MASK) is None
