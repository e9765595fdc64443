from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from algos_files import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_batches import make_rollout

from lmrl_env.batch_plan import BatchPlan
from lmrl_env.distributed import all_sum, check_launch, set_up_sharding
from lmrl_env.engines.local import LocalEngine
from lmrl_env.errors import ConfigurationError, TrainingError, WeightSyncError
from lmrl_env.policy import Policy, load_model
from lmrl_env.tokenizer import load_tokenizer
from lmrl_env.updates import Updates
from lmrl_env.weight_sync import sync_weights


def plan(rank: int, ranks: int, **kwargs) -> BatchPlan:
    accelerator = SimpleNamespace(num_processes=ranks, process_index=rank)
    defaults = {"questions": 6, "group_size": 2, "updates": 1, "epochs": 1}
    return BatchPlan(accelerator, max_tokens=100, seed=0, **{**defaults, **kwargs})


@given(st.sampled_from([1, 2, 3, 6]), st.integers(1, 6), st.integers(1, 3), st.integers(1, 50))
def test_ranks_together_do_what_one_rank_does(ranks, updates, epochs, step):
    alone = plan(0, 1, updates=updates, epochs=epochs)
    together = [plan(r, ranks, updates=updates, epochs=epochs) for r in range(ranks)]
    assert sum((p.question_ids(step, 17) for p in together), []) == alone.question_ids(step, 17)
    seeds = np.concatenate([p.seeds(step) for p in together])
    assert (seeds == alone.seeds(step)).all()
    values = torch.arange(12.0)
    assert torch.cat([p.own_rows(values) for p in together]).tolist() == values.tolist()
    minibatches = [list(p.minibatches(step)) for p in together]
    for i, rows in enumerate(alone.minibatches(step)):
        shares = [minibatches[r][i] + p.first_group * p.group_size for r, p in enumerate(together)]
        assert sorted(np.concatenate(shares)) == sorted(rows)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9))
def test_an_epoch_of_minibatches_visits_every_row_once(updates, epochs, step):
    rows = list(plan(0, 1, updates=updates, epochs=epochs).minibatches(step))
    assert len(rows) == updates * epochs
    for epoch in range(epochs):
        visited = np.concatenate(rows[epoch * updates : (epoch + 1) * updates])
        assert sorted(visited) == list(range(12))


def test_steps_ask_the_whole_set_before_they_repeat_a_question():
    asked = sum((plan(0, 1).question_ids(step, 18) for step in (1, 2, 3)), [])
    assert sorted(asked) == list(range(18))


