from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from padded_model import TOLERANCE, largest_gap

from lmrl_env.errors import ConfigurationError, PromptTooLongError, WeightSyncError
from lmrl_env.types import Sampling

if importlib.util.find_spec("vllm") is None and not os.environ.get("CI"):
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


class Server:
    """A real server, started by ``lmrl serve``; whoever connects waits for it."""

    def __init__(self, model_folder: str, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            *(sys.executable, "-m", "lmrl_env", "serve", model_folder),
            *("--port", str(self.port), "--max-model-len", "320"),
        ]
        self.log = log
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self.command,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"},
        )

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def servers(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    servers = [Server(model_folder, folder / f"{i}.log") for i in range(2)]
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def running(servers, model_folder, tokenizer):
    from lmrl_env.engines.vllm_server import VllmServerEngine

    urls = [server.url for server in servers]
    engine = VllmServerEngine(model_folder, tokenizer, urls, max_model_len=320, deadline=240.0)
    yield engine
    engine.close()


@pytest.fixture
def engine(running, model):
    """The engine with the weights of the folder."""
    running.update_weights(model.state_dict().items(), 0)
    return running


def token_lists(completions):
    return [completion.token_ids.tolist() for completion in completions]


def test_the_servers_start_with_the_weights_of_their_model(running, model, tokenizer, prompts):
    completions = running.generate(prompts, Sampling(24), 3, range(6))
    assert largest_gap(model, tokenizer, prompts, completions) < TOLERANCE


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers(engine, model, tokenizer, prompts, temperature):
    completions = engine.generate(prompts, Sampling(24, temperature), 3, range(6))
    assert largest_gap(model, tokenizer, prompts, completions, temperature) < TOLERANCE


def test_logprobs_follow_a_weight_update_in_buckets(
    engine, other_model, tokenizer, prompts, monkeypatch
):
    from lmrl_env.engines import vllm_transfer

    before = engine.generate(prompts, Sampling(24), 8, range(16))
    assert largest_gap(other_model, tokenizer, prompts, before) > 100 * TOLERANCE
    monkeypatch.setattr(vllm_transfer, "BUCKET_BYTES", 30_000)  # layers straddle buckets
    engine.update_weights(other_model.state_dict().items(), 7)
    after = engine.generate(prompts, Sampling(24), 8, range(16))  # on both servers
    assert largest_gap(other_model, tokenizer, prompts, after) < TOLERANCE
    assert {completion.version for completion in before} == {0}
    assert {completion.version for completion in after} == {7}


def test_a_weight_update_forgets_cached_prefixes(engine, other_model, tokenizer):
    prompt = [(7 * i) % 250 + 1 for i in range(280)]  # more than two blocks of the CPU's cache
    engine.generate([prompt], Sampling(8), 4, range(4))
    engine.update_weights(other_model.state_dict().items(), 1)
    completions = engine.generate([prompt], Sampling(8), 4, range(4))
    assert largest_gap(other_model, tokenizer, [prompt], completions) < TOLERANCE


def test_weights_of_another_model_are_refused_and_right_ones_taken_after(
    engine, other_model, tokenizer, prompts
):
    state = dict(other_model.state_dict())
    name = "model.layers.1.mlp.gate_proj.weight"
    for wrong, words in (
        ({"no.such.weight": torch.zeros(2)}, "no"),
        ({name: torch.zeros(3)}, "3"),
        ({name: state[name]}, "weights of the model did not arrive"),
    ):
        with pytest.raises(WeightSyncError, match=rf"version 3, .*127\.0\.0\.1.*{words}"):
            engine.update_weights(wrong.items(), 3)
    engine.update_weights(state.items(), 4)
    completions = engine.generate(prompts, Sampling(24), 3, range(6))
    assert largest_gap(other_model, tokenizer, prompts, completions) < TOLERANCE


def test_after_a_trainer_that_died_in_an_update_another_one_takes_over(
    engine, other_model, tokenizer, prompts
):
    from lmrl_env.engines.vllm_transfer import HttpTransfer

    state = other_model.state_dict()
    transfer = HttpTransfer()
    client = engine._pool._servers[0].client
    client.post("/start_weight_update", {}, 60, "start")
    transfer.send(client, transfer.pack(list(state.items())[:5]), 60)
    transfer.close()
    engine.update_weights(state.items(), 5)
    completions = engine.generate(prompts, Sampling(24), 3, range(6))
    assert largest_gap(other_model, tokenizer, prompts, completions) < TOLERANCE


def test_a_response_ends_at_its_first_eos_or_at_the_budget(engine, tokenizer, prompts):
    completions = engine.generate(prompts, Sampling(160), 16, range(32))
    for completion in completions:
        eos = np.flatnonzero(np.isin(completion.token_ids, tokenizer.eos_token_ids))
        if completion.finish_reason == "stop":
            assert eos.tolist() == [len(completion.token_ids) - 1]
        else:
            assert len(completion.token_ids) == 160 and not len(eos)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    # The model prefers ids that the tokenizer cannot emit.
    assert max(completion.token_ids.max() for completion in completions) < tokenizer.vocab_size


def test_the_token_that_completes_a_stop_string_is_the_last_and_whole(engine, tokenizer, prompts):
    for seed in range(30):
        [free] = engine.generate(prompts[:1], Sampling(40), 1, [seed])
        pieces = [tokenizer.decode([token]) for token in free.token_ids]
        pairs = itertools.pairwise(pieces)
        straddled = [a[-1] + b[0] for a, b in pairs if (a + b).isascii() and len(b) > 1]
        if straddled:
            break
    stop = straddled[0]
    texts = [tokenizer.decode(free.token_ids[:k]) for k in range(len(free.token_ids) + 1)]
    first = next(k for k, text in enumerate(texts) if stop in text)
    assert not texts[first].endswith(stop)  # the last token goes on behind the stop string
    [stopped] = engine.generate(prompts[:1], Sampling(40, stop=(stop,)), 1, [seed])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids.tolist() == free.token_ids[:first].tolist()
    assert len(stopped.logprobs) == first


def test_seeds_reproduce_and_differ(engine, prompts):
    first, second = (engine.generate(prompts, Sampling(16), 2, [5, 6, 7, 5]) for _ in range(2))
    assert token_lists(first) == token_lists(second)
    assert len(set(map(tuple, token_lists(first)))) == 4


def test_greedy_decoding_takes_the_likeliest_token(engine, model, tokenizer, prompts):
    [completion] = engine.generate(prompts[:1], Sampling(16, temperature=0.0), 1, [0])
    ids = torch.tensor([[*prompts[0], *completion.token_ids.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompts[0]) - 1 : -1, : tokenizer.vocab_size]
    assert completion.token_ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[]], Sampling(4), 1, [0]), ConfigurationError, "vLLM refuses"),
        (([[1]], Sampling(4, temperature=-1.0), 1, [0]), ConfigurationError, "temperature"),
        (([[1] * 317], Sampling(4), 1, [0]), PromptTooLongError, "317 tokens"),
    ],
)
def test_bad_arguments_are_named(engine, arguments, error, words):
    with pytest.raises(error, match=words):
        engine.generate(*arguments)


