"""Settings of a run that cannot be meant, all of them told at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmrl_env.batch_plan import batch_problems
from lmrl_env.errors import ConfigurationError
from lmrl_env.options import check_range
from lmrl_env.profiling import WARM_UP
from lmrl_env.tokenizer import load_tokenizer

_AT_LEAST_1: Mapping[str, float] = {"least": 1}
_AT_LEAST_0: Mapping[str, float] = {"least": 0}
_ABOVE_0: Mapping[str, float] = {"above": 0}
RANGES: Mapping[str, Mapping[str, float]] = {
    "steps": _AT_LEAST_1,
    "epochs": _AT_LEAST_1,
    "group_size": _AT_LEAST_1,
    "eval_questions": _AT_LEAST_1,
    "max_new_tokens": _AT_LEAST_1,
    "rollout_parts": _AT_LEAST_1,
    "micro_batch_tokens": _AT_LEAST_1,
    "lora_rank": _AT_LEAST_1,
    "seed": _AT_LEAST_0,
    "profile": _AT_LEAST_0,
    "lr": _AT_LEAST_0,
    "warmup_steps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "entropy_coef": _AT_LEAST_0,
    "eval_every": _AT_LEAST_0,
    "checkpoint_every": _AT_LEAST_0,
    "keep_checkpoints": _AT_LEAST_0,
    "temperature": _ABOVE_0,
    "max_grad_norm": _ABOVE_0,
    "tis_cap": _ABOVE_0,
    "wait_limit": _ABOVE_0,
    "adam_beta2": {"least": 0, "most": 1},
    "async_depth": {"least": 0, "most": 1},
}
"""Of the settings that all algorithms share."""


def check_settings(args: Any, ranks: int) -> None:
    """Refuse settings that are out of their range or contradict each other.

    Args:
        args: a program's arguments, with the fields that ``algos/`` share.
        ranks: number of processes.

    Raises:
        ConfigurationError: that tells all of them, with the arithmetic.
        ModelError: if the model's context cannot be read.
    """
    problems = []
    for name, limits in RANGES.items():
        try:
            check_range(args, name, **limits)
        except ConfigurationError as error:
            problems.append(str(error))
    problems += batch_problems(args.prompts_per_step, ranks, args.updates_per_step)
    if bool(args.servers) != (args.engine == "vllm_server"):
        problems.append(
            f"--servers {args.servers} with --engine {args.engine}: expected URLs of servers with "
            "--engine vllm_server, such as http://127.0.0.1:8000, and none with another engine"
        )
    if args.profile and args.profile + WARM_UP > args.steps:
        problems.append(
            f"--profile {args.profile} behind {WARM_UP} steps of warm-up, with --steps "
            f"{args.steps}: use at least {args.profile + WARM_UP} steps"
        )
    context = load_tokenizer(args.model).context_length
    if args.max_new_tokens >= context:
        problems.append(
            f"--max-new-tokens {args.max_new_tokens}: the context of {args.model} leaves "
            f"{context} - {args.max_new_tokens} = {context - args.max_new_tokens} tokens for a "
            f"question; use less than {context}"
        )
    if len(problems) > 1:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigurationError(f"{len(problems)} settings cannot be meant:{listed}")
    if problems:
        raise ConfigurationError(problems[0])
