"""One vLLM server as seen from here: its HTTP routes, and what can go wrong on the way."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from lmrl_env.errors import ConfigurationError, EngineError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""Longest wait for a server to accept a connection, or to answer a question about itself."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two tries to reach a server; each pause is twice the one before."""


class ServerLost(EngineError):  # noqa: N818  (what happened, not what was done wrong)
    """A server that cannot be reached, broke off, or does not hold the weights that it should."""


class ServerRefused(EngineError):  # noqa: N818
    """A server that answers, but not with what it was asked for.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class InFlight:
    """Requests of several threads that can be broken off together; their server forgets them.

    Attributes:
        aborted: whether they were; every later request then fails as well.
    """

    def __init__(self) -> None:
        self.aborted = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    @contextmanager
    def holding(self, connection: socket.socket) -> Iterator[None]:
        """Hold the connection of a request while its answer is awaited."""
        with self._lock:
            if self.aborted:
                raise ConnectionAbortedError("the call was broken off")
            self._sockets.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(connection)

    def abort(self) -> None:
        """Break off every request."""
        with self._lock:
            self.aborted = True
            for connection in self._sockets:
                with suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)


class VllmClient:
    """Speaks to one vLLM server; every request has a connection of its own.

    Args:
        url: such as ``http://host:8000``.

    Raises:
        ConfigurationError: if the URL is none of HTTP.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigurationError(f"server {url!r}: expected a URL such as http://host:8000")
        self.url = url.rstrip("/")
        self.host = parts.hostname
        self.port = parts.port or 80
        self._prefix = parts.path.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def get(self, path: str) -> Any:
        """Ask the server about itself."""
        return self.request("GET", path, None, CONNECT_SECONDS, f"answer {path}")

    def post(self, path: str, body: Any, seconds: float, phase: str) -> Any:
        """Send a JSON body and return the JSON answer; see ``request``."""
        return self.request("POST", path, json.dumps(body).encode(), seconds, phase)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        seconds: float,
        phase: str,
        in_flight: InFlight | None = None,
    ) -> Any:
        """Send a request and return the JSON answer.

        Args:
            method: of HTTP.
            path: of the route.
            body: JSON.
            seconds: longest wait for the answer.
            phase: what the server is to do, for the errors.
            in_flight: may break it off.

        Raises:
            ServerLost: if the server cannot be reached, breaks off, or lets the time pass.
            ServerRefused: if it answers with an error.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            _notice_a_lost_machine(connection.sock)
            headers = {"Content-Type": "application/json", "Connection": "close"}
            with (in_flight or InFlight()).holding(connection.sock):
                connection.request(method, self._prefix + path, body, headers)
                response = connection.getresponse()
                answer = response.read()
        except TimeoutError as error:
            raise ServerLost(f"{self} did not {phase} within {seconds:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerLost(f"{self} did not {phase}: {error!r}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise ServerRefused(
                f"{self} did not {phase}: {_message(answer)} (HTTP {response.status})",
                response.status,
            )
        return json.loads(answer)

    def weight_stamp(self) -> str:
        """Return the name that the server itself keeps of the weights it holds."""
        return self.get("/weight_info")["weight_version"]

    def wait_until_up(self, seconds: float) -> dict[str, Any]:
        """Wait for a server that may be starting, and return its configuration.

        Raises:
            EngineError: if it cannot be reached in time, or has no developer routes.
        """
        deadline, pause = time.monotonic() + seconds, FIRST_PAUSE
        while True:
            try:
                return self.get("/server_info?config_format=json")["vllm_config"]
            except ServerRefused as error:
                raise EngineError(
                    f"{error}: expected a server of vLLM 0.32 with its developer routes; start it "
                    "with `lmrl serve MODEL`"
                ) from error
            except ServerLost as error:
                if time.monotonic() + pause > deadline:
                    raise EngineError(
                        f"no server after {seconds:g} s of waiting for it to start: {error}; "
                        "start it with `lmrl serve MODEL`, and check host and port"
                    ) from error
                if pause == FIRST_PAUSE:
                    logger.warning("%s; waiting up to %g s for it to start", error, seconds)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def local_address(self) -> str:
        """Return this machine's address as the server's machine can reach it."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self.host, self.port))  # sends nothing
            return probe.getsockname()[0]


def _notice_a_lost_machine(connection: socket.socket) -> None:
    """End a connection whose other side has been silent for half a minute, even to the kernel."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _message(answer: bytes) -> str:
    """Return the message of a server's error."""
    try:
        return json.loads(answer)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return answer[:500].decode(errors="replace")
