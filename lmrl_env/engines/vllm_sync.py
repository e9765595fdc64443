"""Replacing the weights of vLLM servers, and knowing which weights a server holds."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING

from lmrl_env.engines.vllm_client import ServerLost, ServerRefused, VllmClient
from lmrl_env.engines.vllm_transfer import Transfer, buckets
from lmrl_env.errors import WeightSyncError

if TYPE_CHECKING:
    import torch

FIRST_STAMP = "default"
"""What vLLM calls the weights that it started with."""


class WeightSync:
    """Replaces the weights of servers in vLLM's four phases: init, start, update, finish.

    Attributes:
        stamp: under which every server keeps the weights that it should hold. It is new with
            every sync and with every run, so that other weights cannot pass for these.
    """

    def __init__(self, transfer: Transfer, seconds: float):
        """Make one without any server.

        Args:
            transfer: brings the buckets.
            seconds: longest wait for a server in a phase.
        """
        self.stamp = FIRST_STAMP
        self._transfer = transfer
        self._seconds = seconds
        self._connected: set[VllmClient] = set()

    def update(
        self,
        servers: Sequence[VllmClient],
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
    ) -> dict[VllmClient, ServerLost]:
        """Replace the weights of servers, all at once.

        Args:
            servers: all that are to sample from them.
            named_tensors: full tensors under the names of the Transformers model's state dict.
            version: of the weights.

        Returns:
            The servers that cannot be reached, with what happened.

        Raises:
            WeightSyncError: if a server refuses the weights or lets the time pass.
        """
        self.stamp = f"{uuid.uuid4().hex[:12]}/{version}"
        self._transfer.begin()
        lost: dict[VllmClient, ServerLost] = {}
        sent = 0

        def everywhere(action: Callable[[VllmClient], None]) -> None:
            left = [server for server in servers if server not in lost]
            where = f"weights of version {version}, {sent} tensors after the start"
            lost.update(self._everywhere(left, action, where))

        everywhere(self._start)
        for bucket in buckets(named_tensors):
            packed = self._transfer.pack(bucket)
            everywhere(partial(self._transfer.send, packed=packed, seconds=self._seconds))
            sent += len(bucket)
            bucket.clear()  # the tensors go before the next ones are gathered
            del packed
        everywhere(self._finish)
        return lost

    def resync(self, server: VllmClient) -> None:
        """Bring the last weights to a server that was started anew.

        Raises:
            ServerLost: if it is lost again, or no weights are kept.
            ServerRefused: if it refuses them.
        """
        self._connected.discard(server)
        if not self._transfer.keeps_weights:
            raise ServerLost(
                f"{server} holds the weights {server.weight_stamp()!r} instead of {self.stamp!r} "
                "and gets others at the next sync only"
            )
        self._start(server)
        self._transfer.replay(server, self._seconds)
        self._finish(server)

    def close(self) -> None:
        """Free everything."""
        self._transfer.close()

    def _start(self, server: VllmClient) -> None:
        if server not in self._connected:
            self._transfer.connect(server, self._seconds)
            self._connected.add(server)
        # Should anything break off from here on, the server holds no weights that we know.
        self._stamp(server, f"{self.stamp} unfinished")
        try:
            server.post("/start_weight_update", {}, self._seconds, "start an update")
        except ServerRefused as error:
            if "already active" not in str(error):
                raise
            self._end_broken_update(server)
            server.post("/start_weight_update", {}, self._seconds, "start an update")

    def _end_broken_update(self, server: VllmClient) -> None:
        phase = "end a broken-off update"
        try:
            server.post("/finish_weight_update", {}, self._seconds, phase)
        except ServerRefused:  # it tells what did not arrive, and ends if asked again
            server.post("/finish_weight_update", {}, self._seconds, phase)

    def _finish(self, server: VllmClient) -> None:
        server.post("/finish_weight_update", {}, self._seconds, "finish an update")
        if not server.post("/reset_prefix_cache", {}, self._seconds, "reset")["success"]:
            raise ServerRefused(f"{server} keeps prefixes of older weights", 200)
        self._stamp(server, self.stamp)

    def _stamp(self, server: VllmClient, stamp: str) -> None:
        server.post("/update_weight_version", {"new_version": stamp}, self._seconds, "be stamped")

    def _everywhere(
        self, servers: Sequence[VllmClient], action: Callable[[VllmClient], None], where: str
    ) -> dict[VllmClient, ServerLost]:
        """Do something with all servers at once, and return those that were lost."""
        if not servers:
            return {}
        pool = ThreadPoolExecutor(len(servers))
        futures = {server: pool.submit(action, server) for server in servers}
        _, hanging = wait(futures.values(), timeout=2 * self._seconds)
        pool.shutdown(wait=False)
        lost = {}
        for server, future in futures.items():
            if future in hanging:
                raise WeightSyncError(
                    f"{where}: nothing from {server} within {2 * self._seconds:g} s; look at its "
                    "log and start it anew"
                )
            error = future.exception()
            if isinstance(error, ServerLost):
                self._connected.discard(server)
                lost[server] = error
            elif isinstance(error, ServerRefused):
                raise WeightSyncError(
                    f"{where}: {error}; expected the full tensors of the Transformers model's "
                    "state dict. Its weights may be partly replaced, and it is not asked for "
                    "responses before a sync succeeds"
                ) from error
            elif error is not None:
                raise error
        return lost
