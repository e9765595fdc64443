"""What the engine of vLLM servers does when servers fail, on servers that are made up."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref

import pytest
import torch
from fake_vllm_server import FakeVllmServer, response
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from lmrl_env import make_engine
from lmrl_env.engines import vllm_client, vllm_pool, vllm_transfer
from lmrl_env.engines.vllm_server import ROUTE, VllmServerEngine
from lmrl_env.errors import (
    ConfigurationError,
    EngineError,
    PromptTooLongError,
    UnknownNameError,
    WeightSyncError,
)
from lmrl_env.tokenizer import load_tokenizer
from lmrl_env.types import Sampling

SAMPLING = Sampling(2)
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2), "c": torch.zeros(5)}
PHASES = [
    "/init_weight_transfer_engine",
    "/update_weight_version",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/update_weight_version",
]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(vllm_pool, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(vllm_pool, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.02)


@pytest.fixture
def fakes():
    servers = [FakeVllmServer(), FakeVllmServer()]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def connect(fakes):
    engines = []

    def connect_to(*urls, deadline=5.0, **kwargs):
        urls = urls or [server.url for server in fakes]
        engine = VllmServerEngine("tiny", load_tokenizer("tiny"), urls, deadline=deadline, **kwargs)
        engines.append(engine)
        return engine

    yield connect_to
    for engine in engines:
        engine.close()


def fails(status, message):
    return lambda: (status, {"error": {"message": message}})


def generate(engine, n=8):
    return engine.generate([[3, 4]], SAMPLING, n, range(n))


def test_requests_go_to_the_server_that_has_the_fewest(fakes, connect):
    engine = connect()
    for fake in fakes:
        fake.may_answer.clear()
    thread = threading.Thread(target=generate, args=(engine, 8))
    thread.start()
    for fake in fakes:
        for _ in range(4):
            assert fake.asked.acquire(timeout=5)
    assert [fake.paths().count(ROUTE) for fake in fakes] == [4, 4]
    for fake in fakes:
        fake.may_answer.set()
    thread.join(5)
    assert [server.outstanding for server in engine._pool._servers] == [0, 0]


def test_a_request_holds_ids_seed_and_all_that_the_engine_in_process_asks_for(fakes, connect):
    sampling = Sampling(5, temperature=0.5, top_p=0.9, top_k=3, stop=("x",))
    connect(fakes[0].url).generate([[3, 4], [5]], sampling, 1, [7, 8])
    first, second = sorted(
        (body for path, body in fakes[0].log if path == ROUTE), key=lambda b: b["token_ids"]
    )
    assert (first["token_ids"], second["token_ids"]) == ([3, 4], [5])
    assert second["sampling_params"] == {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 8,
        "stop": ["x"],
        "include_stop_str_in_output": True,
        "stop_token_ids": list(load_tokenizer("tiny").eos_token_ids),
        "detokenize": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "logit_bias": None,
    }


@pytest.mark.parametrize(
    "fault", [fails(500, "engine dead"), lambda: (200, response("default", "abort"))]
)
def test_what_a_server_fails_to_answer_is_asked_again(fakes, connect, fault):
    fakes[0].faults[ROUTE] = [fault] * 3
    completions = generate(connect(fakes[0].url))
    assert [c.token_ids.tolist() for c in completions] == [[1, 2]] * 8
    assert [c.logprobs.tolist() for c in completions] == [[-0.5, -0.25]] * 8
    assert fakes[0].paths().count(ROUTE) == 8 + 3


def test_a_server_that_always_fails_is_named_with_its_message(fakes, connect):
    fakes[0].faults[ROUTE] = [fails(500, "no kernel")] * 99
    with pytest.raises(EngineError, match=rf"8 times .* {fakes[0].url} .*no kernel"):
        generate(connect(fakes[0].url), n=1)


def test_without_any_server_the_call_ends_at_its_deadline_and_names_them(fakes, connect):
    engine = connect(deadline=0.4)
    for fake in fakes:
        fake.stop()
    started = time.monotonic()
    with pytest.raises(EngineError, match=f"0.4 s: {fakes[0].url}.*refused.*{fakes[1].url}"):
        generate(engine)
    assert time.monotonic() - started < 3


def test_a_server_that_does_not_answer_is_named_with_the_phase(fakes, connect, monkeypatch):
    monkeypatch.setattr(vllm_pool, "ANSWER_SECONDS", 0.1)
    engine = connect(fakes[0].url)
    fakes[0].may_answer.clear()
    with pytest.raises(EngineError, match=r"did not answer a request within 0\.1 s"):
        generate(engine, n=1)


def test_no_server_at_the_start_is_named_with_the_phase(connect, caplog):
    with pytest.raises(
        EngineError, match=r"0\.2 s of waiting for it to start: http://127.*lmrl serve"
    ):
        connect("http://127.0.0.1:9", deadline=0.2)
    (said,) = caplog.messages  # at the first of its tries, lest the wait look like a hang
    assert said.endswith("waiting up to 0.2 s for it to start")


def test_a_failed_call_breaks_off_its_other_requests(fakes, connect):
    engine = connect(fakes[0].url, deadline=60.0)
    fakes[0].may_answer.clear()
    fakes[0].faults[ROUTE] = [fails(400, "top_p must be in (0, 1]")]
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"top_p must be in \(0, 1\]"):
        generate(engine)
    assert time.monotonic() - started < 5
    fakes[0].may_answer.set()
    assert len(generate(engine)) == 8


def test_logits_that_are_not_finite_are_an_error(fakes, connect):
    fakes[0].faults[ROUTE] = [lambda: (200, response("default", logprob=-9999.0))]
    with pytest.raises(EngineError, match="not finite"):
        generate(connect(fakes[0].url), n=1)


def test_a_sync_goes_through_the_phases_on_every_server_and_stamps_it(fakes, connect):
    engine = connect()
    engine.update_weights(TENSORS.items(), 3)
    for fake in fakes:
        assert [p for p in fake.paths() if p in PHASES] == PHASES
        bodies = {path: body for path, body in fake.log}
        loaded = load(base64.b64decode(bodies["/update_weights"]["update_info"]["bucket"]))
        assert loaded.keys() == TENSORS.keys()
        assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
        assert fake.stamp == fakes[0].stamp and fake.stamp.endswith("/3")
        unfinished = next(b for p, b in fake.log if p == "/update_weight_version")
        assert unfinished["new_version"].endswith("unfinished")
    assert {completion.version for completion in generate(engine)} == {3}
    engine.update_weights(TENSORS.items(), 4)
    assert fakes[0].paths().count("/init_weight_transfer_engine") == 1


def test_a_large_model_is_sent_in_buckets(fakes, connect, monkeypatch):
    monkeypatch.setattr(vllm_transfer, "BUCKET_BYTES", 24)
    connect().update_weights(TENSORS.items(), 1)
    sent = [body["update_info"]["bucket"] for path, body in fakes[1].log if path == PHASES[3]]
    assert [sorted(load(base64.b64decode(bucket))) for bucket in sent] == [["a"], ["b"], ["c"]]


def test_a_sync_holds_one_bucket_of_the_gathered_tensors(fakes, connect, monkeypatch):
    monkeypatch.setattr(vllm_transfer, "BUCKET_BYTES", 3 * 24)
    held, most = weakref.WeakSet(), 0

    def gathered():
        nonlocal most
        for i in range(12):
            tensor = torch.full((6,), float(i))
            held.add(tensor)
            most = max(most, len(held))
            yield f"{i}", tensor

    connect().update_weights(gathered(), 1)
    assert most == 3 + 1  # the fourth shows that the bucket is full


@given(sizes=st.lists(st.integers(1, 9), max_size=12), limit=st.integers(1, 20))
def test_buckets_hold_all_tensors_in_order_and_no_more_than_the_limit(sizes, limit):
    tensors = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_transfer, "BUCKET_BYTES", limit)
        buckets = list(vllm_transfer.buckets(iter(tensors)))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in tensors]
    for bucket in buckets:
        assert len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= limit


def test_a_server_started_anew_is_brought_up_to_date_before_it_is_asked(fakes, connect):
    engine = connect(fakes[0].url)
    engine.update_weights(TENSORS.items(), 3)
    expected = fakes[0].stamp
    fakes[0].stamp = "default"  # as after a start
    fakes[0].log.clear()
    completions = generate(engine, n=4)
    assert {completion.version for completion in completions} == {3}
    assert fakes[0].stamp == expected
    paths = [path for path in fakes[0].paths() if path != "/weight_info"]
    again = paths.index(PHASES[0])
    assert set(paths[:again]) == {ROUTE}  # what it answered with other weights is not used
    assert paths[again : again + len(PHASES)] == PHASES
    assert paths[again + len(PHASES) :] == [ROUTE] * 4


def test_a_server_that_is_away_during_a_sync_gets_the_weights_when_it_is_back(fakes, connect):
    engine = connect()
    fakes[1].stop()
    engine.update_weights(TENSORS.items(), 3)
    generate(engine)
    fakes[1] = FakeVllmServer(fakes[1].port)
    end = time.monotonic() + 5
    while fakes[1].stamp != fakes[0].stamp and time.monotonic() < end:
        time.sleep(0.02)
    assert [p for p in fakes[1].paths() if p in PHASES] == PHASES


def test_weights_of_an_earlier_run_are_refused_until_a_sync(fakes, connect):
    fakes[1].stamp = "0123456789ab/7"
    engine = connect()
    with pytest.raises(EngineError, match=f"earlier run on {fakes[1].url} '0123456789ab/7'"):
        generate(engine)
    engine.update_weights(TENSORS.items(), 1)
    assert len(generate(engine)) == 8


def test_a_server_lost_before_any_sync_is_waited_for(fakes, connect):
    engine = connect(fakes[0].url)
    fakes[0].stop()
    threading.Timer(0.3, lambda: fakes.append(FakeVllmServer(fakes[0].port))).start()
    for _ in range(2):
        assert len(generate(engine)) == 8


def test_weights_that_a_server_refuses_stop_the_run_with_the_figures(fakes, connect, monkeypatch):
    monkeypatch.setattr(vllm_transfer, "BUCKET_BYTES", 24)
    engine = connect()
    fakes[1].faults[PHASES[3]] = [lambda: (200, {}), fails(500, "no parameter named 'b'")]
    named = [*TENSORS.items(), ("d", torch.ones(6)), ("e", torch.ones(6))]
    seen = []
    tensors = ((seen.append(name) or name, tensor) for name, tensor in named)
    with pytest.raises(
        WeightSyncError,
        match=rf"^weights of version 5, 1 tensors .*{fakes[1].url}.*no parameter named 'b'",
    ):
        engine.update_weights(tensors, 5)
    assert seen == list("abcde")  # a gathering generator is collective: it is never left
    with pytest.raises(EngineError, match="version 5 has failed"):
        generate(engine)
    engine.update_weights(TENSORS.items(), 6)
    assert {completion.version for completion in generate(engine)} == {6}


def test_prefixes_that_stay_cached_stop_the_run(fakes, connect):
    engine = connect()
    fakes[0].faults[PHASES[5]] = [lambda: (200, {"success": False})]
    with pytest.raises(WeightSyncError, match="keeps prefixes"):
        engine.update_weights(TENSORS.items(), 1)


@pytest.mark.parametrize("refusals", [0, 1])
def test_an_update_that_was_broken_off_is_ended_first(fakes, connect, refusals):
    fakes[0].faults[PHASES[2]] = [fails(500, "a weight update is already active")]
    fakes[0].faults[PHASES[4]] = [fails(500, "weights did not arrive")] * refusals
    connect(fakes[0].url).update_weights(TENSORS.items(), 1)
    start, finish = PHASES[2], PHASES[4]
    began = [p for p in fakes[0].paths() if p in PHASES][2 : 5 + refusals]
    assert began == [start, *[finish] * (1 + refusals), start]


def test_tied_weights_are_sent_under_both_names(fakes, connect):
    connect(fakes[0].url).update_weights([*TENSORS.items(), ("tied", TENSORS["a"])], 1)
    bodies = {path: body for path, body in fakes[0].log}
    loaded = load(base64.b64decode(bodies["/update_weights"]["update_info"]["bucket"]))
    assert torch.equal(loaded["tied"], TENSORS["a"]) and torch.equal(loaded["a"], TENSORS["a"])


def test_only_the_last_weights_are_kept_and_none_without_the_engine(fakes, connect, monkeypatch):
    engine = connect()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_transfer, "BUCKET_BYTES", 24)
        engine.update_weights(TENSORS.items(), 1)
    folder = engine._pool._sync._transfer._folder
    assert len(list(folder.iterdir())) == 3
    engine.update_weights(TENSORS.items(), 2)
    assert len(list(folder.iterdir())) == 1
    engine.close()
    assert not folder.exists()
    with pytest.raises(EngineError, match="closed"):
        generate(engine)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "torch.bfloat16"}, "dtype='bfloat16': expected float32"),
        ({"logprobs_mode": "raw_logprobs"}, "expected processed_logprobs"),
        ({"max_model_len": 200}, "max_model_len=200: expected 300 or more"),
        ({"backend": None}, "weight transfer=None: expected nccl or lmrl_http"),
        ({"backend": "ipc"}, "weight transfer='ipc'"),
    ],
)
def test_a_server_that_is_not_as_it_has_to_be_is_refused(connect, settings, words):
    fake = FakeVllmServer(**settings)
    with pytest.raises(ConfigurationError, match=f"{fake.url} has .*{words}.*lmrl serve"):
        connect(fake.url, max_model_len=300)
    fake.stop()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[1]], SAMPLING, 2, [0]), ConfigurationError, "expected 2"),
        (([[1]], SAMPLING, 1, [-1]), ConfigurationError, "none negative"),
        (([[1] * 319], SAMPLING, 1, [0]), PromptTooLongError, "319 tokens"),
    ],
)
def test_bad_arguments_are_named(connect, arguments, error, words):
    with pytest.raises(error, match=words):
        connect().generate(*arguments)


def test_no_prompts_give_no_responses(connect):
    assert connect().generate([], SAMPLING, 4, []) == []


def test_the_engine_is_made_by_its_name(fakes):
    urls = ", ".join(fake.url for fake in fakes)
    engine = make_engine("vllm_server", "tiny", max_model_len=300, servers=urls)
    assert engine.version == 0 and len(generate(engine)) == 8
    engine.close()


@pytest.mark.parametrize(
    ("name", "servers", "error", "words"),
    [
        ("vllm_server", None, ConfigurationError, "no server: expected URLs"),
        ("vllm_server", "host:8000", ConfigurationError, "expected a URL such as http://host:8000"),
        ("local", "http://host:8000", ConfigurationError, "expected engine='vllm_server'"),
        ("sglang", None, UnknownNameError, "vllm_server"),
    ],
)
def test_servers_that_cannot_be_meant_are_refused(name, servers, error, words):
    with pytest.raises(error, match=words):
        make_engine(name, "tiny", max_model_len=300, servers=servers)


def test_nccl_without_cuda_is_refused_by_name(connect):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    fake = FakeVllmServer(backend="nccl")
    with pytest.raises(EngineError, match="lmrl serve --weight-transfer lmrl_http"):
        connect(fake.url)
    fake.stop()


@pytest.mark.vllm
def test_nccl_asks_for_what_vllm_takes_and_packs_as_it_announces(connect, monkeypatch):
    """The requests are real; the GPU, and vLLM's two functions that need one, are not."""
    nccl_engine = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
    calls = []
    group = types.SimpleNamespace(destroy=lambda: calls.append("destroyed"))

    def trainer_init(info):
        calls.append(info)
        return group

    def producer(iterator, **kwargs):
        calls.append(([(name, t.clone()) for name, t in iterator], kwargs))

    for module, name, fake_function in (
        ("nccl_common", "trainer_init", trainer_init),
        ("packed_tensor", "packed_nccl_broadcast_producer", producer),
    ):
        monkeypatch.setattr(
            sys.modules[f"vllm.distributed.weight_transfer.{module}"], name, fake_function
        )
    stream = types.SimpleNamespace(synchronize=lambda: None)
    for name, value in (
        ("is_available", True),
        ("current_device", "cpu"),
        ("set_device", None),
        ("current_stream", stream),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    fake = FakeVllmServer(backend="nccl")
    engine = connect(fake.url)
    engine.update_weights(TENSORS.items(), 2)
    bodies = {path: body for path, body in fake.log}
    init = nccl_engine.NCCLWeightTransferInitInfo(**bodies[PHASES[0]]["init_info"])
    update = nccl_engine.NCCLWeightTransferUpdateInfo(**bodies[PHASES[3]]["update_info"])
    assert (init.rank_offset, init.world_size, init.packed) == (1, 3, True)
    joined, (sent, options) = calls
    assert joined == {k: getattr(init, k) for k in ("master_address", "master_port", "world_size")}
    assert update.names == [name for name, _ in sent] == list(TENSORS)
    assert update.dtype_names == ["float32"] * 3 and update.shapes == [[2, 3], [2], [5]]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in sent)
    assert options["buffer_size_bytes"] == init.packed_buffer_size_bytes
    assert options["group"] is group and options["src"] == 0
    assert [p for p in fake.paths() if p in PHASES] == PHASES
    fake.stamp = "default"  # started anew: nothing is kept for it
    with pytest.raises(EngineError, match="next sync"):
        engine.generate([[3]], SAMPLING, 1, [0])
    engine.close()
    assert calls[-1] == "destroyed"
    fake.stop()


