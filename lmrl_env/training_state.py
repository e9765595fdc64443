"""What a resumed run needs besides the model: optimisers, a critic, random states, a batch ahead.

Every rank takes part in gathering it, and the first one writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmrl_env.adapters import ADAPTER_FOLDER, adapter_weights, merge_adapters, save_adapters
from lmrl_env.checkpoint import TRAINER, save_model
from lmrl_env.distributed import all_gather, all_rollouts, any_rank
from lmrl_env.durable import naming
from lmrl_env.errors import ModelError, RunFolderError
from lmrl_env.random_states import random_states, set_random_states
from lmrl_env.rollout import Rollout
from lmrl_env.run_folder import RunFolder
from lmrl_env.sharding import (
    full_optimizer_state,
    full_tensors,
    load_full_optimizer_state,
    load_full_tensors,
    names_once,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

VALUES_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random_states.safetensors"
AHEAD_FILE = "ahead.safetensors"

Trained = tuple[nn.Module, torch.optim.Optimizer]
"""A module and its optimiser, as ``prepare`` returned them."""


class TrainingState(NamedTuple):
    """What is in the folder ``trainer/`` of a checkpoint.

    Attributes:
        values: plain values, into ``state.json``: step, cursor, number of ranks.
        tensors: tensors by name, by file.
        ahead: rollout of all ranks that is trained on next, where one was sampled ahead.
    """

    values: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    ahead: Rollout | None

    @classmethod
    def gather(
        cls,
        accelerator: Accelerator,
        values: dict[str, Any],
        policy: Trained,
        others: Mapping[str, Trained],
        ahead: Rollout | None,
    ) -> TrainingState:
        """Collect the state of all ranks.

        Args:
            accelerator: of this rank.
            values: see the class.
            policy: of which the optimiser alone is state; its module is the model.
            others: further modules under training, by name.
            ahead: of this rank.
        """
        tensors = {OPTIMIZER_FILE: full_optimizer_state(accelerator, *policy)}
        for name, (module, optimizer) in others.items():
            tensors[f"{name}.safetensors"] = _module_tensors(accelerator, module)
            tensors[f"{name}_{OPTIMIZER_FILE}"] = full_optimizer_state(
                accelerator, module, optimizer
            )
        ranks = {k: all_gather(accelerator, v[None]).cpu() for k, v in random_states().items()}
        tensors[RANDOM_FILE] = ranks  # (ranks, size of a state) each
        if ahead is not None:
            ahead = all_rollouts(accelerator, ahead)
        return cls(values, tensors, ahead)

    def save(self, folder: Path) -> None:
        """Write it.

        Raises:
            RunFolderError: if a file cannot be written.
        """
        for name, tensors in self.tensors.items():
            with naming(folder / name):
                save_file(tensors, folder / name)
        if self.ahead is not None:
            with naming(folder / AHEAD_FILE):
                self.ahead.save(folder / AHEAD_FILE)
        with naming(folder / VALUES_FILE):
            (folder / VALUES_FILE).write_text(json.dumps(self.values, indent=2) + "\n")


def save_checkpoint(
    accelerator: Accelerator,
    folder: RunFolder,
    policy: nn.Module,
    state: TrainingState,
    tokenizer_of: str,
) -> None:
    """Write the checkpoint of a step, on the first rank.

    Args:
        accelerator: of this rank.
        folder: of the run.
        policy: as ``prepare`` returned it.
        state: besides the policy's weights.
        tokenizer_of: name of the model whose tokenizer is saved.

    Raises:
        RunFolderError: on all ranks, if it cannot be written.
    """
    main, model = accelerator.is_main_process, accelerator.unwrap_model(policy).model
    weights = {name: tensor.cpu() for name, tensor in full_tensors(model) if main}
    failure: RunFolderError | None = None
    if main:
        try:
            folder.sync_logs()  # a checkpoint counts on the rows before it
            with folder.checkpoints.write(state.values["step"]) as partial:
                merged = dict(merge_adapters(model, weights.items()))
                save_model(partial, model, merged, tokenizer_of)
                if adapters := adapter_weights(weights.items()):
                    save_adapters(partial / ADAPTER_FOLDER, model, adapters)
                state.save(partial / TRAINER)
        except RunFolderError as error:
            failure = error
    if any_rank(accelerator, failure is not None):
        raise failure or RunFolderError("the first rank cannot write the checkpoint: see there")


def read_ahead(folder: Path) -> Rollout | None:
    """Return the rollout of all ranks that was sampled ahead, or None."""
    file = folder / AHEAD_FILE
    return Rollout.load(file)[0] if file.exists() else None


def restore_random_states(folder: Path, rank: int) -> None:
    """Put a rank's random states back; a rank that was not there before keeps its own."""
    states = load_file(folder / RANDOM_FILE)
    if rank < len(states["torch"]):
        set_random_states({name: state[rank] for name, state in states.items()})


def restore_optimizer(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put an optimiser's state back, its hyper-parameters left as they are.

    Raises:
        ModelError: if it belongs to a model with other parameters.
    """
    state = load_file(file)
    found = len({key.partition(".")[0] for key in state})
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if not state:  # no step was taken before
        return
    if found != count:
        raise ModelError(
            f"{file} holds the state of {found} parameters, expected {count}: resume with the "
            "--model of the run"
        )
    load_full_optimizer_state(module, optimizer, state)


def restore_other(
    folder: Path,
    name: str,
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put a further module and its optimiser back.

    Raises:
        ModelError: if the state has no such module, or another one under its name.
    """
    file = folder / f"{name}.safetensors"
    try:
        load_full_tensors(accelerator.unwrap_model(module), load_file(file))
    except (OSError, LookupError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{file} does not hold the {name} of this run ({error}): resume with the algorithm "
            "and the --model that wrote it"
        ) from error
    restore_optimizer(folder / f"{name}_{OPTIMIZER_FILE}", module, optimizer)


def _module_tensors(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, those that are tied to each other once."""
    module = accelerator.unwrap_model(module)
    once = names_once(module)
    whole = ((k, v) for k, v in full_tensors(module) if accelerator.is_main_process)
    return {name: tensor.cpu().contiguous() for name, tensor in whole if name in once}
