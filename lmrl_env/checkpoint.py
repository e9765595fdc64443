"""Checkpoints: a Transformers folder with the optimiser's state beside it, written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from lmrl_env.adapters import ADAPTER_FOLDER, adapter_weights, merge_adapters, save_adapters
from lmrl_env.errors import ModelError
from lmrl_env.tokenizer import model_path

OPTIMIZER_FILE = "optimizer.safetensors"
TRAINER_FILE = "trainer.json"


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer_of: str,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    others: Mapping[str, tuple[nn.Module, torch.optim.Optimizer]],
) -> None:
    """Write a checkpoint that ``--model`` and ``--resume`` can both load.

    It is written beside ``folder`` and renamed into place when it is whole, so that a folder of
    that name is never half a checkpoint.

    Args:
        folder: such as ``checkpoints/step-100``; replaced if it exists.
        model: the policy; if it has adapters, they are merged, and beside it in ``adapter/``.
        tokenizer_of: model name whose tokenizer is saved with it.
        optimizer: its state goes into ``optimizer.safetensors``.
        state: plain values, into ``trainer.json``.
        others: further modules under training and their optimisers, by name, into
            ``NAME.safetensors`` and ``NAME_optimizer.safetensors``.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(
        partial, state_dict=dict(merge_adapters(model, model.state_dict().items()))
    )
    if adapters := adapter_weights(model.state_dict().items()):
        save_adapters(partial / ADAPTER_FOLDER, model, adapters)
    AutoTokenizer.from_pretrained(model_path(tokenizer_of)).save_pretrained(partial)
    save_file(_optimizer_tensors(optimizer), partial / OPTIMIZER_FILE)
    for name, (module, its_optimizer) in others.items():
        save_model(module, str(partial / f"{name}.safetensors"))
        save_file(_optimizer_tensors(its_optimizer), partial / f"{name}_{OPTIMIZER_FILE}")
    (partial / TRAINER_FILE).write_text(json.dumps(state, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": value.contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer(file: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimiser of a checkpoint back, its hyper-parameters left as they are.

    Raises:
        ModelError: if it belongs to a model with other parameters.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(file).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    packed = optimizer.state_dict()
    count = sum(len(group["params"]) for group in packed["param_groups"])
    if state and len(state) != count:
        raise ModelError(
            f"{file} holds the state of {len(state)} parameters, expected "
            f"{count}: resume with the --model of the run"
        )
    optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def load_other(
    folder: Path, name: str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a further module of a checkpoint and its optimiser back.

    Raises:
        ModelError: if the checkpoint has no such module, or another one under its name.
    """
    file = folder / f"{name}.safetensors"
    try:
        load_model(module, str(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{file} does not hold the {name} of this run ({error}): resume with the algorithm "
            "and the --model that wrote it"
        ) from error
    load_optimizer(folder / f"{name}_{OPTIMIZER_FILE}", optimizer)


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    found = [
        folder
        for folder in checkpoints.glob("step-*")
        if folder.suffix != ".partial" and (folder / TRAINER_FILE).is_file()
    ]
    return max(found, key=lambda folder: int(folder.name.removeprefix("step-")), default=None)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the plain values that ``save_checkpoint`` was given."""
    return json.loads((folder / TRAINER_FILE).read_text())
