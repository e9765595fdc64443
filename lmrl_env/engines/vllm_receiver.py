"""What a vLLM server loads to receive weights over HTTP, where NCCL cannot bring them.

vLLM's own backends need CUDA on both sides. This one stands beside them in vLLM's registry and goes
through the same four phases (init, start, update, finish), but the request of an update holds a
bucket of tensors itself: nothing has to be open between trainer and server except the server's
port. ``--worker-extension-cls`` makes vLLM import this module in its workers, and only there.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info


@dataclass
class HttpInitInfo(WeightTransferInitInfo):
    """Nothing: the requests need no connection of their own."""


@dataclass
class HttpUpdateInfo(WeightTransferUpdateInfo):
    """One bucket.

    Attributes:
        bucket: full tensors under the names of the Transformers model's state dict, as
            safetensors in base64.
    """

    bucket: str


class HttpWeightTransferEngine(WeightTransferEngine[HttpInitInfo, HttpUpdateInfo]):
    """Loads buckets of weights into a worker's model as they arrive."""

    init_info_cls = HttpInitInfo
    update_info_cls = HttpUpdateInfo

    _missing: set[str]

    def init_transfer_engine(self, init_info: HttpInitInfo) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Expect every weight of the model anew."""
        self._missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket.

        Raises:
            ValueError: if a tensor does not belong to the model; the weights are then partly
                replaced, and a new update can start.
        """
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            self._abandon()
            raise ValueError(f"the model does not take the weights: {error!r}") from error
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HttpUpdateInfo) -> None:
        """Load one bucket."""
        load_weights: Any = self.model.load_weights
        self._missing -= load_weights(load(base64.b64decode(update_info.bucket)).items())

    def finish_weight_update(self) -> None:
        """Take the new weights into use.

        Raises:
            ValueError: if weights of the model did not arrive.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        missing, self._missing = self._missing, set()  # so that finishing again ends the update
        if missing:
            raise ValueError(
                f"{len(missing)} weights of the model did not arrive: {sorted(missing)[:5]}"
            )

    def shutdown(self) -> None:
        """Do nothing."""

    def _abandon(self) -> None:
        """Forget what waits to be loaded, so that the layers stand on tensors again."""
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights.clear()
            info.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)


class WorkerExtension:
    """Adds nothing to a worker: naming it makes the worker import this module."""


WeightTransferEngineFactory.register_engine("lmrl_http", HttpWeightTransferEngine)