TWO_RANKS = """
    import sys

    import torch
    import torch.distributed as dist

    from lmrl_env import make_engine
    from lmrl_env.errors import WeightSyncError
    from lmrl_env.types import Sampling

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    engine = make_engine("vllm_server", "tiny", max_model_len=300, servers=sys.argv[1])

    def gathered():
        for name in ("a", "b", "c"):
            tensor = torch.ones(3) if rank == 0 else torch.zeros(3)
            dist.broadcast(tensor, src=0)  # as shards are gathered
            yield name, tensor

    try:
        engine.update_weights(gathered(), 1)
        raise AssertionError("the first sync was to fail")
    except WeightSyncError as error:
        assert "no such parameter" in str(error), error
    engine.update_weights(gathered(), 2)
    completions = engine.generate([[rank]], Sampling(2), 3, range(3))
    assert {completion.version for completion in completions} == {2}
    engine.close()
    dist.destroy_process_group()
    print("finished", rank)
"""


@pytest.mark.slow
def test_of_two_ranks_the_first_sends_and_both_learn_what_came_of_it(fakes, tmp_path):
    fakes[0].faults[PHASES[3]] = [fails(500, "no such parameter")]
    script = tmp_path / "two_ranks.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, str(script), ",".join(fake.url for fake in fakes)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "finished 0" in result.stdout and "finished 1" in result.stdout
    for fake in fakes:
        assert fake.paths().count(PHASES[3]) == 2  # one model, twice: rank 1 sends nothing
    prompts = [body["token_ids"] for fake in fakes for path, body in fake.log if path == ROUTE]
    assert sorted(prompts) == [[0]] * 3 + [[1]] * 3
