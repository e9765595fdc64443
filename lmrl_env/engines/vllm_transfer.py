"""How full weights get from the trainer into vLLM servers: in buckets, by NCCL or over HTTP."""

from __future__ import annotations

import base64
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmrl_env.engines.vllm_client import ServerLost, VllmClient
from lmrl_env.errors import EngineError

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 64 * 2**20
"""Size of a bucket, unless one tensor alone is larger."""


class Transfer(Protocol):
    """Brings buckets of tensors to servers."""

    @property
    def keeps_weights(self) -> bool:
        """Whether ``replay`` can bring the last weights once more."""

    def connect(self, server: VllmClient, seconds: float) -> None:
        """Go through vLLM's phase init with a server."""

    def begin(self) -> None:
        """Forget the weights of before."""

    def pack(self, bucket: list[tuple[str, torch.Tensor]]) -> Any:
        """Return what ``send`` takes, the same for every server."""

    def send(self, server: VllmClient, packed: Any, seconds: float) -> None:
        """Go through the phase update with a server, for one bucket."""

    def replay(self, server: VllmClient, seconds: float) -> None:
        """Go through the phase update with a server, for all buckets since ``begin``."""

    def close(self) -> None:
        """Free everything."""


class HttpTransfer:
    """Buckets within the requests, to servers that load ``engines/vllm_receiver.py``.

    The last weights stay in a temporary folder, for servers that are started anew.
    """

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="lmrl-weights-")
        self._folder = Path(self._temporary.name)
        self._count = 0

    @property
    def keeps_weights(self) -> bool:
        """Whether there are any: on rank 0, after its first sync."""
        return self._count > 0

    def connect(self, server: VllmClient, seconds: float) -> None:
        """Tell the server; nothing else is needed."""
        server.post("/init_weight_transfer_engine", {"init_info": {}}, seconds, "connect")

    def begin(self) -> None:
        """Forget the weights of before."""
        for path in self._folder.iterdir():
            path.unlink()
        self._count = 0

    def pack(self, bucket: list[tuple[str, torch.Tensor]]) -> bytes:
        """Return the body of a request, after keeping it."""
        from safetensors.torch import save

        # Copies: tied weights are one tensor under two names, which safetensors does not write.
        data = save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in bucket})
        body = b'{"update_info": {"bucket": "' + base64.b64encode(data) + b'"}}'
        self._path(self._count).write_bytes(body)
        self._count += 1
        return body

    def send(self, server: VllmClient, packed: bytes, seconds: float) -> None:
        """Send a bucket."""
        server.request("POST", "/update_weights", packed, seconds, "take a bucket of weights")

    def replay(self, server: VllmClient, seconds: float) -> None:
        """Send all buckets again."""
        for number in range(self._count):
            self.send(server, self._path(number).read_bytes(), seconds)

    def close(self) -> None:
        """Remove the folder."""
        self._temporary.cleanup()

    def _path(self, number: int) -> Path:
        return self._folder / f"bucket-{number:06}.json"


class NcclTransfer:
    """vLLM's own backend ``nccl``: packed broadcasts from this GPU, one NCCL group a server.

    A server that is started anew gets its weights at the next sync, since none are kept.

    Raises:
        EngineError: if there is no CUDA or no vLLM on this side.
    """

    keeps_weights = False

    def __init__(self) -> None:
        import torch

        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise EngineError(
                f"the servers expect weights by NCCL, which needs vLLM here too ({error}): install "
                "it, or start them with `lmrl serve --weight-transfer lmrl_http`"
            ) from error
        if not torch.cuda.is_available():
            raise EngineError(
                "the servers expect weights by NCCL, but there is no CUDA device here: start them "
                "with `lmrl serve --weight-transfer lmrl_http`"
            )
        self._device = torch.cuda.current_device()
        self._groups: dict[VllmClient, Any] = {}

    def connect(self, server: VllmClient, seconds: float) -> None:
        """Open a group of this process (rank 0) and the server's workers."""
        import torch
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        torch.cuda.set_device(self._device)  # every thread has a current device of its own
        if stale := self._groups.pop(server, None):
            stale.destroy()
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        group = {
            "master_address": server.local_address(),
            "master_port": port,
            "world_size": 1 + server.get("/get_world_size")["world_size"],
        }
        info = {**group, "rank_offset": 1, "packed": True, "packed_buffer_size_bytes": BUCKET_BYTES}
        body = {"init_info": info}
        with ThreadPoolExecutor(1) as pool:  # both sides wait for each other
            joined = pool.submit(
                server.post, "/init_weight_transfer_engine", body, seconds, "join the NCCL group"
            )
            self._groups[server] = trainer_init(group)
            joined.result()

    def begin(self) -> None:
        """Do nothing: no weights are kept."""

    def pack(self, bucket: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Return the tensors on this GPU."""
        import torch

        packed = [(name, t.detach().to(self._device)) for name, t in bucket]
        torch.cuda.current_stream().synchronize()  # they are sent on another stream
        return packed

    def send(
        self, server: VllmClient, packed: list[tuple[str, torch.Tensor]], seconds: float
    ) -> None:
        """Broadcast a bucket while the server's workers receive it."""
        import torch
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(self._device)
        info = {
            "names": [name for name, _ in packed],
            "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in packed],
            "shapes": [list(t.shape) for _, t in packed],
        }
        pool = ThreadPoolExecutor(1)
        received = pool.submit(
            server.post, "/update_weights", {"update_info": info}, seconds, "take a bucket"
        )
        try:
            packed_nccl_broadcast_producer(
                iterator=iter(packed),
                group=self._groups[server],
                src=0,
                post_iter_func=lambda item: item[1],
                buffer_size_bytes=BUCKET_BYTES,
            )
            received.result()
        finally:
            pool.shutdown(wait=False)  # after a failed broadcast the server may never answer

    def replay(self, server: VllmClient, seconds: float) -> None:
        """Refuse: no weights are kept."""
        raise ServerLost(f"{server} gets its weights at the next sync")

    def close(self) -> None:
        """Leave the groups."""
        for group in self._groups.values():
            group.destroy()
        self._groups.clear()


TRANSFERS: dict[str, Callable[[], Transfer]] = {"nccl": NcclTransfer, "lmrl_http": HttpTransfer}
"""By the name of vLLM's weight transfer backend."""


def buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the tensors in lists of at most ``BUCKET_BYTES``, unless one alone has more."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