def test_it_samples_in_another_thread_what_it_samples_here(engine, prompts):
    expected = engine.generate(prompts, Sampling(16), 2, range(4))
    results = []
    thread = threading.Thread(
        target=lambda: results.extend(engine.generate(prompts, Sampling(16), 2, range(4)))
    )
    thread.start()
    thread.join(60)
    assert token_lists(results) == token_lists(expected)


@pytest.mark.slow
def test_responses_are_those_of_the_engine_in_process(engine, model_folder, tokenizer, prompts):
    from lmrl_env.engines.vllm import VllmEngine

    sampling = Sampling(24)
    over_http = engine.generate(prompts, sampling, 4, range(8))
    in_process = VllmEngine(model_folder, tokenizer, max_model_len=320)
    try:
        expected = in_process.generate(prompts, sampling, 4, range(8))
    finally:
        in_process.close()
    assert token_lists(over_http) == token_lists(expected)
    for a, b in zip(over_http, expected, strict=True):
        assert np.abs(a.logprobs - b.logprobs).max() < TOLERANCE
        assert a.finish_reason == b.finish_reason


def test_a_killed_server_costs_no_response_and_comes_back_with_the_right_weights(
    engine, servers, other_model, tokenizer, prompts, monkeypatch
):
    """Here ``kill -9`` comes in the middle of a generation, then a start with the old weights."""
    engine.update_weights(other_model.state_dict().items(), 9)
    # The model seldom stops: some thousand tokens, of which half are the second server's.
    sampling, seeds = Sampling(250), range(48)
    expected = engine.generate(prompts, sampling, 24, seeds)
    pool = engine._pool
    second = pool._servers[1]
    killed = threading.Event()

    def kill_when_asked():
        while second.outstanding < 12:  # of about 24: the first may have ended already
            time.sleep(0.001)
        servers[1].kill()
        killed.set()

    threading.Thread(target=kill_when_asked, daemon=True).start()
    completions = engine.generate(prompts, sampling, 24, seeds)
    assert killed.is_set() and second.problem is not None
    assert token_lists(completions) == token_lists(expected)
    assert {completion.version for completion in completions} == {9}

    servers[1].start()
    with pool._changed:
        pool._servers[0].problem = "set aside, so that only the server that was killed can answer"
    completions = engine.generate(prompts, Sampling(24), 3, range(6))  # waits until it is back
    assert second.client.weight_stamp() == pool.stamp
    assert largest_gap(other_model, tokenizer, prompts, completions) < TOLERANCE
    assert {completion.version for completion in completions} == {9}
