"""Optimiser steps that fail: memory that runs out, and numbers that are not finite."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_batches import V, make_rollout
from test_run import rows, train
from transformers import Qwen2Config, Qwen2ForCausalLM

import algos.dr_grpo
from algos.dr_grpo import compute_advantages, policy_loss
from lmrl_env.batch_plan import BatchPlan
from lmrl_env.batches import token_metrics
from lmrl_env.errors import TrainingError
from lmrl_env.memory import is_out_of_memory
from lmrl_env.policy import Policy
from lmrl_env.tokenizer import TINY_MODEL
from lmrl_env.updates import MAX_SKIPPED, Updates

CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to "
    "allocate 4000000000000 bytes."
)
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_SAYS)]


class FragilePolicy(Policy):
    """Fails above a number of tokens, or turns the log-probs or gradients of one row to NaN."""

    most_tokens: float = math.inf
    error: BaseException = OUT_OF_MEMORY[0]
    fails_in_backward = False
    bad_ids: torch.Tensor | None = None
    bad = "logprobs"
    before_forward = staticmethod(lambda tokens: None)

    def forward(self, batch, **kwargs):
        self.before_forward(batch)
        tokens = int(batch.prompt_lengths.sum() + batch.response_lengths.sum())
        logprobs, entropy = super().forward(batch, **kwargs)
        if tokens > self.most_tokens:
            if not self.fails_in_backward:
                raise self.error
            logprobs.register_hook(self._fail)
        if self.bad_ids is not None:
            width = min(logprobs.shape[1], len(self.bad_ids))
            same = (batch.response_ids[:, :width] == self.bad_ids[:width]).all(dim=1)
            if self.bad == "logprobs":
                logprobs = torch.where(same[:, None], torch.nan, logprobs)
            else:
                logprobs.register_hook(lambda g: torch.where(same[:, None], torch.inf, g))
        return logprobs, entropy

    def _fail(self, gradient):
        raise self.error


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def setup(accelerator, max_tokens=10**6, report=None):
    """Return policy, updates and a batch of 3 groups of 2."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    policy = FragilePolicy(Qwen2ForCausalLM(config).double(), V)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    plan = BatchPlan(
        accelerator, questions=3, group_size=2, updates=1, epochs=1, max_tokens=max_tokens, seed=0,
        report=report,
    )  # fmt: skip
    batch = make_rollout([5, 4, 6], [3, 6, 2, 5, 4, 6], group_size=2)
    batch = batch._replace(rewards=np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
    return SimpleNamespace(
        policy=policy,
        optimizer=optimizer,
        plan=plan,
        batch=batch,
        updates=Updates(plan, policy, optimizer, max_grad_norm=1e9),
    )


def forward_and_backward(run, batch=None):
    """Do the part of the algorithms' loop that fills the gradients."""
    batch = run.batch if batch is None else batch
    indices = np.arange(len(batch.rewards))
    advantages = compute_advantages(torch.from_numpy(batch.rewards), 2)
    totals = run.plan.totals(batch, indices)
    for micro in run.updates.micro_batches(batch, indices):
        with run.updates.micro_step(micro):
            logprobs, entropy = run.policy(micro.tokens, temperature=1.0, with_entropy=True)
            old = torch.where(micro.mask, logprobs.detach() - 0.1, logprobs.detach())
            loss, metrics = policy_loss(
                logprobs, old, micro.part(advantages), micro.mask, totals, clip_eps_high=1.0
            )
            metrics |= token_metrics(micro, logprobs, old, entropy, totals)
            run.updates.backward(loss, metrics)


def gradient(run):
    return torch.cat([p.grad.ravel() for p in run.policy.parameters()])


@pytest.fixture
def undisturbed(accelerator):
    """Return gradient and metrics of an optimiser step that memory suffices for."""
    run = setup(accelerator)
    forward_and_backward(run)
    found = gradient(run)
    run.updates.step()
    return found, run.updates.metrics()


# --- memory


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("max_tokens", [10**6, 16], ids=["first", "third"])  # that fails
def test_memory_that_runs_out_changes_neither_gradient_nor_metrics(
    accelerator, undisturbed, error, in_backward, max_tokens
):
    said = []
    run = setup(accelerator, max_tokens, lambda what, detail, batch, causes: said.append(what))
    run.policy.most_tokens, run.policy.error = 15, error
    run.policy.fails_in_backward = in_backward
    forward_and_backward(run)
    expected, metrics = undisturbed
    assert (gradient(run) - expected).norm() <= 1e-6 * expected.norm()
    run.updates.step()
    found = run.updates.metrics()
    budget = found.pop("policy/micro_batch_tokens")
    assert 12 <= budget == run.plan.max_tokens <= 15
    assert found == pytest.approx({k: v for k, v in metrics.items() if "tokens" not in k})
    assert said[0] == f"out of memory in a micro-batch of at most {max_tokens} tokens"
    told = len(said)
    forward_and_backward(run)  # the smaller budget is remembered
    assert len(said) == told


def test_a_batch_far_below_the_budget_is_cut_at_the_first_failure(accelerator):
    run = setup(accelerator, max_tokens=10**6)  # the batch has 41 tokens
    run.policy.most_tokens = 30
    passes = []
    run.policy.before_forward = lambda tokens: passes.append(len(tokens.response_ids))
    forward_and_backward(run)
    assert sum(passes[2:]) == 6 and passes[0] == 6 and passes[1] == 1  # failed, empty, all again


def test_the_failed_micro_batch_is_freed_before_the_next_large_one(accelerator):
    run = setup(accelerator)
    run.policy.most_tokens, run.policy.fails_in_backward = 20, True
    states, alive = [], []
    run.policy.register_forward_hook(lambda _, __, out: states.append(weakref.ref(out[0])))

    def look(tokens):
        if states and not alive and len(tokens.response_ids) > 1:
            gc.collect()
            alive.append(states[0]() is not None)

    run.policy.before_forward = look
    forward_and_backward(run)
    assert alive == [False]


def test_a_response_that_memory_does_not_suffice_for_is_refused(accelerator):
    run = setup(accelerator)
    run.policy.most_tokens = 9
    with pytest.raises(TrainingError, match=re.escape("one response with its question has 12")):
        forward_and_backward(run)


def test_other_errors_are_not_taken_for_a_lack_of_memory(accelerator):
    run = setup(accelerator)
    run.policy.most_tokens, run.policy.error = 20, RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size mismatch"):
        forward_and_backward(run)
    run.policy.float()
    with pytest.raises(RuntimeError, match="size mismatch"):
        run.plan.logprobs(run.policy, run.batch, 1.0)


def test_a_sharded_module_cannot_begin_anew_and_says_what_to_change(accelerator):
    run = setup(accelerator, max_tokens=64)
    run.plan.accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, num_processes=2, process_index=1
    )
    message = "rank 1 is out of memory.*--micro-batch-tokens 32"
    with pytest.raises(TrainingError, match=message):
        run.plan.check_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_what_the_allocator_of_this_machine_says_is_recognised():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_scores_are_those_of_enough_memory(accelerator):
    run = setup(accelerator)
    run.policy.float()
    expected = run.plan.logprobs(run.policy, run.batch, 1.0)
    run.policy.most_tokens = 20
    found = run.plan.logprobs(run.policy, run.batch, 1.0)
    assert torch.allclose(found, expected, atol=1e-6) and run.plan.max_tokens <= 20
    run.policy.most_tokens = 9
    with pytest.raises(TrainingError, match="out of memory"):
        run.plan.logprobs(run.policy, run.batch, 1.0)


