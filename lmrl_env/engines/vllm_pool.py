"""Several vLLM servers as one: requests balanced over them, lost servers brought back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lmrl_env.engines.vllm_client import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    InFlight,
    ServerLost,
    ServerRefused,
    VllmClient,
)
from lmrl_env.engines.vllm_sync import WeightSync
from lmrl_env.errors import ConfigurationError, EngineError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
logger = logging.getLogger(__name__)

ATTEMPTS = 8
"""Servers that may be lost under one request before the run stops."""

ANSWER_SECONDS = 3600.0
"""Longest wait for an answer to one request: a long response of a busy server takes its time."""


class _Server:
    """A server with what is known of it.

    Attributes:
        client: speaks to it.
        outstanding: requests that it has not answered.
        problem: why it is asked for nothing, or None.
    """

    def __init__(self, client: VllmClient):
        self.client = client
        self.outstanding = 0
        self.problem: str | None = None


class ServerPool:
    """Asks servers, and sees to it that each of them holds the right weights.

    A server that is lost is tried again and again in the background, and given the weights that
    it should hold if it comes back with others. Its requests go to other servers, or wait.

    Args:
        clients: the servers.
        sync: replaces their weights.
        deadline: seconds that all of them may be away.
    """

    def __init__(self, clients: Sequence[VllmClient], sync: WeightSync, deadline: float):
        self._servers = [_Server(client) for client in clients]
        self._sync = sync
        self._deadline = deadline
        self._changed = threading.Condition()  # guards outstanding and problem
        self._syncing = threading.Lock()  # held while a server's weights are replaced
        self._closed = threading.Event()
        self._refusal: str | None = None
        stamps = {server.client: server.client.weight_stamp() for server in self._servers}
        if foreign := [
            f"{client} {stamp!r}" for client, stamp in stamps.items() if stamp != sync.stamp
        ]:
            self._refusal = (
                f"there are weights of an earlier run on {', '.join(foreign)}: expected "
                f"{sync.stamp!r}, those of a start; call update_weights first, or start it anew"
            )

    @property
    def stamp(self) -> str:
        """The name of the weights that every server should hold."""
        return self._sync.stamp

    def check_weights(self) -> None:
        """Refuse to go on after a failed sync, or with weights of an earlier run.

        Raises:
            EngineError: if it is so, or the pool is closed.
        """
        self.check_open()
        if self._refusal is not None:
            raise EngineError(self._refusal)

    def ask(
        self, path: str, body: bytes, read: Callable[[VllmClient, Any], T], in_flight: InFlight
    ) -> T:
        """Send a request to the server that has the fewest, until one answers.

        Args:
            path: of the route.
            body: JSON.
            read: makes the result of the answer, or raises ``ServerLost``.
            in_flight: may break it off.

        Raises:
            ConfigurationError: if a server finds the request wrong.
            EngineError: if no server answers.
        """
        problem: EngineError | None = None
        for _ in range(ATTEMPTS):
            server = self._acquire(in_flight)
            try:
                answer = server.client.request(
                    "POST", path, body, ANSWER_SECONDS, "answer a request", in_flight
                )
                return read(server.client, answer)
            except ServerLost as error:
                problem = error
            except ServerRefused as error:
                if error.status == 400:
                    raise ConfigurationError(f"vLLM refuses a request: {error}") from error
                if error.status < 500:
                    raise
                problem = error
            finally:
                self._release(server)
            if not in_flight.aborted:
                self._lose(server, str(problem))
        raise EngineError(
            f"{ATTEMPTS} times a server was lost under the same request, at last: {problem}; look "
            "at its log"
        )

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Replace the weights of every server that can be reached.

        Raises:
            WeightSyncError: if a server refuses the weights.
        """
        with self._syncing:
            self._refusal = (
                f"the sync to version {version} has failed: call update_weights with the right ones"
            )
            clients = [server.client for server in self._servers]
            lost = self._sync.update(clients, named_tensors, version)
            self._regain([server for server in self._servers if server.client not in lost])
            self._refusal = None
        for server in self._servers:
            if server.client in lost:
                logger.warning("%s is left out of the sync to version %d", server.client, version)
                self._lose(server, str(lost[server.client]))

    def expect_weights(self, stamp: str) -> None:
        """Take the servers to hold weights that another process has sent."""
        self._sync.stamp = stamp
        self._refusal = None
        self._regain(self._servers)

    def close(self) -> None:
        """Forget the servers, which go on running."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        with self._syncing:
            self._sync.close()

    def check_open(self) -> None:
        """Raise an EngineError if the pool is closed."""
        if self._closed.is_set():
            raise EngineError("the vLLM server engine is closed: make a new one")

    def wake_waiting(self) -> None:
        """Let requests that wait for a server look whether they were broken off."""
        with self._changed:
            self._changed.notify_all()

    def _acquire(self, in_flight: InFlight) -> _Server:
        end = time.monotonic() + self._deadline
        with self._changed:
            while True:
                self.check_open()
                if in_flight.aborted:
                    raise ServerLost("the call was broken off")
                able = [server for server in self._servers if server.problem is None]
                if able:
                    server = min(able, key=lambda s: s.outstanding)
                    server.outstanding += 1
                    return server
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    raise EngineError(
                        f"no server could be asked for {self._deadline:g} s: "
                        + "; ".join(str(server.problem) for server in self._servers)
                    )

    def _release(self, server: _Server) -> None:
        with self._changed:
            server.outstanding -= 1

    def _lose(self, server: _Server, problem: str) -> None:
        """Ask a server for nothing until it is back with the right weights."""
        with self._changed:
            if server.problem is not None:
                return
            server.problem = problem
        logger.warning(
            "%s; its requests go to another server, or to itself once it is back", problem
        )
        threading.Thread(target=self._recover, args=(server,), daemon=True).start()

    def _recover(self, server: _Server) -> None:
        """Try a lost server again and again, and bring it up to date."""
        pause = FIRST_PAUSE
        while not self._closed.wait(pause):
            try:
                stamp = server.client.weight_stamp()
                with self._syncing:
                    if server.problem is None or self._closed.is_set():  # another sync was faster
                        return
                    if stamp != self.stamp:
                        self._sync.resync(server.client)
                    self._regain([server])
                logger.warning("%s is back", server.client)
                return
            except EngineError as error:
                server.problem = str(error)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _regain(self, servers: Sequence[_Server]) -> None:
        with self._changed:
            for server in servers:
                server.problem = None
            self._changed.notify_all()
