from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lmrl_env.engines import vllm_ranks
from lmrl_env.errors import RankError
from lmrl_env.waiting import begin_waiting, phase, waiting

DEADLINE = 4.0  # seconds
PATIENCE = 20.0


def be_a_rank(rank, ranks, port, has_store, behave, results):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=DEADLINE)
    store = dist.TCPStore("localhost", port, is_master=rank == has_store, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    begin_waiting(DEADLINE / 60)
    try:
        behave(rank)
    except Exception as error:
        results.put((rank, type(error), str(error)))


def run_ranks(behave, ranks=2, has_store=None):
    """Return the errors of some ranks that meet, by their numbers, and the seconds it took.

    The store is this process's, as it is torchrun's, or that of a rank.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if has_store is not None:
        del store
    arguments = (ranks, port, has_store, behave, results)
    started = time.perf_counter()
    processes = [context.Process(target=be_a_rank, args=(r, *arguments)) for r in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode is not None, "a rank hangs"
    errors = {}
    while not results.empty():
        rank, kind, message = results.get()
        errors[rank] = (kind, message)
    return errors, time.perf_counter() - started


def meet():
    with waiting():
        dist.all_reduce(torch.ones(1))


def meet_in_training():
    with phase("training"):
        meet()


def leave_in(name, how):
    """Return what the rank 1 of some does: it leaves in a phase, where the others train."""

    def behave(rank):
        meet()
        if rank == 1:
            with phase(name):
                how()
        meet_in_training()

    return behave


def kill():
    time.sleep(0.2)  # the others wait by then
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("of its own")


def test_a_killed_rank_stops_the_others_at_once_and_they_name_both_phases():
    errors, seconds = run_ranks(leave_in("sampling", kill), ranks=3)
    assert set(errors) == {0, 2} and seconds < DEADLINE + 5
    for rank in (0, 2):
        kind, message = errors[rank]
        assert kind is RankError
        assert message.startswith(
            f"rank {rank} of 3, in the phase 'training': another rank ended, or did not come"
        )
        assert "last seen: rank 1 in 'sampling'" in message and "--resume" in message


def test_an_error_of_one_rank_stops_the_others_and_stays_what_it_is():
    errors, _ = run_ranks(leave_in("grading", fail))
    assert errors[1] == (ValueError, "of its own")
    assert errors[0][0] is RankError and "rank 1 in 'grading'" in errors[0][1]


def test_a_rank_that_comes_too_late_stops_the_run_at_the_deadline():
    errors, seconds = run_ranks(leave_in("checkpoint", lambda: time.sleep(DEADLINE + 2)))
    kind, message = errors[0]
    assert kind is RankError and "rank 1 in 'checkpoint'" in message
    assert f"within {DEADLINE / 60:g} minutes (--wait-limit)" in message
    assert re.search(r"\([^)]*[Tt]imed out waiting", message)
    assert errors[1][0] is RankError  # when it comes, the other one is gone
    assert seconds < DEADLINE + 7


def test_where_the_rank_that_kept_the_phases_dies_they_are_unknown():
    def behave(rank):
        meet()
        if rank == 0:
            kill()
        meet_in_training()

    ((rank, (kind, message)),) = run_ranks(behave, has_store=0)[0].items()
    assert rank == 1 and kind is RankError
    assert "rank 1 of 2, in the phase" in message and "phases are unknown" in message


@pytest.mark.parametrize("wait", [vllm_ranks.barrier, lambda: vllm_ranks.from_first("stamp")])
def test_the_waits_of_ranks_that_share_servers_name_rank_and_phase_too(wait):
    def behave(rank):
        meet()
        if rank == 0:
            kill()
        wait()

    (kind, message) = run_ranks(behave)[0][1]
    assert kind is RankError and message.startswith("rank 1 of 2, in the phase 'start'")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("3")])
def test_other_errors_pass_through(error):
    with pytest.raises(type(error)) as caught, waiting():
        raise error
    assert caught.value is error


def test_after_an_inner_phase_comes_the_outer_one_again():
    def behave(rank):
        with phase("training"):
            with phase("sync"):
                meet()
            if rank == 1:
                fail()
            with phase("evaluation"):
                meet()

    errors, _ = run_ranks(behave)
    assert "in the phase 'evaluation'" in errors[0][1]
    assert "rank 1 in 'training'" in errors[0][1]
