from __future__ import annotations

import os
import signal
import time

import pytest

from lmrl_env import signals
from lmrl_env.signals import StopRequest


@pytest.fixture
def request_to_stop():
    stop = StopRequest()
    yield stop
    stop.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_an_echo_of_it_passes(request_to_stop, number, capfd):
    assert request_to_stop.received is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # as from a launcher
    assert request_to_stop.received is number
    assert capfd.readouterr().err.count("ending after this step") == 1


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    child = os.fork()
    if child == 0:
        StopRequest()
        os.kill(os.getpid(), signal.SIGTERM)
        signals.ECHO_SECONDS = -1.0
        (tmp_path / "still there").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert (tmp_path / "still there").exists()


def test_afterwards_signals_are_handled_as_before():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    assert signal.getsignal(signal.SIGTERM) != before
    stop.close()
    assert signal.getsignal(signal.SIGTERM) == before
