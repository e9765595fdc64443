"""What a training run is built of: environments, models and the engine, from its settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.vector import VectorEnv
from torch import nn

from lmrl_env.adapters import ADAPTER_FOLDER, WithoutAdapters, add_adapters, load_adapters
from lmrl_env.distributed import is_sharded, prepare_frozen
from lmrl_env.errors import ConfigurationError
from lmrl_env.policy import Policy, load_model
from lmrl_env.registration import make_engine

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from lmrl_env.engines.engine import Engine

Envs = VectorEnv[Any, Any, Any]


def make_envs(args: Any, groups: int, ranks: int) -> tuple[Envs, Envs]:
    """Make a rank's environments, to train in and to evaluate in.

    Args:
        args: a program's arguments, with the fields that ``algos/`` share.
        groups: questions of this rank in a step.
        ranks: number of processes, which share the evaluation.

    Raises:
        ConfigurationError: if ``--env`` cannot be made.
    """
    common = {
        "model": args.model,
        "engine": args.engine,
        "max_new_tokens": args.max_new_tokens,
        "tokens_per_step": args.max_new_tokens,
        "autoreset_mode": "Disabled",
        **({"servers": args.servers} if args.servers else {}),
    }
    try:
        envs = gym.make_vec(
            args.env,
            groups * args.group_size,
            questions=args.questions,
            group_size=args.group_size,
            **common,
        )
        eval_envs = gym.make_vec(
            args.env,
            math.ceil(args.eval_questions / ranks),
            questions=args.eval_set or args.questions,
            split="all" if args.eval_set else "heldout",
            **common,
        )
    except (gym.error.Error, ImportError, TypeError) as error:
        raise ConfigurationError(
            f"--env {args.env!r} cannot be made ({error}): expected an id such as MathR1-v0 or "
            "my_module:MyEnv-v0 of a module here or installed, over make_token_vector_env"
        ) from error
    return envs, eval_envs


def load_trained_model(args: Any, checkpoint: Path | None, device: Any) -> PreTrainedModel:
    """Load the model to train: that of the checkpoint where a run is resumed.

    Args:
        args: a program's arguments, with the fields that ``algos/`` share.
        checkpoint: folder to go on from, or None.
        device: where the weights shall be.

    Raises:
        ConfigurationError: for an attention that cannot compute in ``--dtype``.
    """
    if args.attention == "flash_attention_2" and args.dtype == "float32":
        raise ConfigurationError(
            "--attention flash_attention_2 has no float32: add --dtype bfloat16"
        )
    adapted = args.lora_rank is not None
    model = load_model(
        str(args.model if adapted else checkpoint or args.model),
        device=device,
        attention=args.attention,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    if adapted:
        add_adapters(model, args.lora_rank)
        if checkpoint is not None:
            load_adapters(checkpoint / ADAPTER_FOLDER, model)
    return model


def load_reference(accelerator: Accelerator, args: Any, policy: nn.Module) -> nn.Module:
    """Return the policy that a run started from, frozen, on this rank's device.

    Args:
        accelerator: of this rank.
        args: a program's arguments, with the fields that ``algos/`` share.
        policy: as ``prepare`` returned it; without its adapters, if it has any, it is the
            reference itself.
    """
    trained: Policy = accelerator.unwrap_model(policy)
    if args.lora_rank is not None:
        return WithoutAdapters(trained)
    model = load_model(args.model, device=accelerator.device, attention=args.attention)
    reference = Policy(model, trained.vocab_size).requires_grad_(False)
    return prepare_frozen(accelerator, reference)


def start_engine(
    accelerator: Accelerator, args: Any, policy: nn.Module, max_model_len: int
) -> Engine:
    """Start what samples; its weights are those of ``--model``, or the policy's own.

    Args:
        accelerator: of this rank.
        args: a program's arguments, with the fields that ``algos/`` share.
        policy: as ``prepare`` returned it.
        max_model_len: most tokens of a prompt and its response together.
    """
    # Beside the training, from adapters or a sharded module, the local engine cannot sample.
    alone = args.async_depth or args.lora_rank or is_sharded(accelerator)
    return make_engine(
        args.engine,
        args.model,
        max_model_len=max_model_len,
        module=None if alone else accelerator.unwrap_model(policy).model,
        dtype=args.dtype,
        device=str(accelerator.device),
        seed=args.seed,
        servers=args.servers,
    )