@pytest.mark.parametrize(
    ("ranks", "kwargs", "message"),
    [
        (4, {}, "--prompts-per-step 6 is not a multiple of the 4 ranks: use 4"),
        (1, {"updates": 7}, "--updates-per-step 7: 6 questions cannot be cut into so many parts"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(ranks, kwargs, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        plan(0, ranks, **kwargs)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_totals_count_responses_and_action_tokens(accelerator):
    batch_plan = BatchPlan(
        accelerator, questions=2, group_size=2, updates=1, epochs=1, max_tokens=9, seed=0
    )
    rollout = make_rollout([3, 4], [1, 2, 3, 6], group_size=2)
    totals = batch_plan.totals(rollout, np.array([1, 2, 3]))
    assert (totals.responses, totals.tokens, totals.max_new_tokens) == (3, 11, 6)


def test_sums_are_float64(accelerator):
    assert all_sum(accelerator, [2**53 - 1, 1]).tolist() == [2**53 - 1, 1]


def test_the_canary_accepts_the_policys_own_engine_and_stamps_the_version(accelerator):
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny")
    policy, engine = Policy(model, tokenizer.vocab_size), LocalEngine(model, tokenizer)
    prompt = tokenizer.encode("User: What is 2 + 3?\nAssistant:")
    gap = sync_weights(
        accelerator,
        policy,
        engine,
        7,
        prompt_ids=prompt,
        temperature=0.8,
        max_new_tokens=8,
        dtype="float32",
    )
    assert gap < 1e-4 and engine.version == 7


class StaleEngine(LocalEngine):
    """Ignores what it is given, as a silent failure of a weight sync would."""

    def update_weights(self, named_tensors, version):
        self.version = version


def test_the_canary_stops_an_engine_whose_weights_are_stale(accelerator):
    tokenizer = load_tokenizer("tiny")
    policy = Policy(load_model("tiny"), tokenizer.vocab_size)
    engine = StaleEngine(load_model("tiny"), tokenizer)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    with pytest.raises(WeightSyncError, match=re.escape("log-probs differ from the policy's")):
        sync_weights(
            accelerator,
            policy,
            engine,
            1,
            prompt_ids=[5, 6, 7],
            temperature=1.0,
            max_new_tokens=8,
            dtype="float32",
        )


# --- launches


def launched(ranks: int = 1, kind: str = "NO", **plugin) -> SimpleNamespace:
    """Return an accelerator as a launch may leave it."""
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(**plugin) if plugin else None, deepspeed_plugin=None
    )
    return SimpleNamespace(
        num_processes=ranks, distributed_type=DistributedType(kind), device="cpu", state=state
    )


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets the variables of a launch, and no others of the kind."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "came", "message"),
    [
        ({"WORLD_SIZE": "4"}, {}, "asked for 4 or more processes and Accelerate runs 1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "asked for 2 or more processes"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "::1"}, {}, "asked for 2 or more processes"),
        ({"ACCELERATE_USE_FSDP": "true"}, {"kind": "MULTI_CPU"}, "FSDP and Accelerate runs MULTI"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DEEPSPEED and Accelerate runs NO on cpu"),
        ({}, {"kind": "FSDP", "fsdp_version": 1}, "sets fsdp_version to 1: expected 2"),
        (
            {},
            {"kind": "FSDP", "cpu_ram_efficient_loading": True},
            "sets cpu_ram_efficient_loading to True: expected False",
        ),
    ],
)
def test_a_launch_that_does_not_give_what_it_asks_for_is_refused(
    variables, came, message, environment
):
    environment(**variables)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        check_launch(launched(**came))


@pytest.mark.parametrize(
    ("variables", "came"),
    [
        ({}, {}),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "::1"}, {"ranks": 2, "kind": "MULTI_CPU"}),
        ({"ACCELERATE_USE_CPU": "True"}, {}),
        ({"ACCELERATE_USE_FSDP": "true"}, {"kind": "FSDP", "fsdp_version": 2}),
    ],
)
def test_a_launch_that_gives_what_it_asks_for_is_accepted(variables, came, environment):
    environment(**variables)
    check_launch(launched(**came))


@pytest.mark.parametrize("file", sorted((ROOT / "examples/accelerate").glob("*.yaml")), ids=str)
def test_launch_files_are_accelerates_and_name_their_own_command(file):
    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    lines = file.read_text().splitlines()
    comment = " ".join(line.strip("# \\") for line in lines if line.startswith("#"))
    assert f"accelerate launch --config_file examples/accelerate/{file.name}" in comment
    assert "algos/dr_grpo.py" in comment


# --- sharded modules


def test_fsdp2_in_bfloat16_rounds_neither_logprobs_nor_sums_of_gradients():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16  # why it is replaced
    sharded = SimpleNamespace(
        is_fsdp2=True,
        mixed_precision="bf16",
        distributed_type="FSDP",
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
    set_up_sharding(sharded, 1.0)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.output_dtype is None


def test_out_of_memory_in_a_sharded_module_stops_the_run_by_name():
    sharded = SimpleNamespace(
        num_processes=2,
        process_index=0,
        distributed_type="FSDP",
        device=torch.device("cpu"),
    )
    plan = BatchPlan(sharded, questions=2, group_size=2, updates=1, epochs=1, max_tokens=77, seed=0)
    updates = Updates(plan, torch.nn.Linear(1, 1), None, max_grad_norm=1.0)
    micro = SimpleNamespace(last=False, mask=torch.ones(3, 4))
    message = "rank 0 is out of memory in a micro-batch of at most 77 tokens"
    with (
        pytest.raises(TrainingError, match=f"{message}.*--micro-batch-tokens 38"),
        updates.micro_step(micro),
    ):
        raise torch.OutOfMemoryError
