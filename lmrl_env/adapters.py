"""LoRA: low-rank adapters beside frozen weights, by PEFT, and the weights that both add up to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmrl_env.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LORA_ALPHA = 32
"""An adapter adds (α/r) B·A. With one α for all ranks, a good learning rate depends little on r."""

ADAPTER_FOLDER = "adapter"
"""Of a checkpoint: the adapters in PEFT's format, beside the merged model."""

ADAPTER = "default"  # PEFT's name of the only adapter
WEIGHTS_FILE = "adapter_model.safetensors"


def add_adapters(model: PreTrainedModel, rank: int) -> None:
    """Put adapters beside all linear layers of a model's blocks, and freeze everything else.

    W + (α/r) B·A, A random and B = 0: the model computes what it did before, exactly.
    Hu et al. 2021, arXiv:2106.09685

    Args:
        model: a causal language model, which is changed in place and keeps its class.
        rank: r, at least 1.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=LORA_ALPHA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    inject_adapter_in_model(config, model, ADAPTER)


def merge_adapters(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights as the model without adapters would hold them: W + (α/r) B·A for each W.

    Only one matrix exists in merged form at a time, if the caller keeps none.

    Args:
        model: whose layers say what α, r and the orientation of W are.
        weights: full tensors in the order of the model's state dict.

    Yields:
        Names and tensors, those without adapters as they were given.
    """
    for name, tensor in weights:
        if name.endswith(".base_layer.weight"):
            base = tensor
        elif ".lora_A." in name:
            down = tensor
        elif ".lora_B." in name:
            owner = name.partition(".lora_B.")[0]
            layer: Any = model.get_submodule(owner)
            factors = (down.T, tensor.T) if layer.fan_in_fan_out else (tensor, down)
            yield f"{owner}.weight", torch.addmm(base, *factors, alpha=layer.scaling[ADAPTER])
        else:
            yield name.replace(".base_layer.", "."), tensor


@contextmanager
def adapters_disabled(model: PreTrainedModel) -> Iterator[None]:
    """Make a model compute what it would without its adapters, for a while."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.set_scale(ADAPTER, 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1)


class WithoutAdapters(nn.Module):
    """A policy as it was before training, at no memory: its adapters are disabled in each call.

    Args:
        policy: with a ``model`` that has adapters.
    """

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.policy = policy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the policy does, without gradient."""
        model: Any = self.policy.model
        with torch.no_grad(), adapters_disabled(model):
            return self.policy(*args, **kwargs)


def adapter_weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the adapters' own tensors under the names of PEFT's files; nothing without adapters.

    Args:
        weights: full tensors by the names of the model's state dict.
    """
    return {
        "base_model.model." + name.replace(f".{ADAPTER}.", "."): tensor
        for name, tensor in weights
        if ".lora_" in name
    }


def save_adapters(folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Write adapters as PEFT does; ``load_adapters`` reads them too.

    Args:
        folder: which is made.
        model: whose adapters they are.
        weights: as ``adapter_weights`` returns them.
    """
    folder.mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config: Any = model.peft_config
    config[ADAPTER].save_pretrained(folder)


def load_adapters(folder: Path, model: PreTrainedModel) -> None:
    """Put adapters back, bit for bit.

    Args:
        folder: that ``save_adapters`` wrote.
        model: with adapters of the same rank.

    Raises:
        ModelError: if there are none in the folder, or they do not fit the model's.
    """
    file = folder / WEIGHTS_FILE
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} cannot be read ({error}): expected adapters; resume a run of all weights "
            "without --lora-rank"
        ) from error
    own = adapter_weights(model.state_dict().items())
    shapes, expected = ({n: tuple(t.shape) for n, t in w.items()} for w in (saved, own))
    if shapes != expected:
        name = min(name for name, _ in shapes.items() ^ expected.items())
        raise ModelError(
            f"{file} holds {name} of shape {shapes.get(name)}, expected {expected.get(name)}: "
            "resume with the --model and the --lora-rank of the run"
        )
    for name, tensor in saved.items():
        own[name].copy_(tensor)