# --- numbers that are not finite


def state(run):
    return [
        tensor.clone()
        for tensor in (
            *run.policy.state_dict().values(),
            *(v for s in run.optimizer.state.values() for v in s.values()),
        )
    ]


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ("logprobs", ["policy/loss", "policy/clip_fraction_low", "policy/approx_kl"]),
        ("gradient", ["gradient"]),
    ],
)
def test_a_step_that_is_not_finite_moves_nothing_and_names_its_responses(accelerator, bad, names):
    reports = []
    run = setup(accelerator, max_tokens=20, report=lambda *args: reports.append(args))
    forward_and_backward(run)
    run.updates.step()
    run.updates.metrics()
    before = state(run)
    run.policy.bad_ids, run.policy.bad = torch.from_numpy(run.batch.response_ids[3]), bad
    forward_and_backward(run)
    run.updates.step()
    assert all(torch.equal(a, b) for a, b in zip(before, state(run), strict=True))
    assert all(p.grad is None for p in run.policy.parameters())
    found = run.updates.metrics()
    assert found["policy/skipped_updates"] == 1
    assert found["policy/grad_norm"] is found["policy/entropy"] is found["policy/loss"] is None
    ((what, detail, _, causes),) = reports
    assert what == "the loss or gradient of the policy is not finite"
    assert "1 of its 6 responses are not finite alone" in detail
    assert list(causes) == [3] and set(causes[3]) <= set(names) and causes[3][0] == names[0]


def test_a_reward_that_is_not_finite_is_told_from_those_that_it_spoils(accelerator):
    reports = []
    run = setup(accelerator, report=lambda *args: reports.append(args))
    rewards = run.batch.rewards.copy()
    rewards[5] = np.nan
    forward_and_backward(run, run.batch._replace(rewards=rewards))
    ((_, detail, _, causes),) = reports
    assert causes == {4: ["policy/loss"], 5: ["reward", "policy/loss"]}
    assert "1 by their reward" in detail


def test_means_leave_out_the_steps_that_were_skipped(accelerator, undisturbed):
    run = setup(accelerator)
    good = run.batch
    bad = good._replace(rewards=np.full(6, np.inf))
    for batch in (bad, good):
        forward_and_backward(run, batch)
        run.updates.step()
    assert run.updates.metrics() == {**undisturbed[1], "policy/skipped_updates": 1}


def test_several_skipped_steps_in_a_row_stop_the_run(accelerator):
    run = setup(accelerator)
    bad = run.batch._replace(rewards=np.full(6, np.inf))
    for batch in [bad] * (MAX_SKIPPED - 1) + [run.batch] + [bad] * (MAX_SKIPPED - 1):
        forward_and_backward(run, batch)
        run.updates.step()
    forward_and_backward(run, bad)
    with pytest.raises(TrainingError, match="go on with a lower --lr"):
        run.updates.step()


def test_a_run_goes_on_after_a_step_that_is_not_finite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmrl_env.run.plot_curves", lambda *args: None)
    compute = algos.dr_grpo.compute_advantages
    calls = []

    def once_not_finite(rewards, group_size):
        calls.append(len(calls))
        advantages = compute(rewards, group_size) + 1  # never 0, so that weights move
        if calls[-1] == 0:
            advantages[2] = torch.nan
        return advantages

    monkeypatch.setattr(algos.dr_grpo, "compute_advantages", once_not_finite)
    folder = tmp_path / "run"
    train(folder, steps=2, checkpoint_every=1, eval_every=0)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
    _, first, second = rows(folder)
    assert first["policy/skipped_updates"] == 1 and first["policy/grad_norm"] is None
    assert second["policy/skipped_updates"] == 0 and second["policy/grad_norm"] > 0
    (fault,) = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[2])
    assert fault == {**fault, "step": 1, "not_finite": ["policy/loss"]}
    assert fault["prompt"].endswith("<think>") and fault["answer"]
    assert {"response", "question_id", "reward"} <= fault.keys() >= sample.keys()
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the loss or gradient of the policy is not finite") == 1
    before = load_file(TINY_MODEL / "model.safetensors")
    after = [load_file(folder / f"checkpoints/step-{i}/model.safetensors") for i in (1, 2)]
    assert all(torch.equal(before[name], after[0][name]) for name in before)
    assert not all(torch.equal(before[name], after[1][name]) for name in before)
