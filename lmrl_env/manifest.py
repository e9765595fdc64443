"""What a run is going to do, before it does it: the sizes of a step, its data, model and memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lmrl_env.distributed import is_sharded
from lmrl_env.engines.local import BATCH_SIZE
from lmrl_env.model_size import (
    ModelSize,
    local_engine_memory,
    model_size,
    training_memory,
    vllm_memory,
    weights_fingerprint,
)
from lmrl_env.normaliser import follows_contract, normaliser
from lmrl_env.provenance import provenance
from lmrl_env.questions import QuestionSet
from lmrl_env.registration import resolve_engine

if TYPE_CHECKING:
    from lmrl_env.batch_plan import BatchPlan
    from lmrl_env.prompts import PromptTable

SHARE_FOR_WARNING = 0.9
"""Of a device's memory, above which the estimate is warned of."""


def make_manifest(
    args: Any, algorithm: str, plan: BatchPlan, train: PromptTable, heldout: PromptTable
) -> dict[str, Any]:
    """Return what a run will do, as JSON can hold it.

    Args:
        args: the program's arguments, with the fields that ``algos/`` share.
        algorithm: name of the program.
        plan: how its batches are shared out.
        train: questions to train on.
        heldout: questions to evaluate on.
    """
    size = model_size(args.model)
    ranks = plan.accelerator.num_processes
    engine = resolve_engine(args.engine)
    evaluations = 1 + (args.steps // args.eval_every if args.eval_every else 0)
    evaluations += bool(args.eval_every == 0 or args.steps % args.eval_every)
    responses = args.prompts_per_step * args.group_size
    asked = min(args.eval_questions, len(heldout))
    manifest: dict[str, Any] = {
        "algorithm": algorithm,
        "env": args.env,
        "ranks": ranks,
        "device": _device(plan.accelerator.device),
        "dtype": args.dtype,
        "engine": engine,
        "step": {
            "questions": args.prompts_per_step,
            "group_size": args.group_size,
            "responses": responses,
            "max_new_tokens": args.max_new_tokens,
            "response_tokens_at_most": responses * args.max_new_tokens,
            "questions_per_rank": plan.groups,
            "optimizer_steps": args.updates_per_step * args.epochs,
        },
        "optimizer_step": _optimizer_step(args, plan, train.width),
        "run": {
            "steps": args.steps,
            "responses": args.steps * responses,
            "epochs_over_the_questions": args.steps * args.prompts_per_step / len(train),
            "evaluations": evaluations,
            "evaluation_responses": evaluations * asked,
        },
        "train_questions": _question_record(train),
        "eval_questions": {**_question_record(heldout), "asked": asked},
        "model": {
            "name": args.model,
            **size._asdict(),
            "context": train.context_length,
            "weights": weights_fingerprint(args.model),
        },
        "memory_of_a_rank": _memory(args, engine, plan, size, train, heldout),
        **provenance(),
    }
    manifest["notes"] = list(_notes(args, plan, manifest))
    return manifest


def _optimizer_step(args: Any, plan: BatchPlan, longest_prompt: int) -> dict[str, Any]:
    """Return the sizes of the largest optimiser step of a batch."""
    questions = math.ceil(args.prompts_per_step / args.updates_per_step)
    responses = questions * args.group_size
    policy_loss = getattr(sys.modules[type(args).__module__], "policy_loss", None)
    return {
        "questions": questions,
        "responses": responses,
        "response_tokens_at_most": responses * args.max_new_tokens,
        "micro_batch_tokens": args.micro_batch_tokens,
        "micro_batches_of_a_rank_at_most": most_micro_batches(
            min(plan.groups, questions),
            args.group_size,
            longest_prompt,
            args.max_new_tokens,
            args.micro_batch_tokens,
        ),
        "normaliser": normaliser(policy_loss) if follows_contract(policy_loss) else None,
    }


def most_micro_batches(
    groups: int, group_size: int, prompt: int, response: int, max_tokens: int
) -> int:
    """Return how many micro-batches some groups make if all have the longest prompt and response.

    >>> most_micro_batches(16, 8, 150, 96, max_tokens=8192)  # 8 groups of 918 tokens fit in one
    2
    """
    together = max_tokens // (prompt + group_size * response)
    if together:
        return math.ceil(groups / together)
    rows = max(1, (max_tokens - prompt) // response)
    return groups * math.ceil(group_size / rows)


def _question_record(table: PromptTable) -> dict[str, Any]:
    return {
        "name": table.questions.name,
        "questions": len(table),
        "report": table.questions.report,
        "too_long": table.dropped,
        "longest_prompt": table.width,
        "sha256": questions_hash(table.questions),
    }


def questions_hash(questions: QuestionSet) -> str:
    """Return a SHA-256 over ids, questions and answers, in their order."""
    digest = hashlib.sha256()
    for row in questions:
        digest.update(json.dumps([row.id, row.question, row.answer]).encode() + b"\n")
    return digest.hexdigest()


def _memory(
    args: Any,
    engine: str,
    plan: BatchPlan,
    size: ModelSize,
    train: PromptTable,
    heldout: PromptTable,
) -> dict[str, Any]:
    """Return the estimate by item, and their sum, in bytes."""
    ranks, device = plan.accelerator.num_processes, plan.accelerator.device
    width = max(train.width, heldout.width) + args.max_new_tokens
    bfloat16 = args.dtype == "bfloat16"
    items = training_memory(
        size,
        tokens=min(
            max(args.micro_batch_tokens, train.width + args.max_new_tokens),
            plan.groups * (train.width + args.group_size * args.max_new_tokens),
        ),
        bfloat16=bfloat16,
        checkpointing=args.gradient_checkpointing,
        lora_rank=args.lora_rank,
        critic=hasattr(args, "critic_lr"),
        reference=getattr(args, "kl_coef", 0) > 0,
        shards=ranks if is_sharded(plan.accelerator) else 1,
    )
    if engine == "local":
        rows = max(plan.groups * args.group_size, math.ceil(args.eval_questions / ranks))
        items += local_engine_memory(
            size,
            rows=min(BATCH_SIZE, rows),
            width=width,
            bfloat16=bfloat16,
            own_weights=args.async_depth > 0,
        )
    elif engine == "vllm":
        gpu_bytes = _device_bytes(device) if device.type == "cuda" else None
        items += vllm_memory(size, bfloat16=bfloat16, gpu_bytes=gpu_bytes)
    return {
        "items": [item._asdict() for item in items],
        "bytes": sum(item.bytes for item in items),
        "device_bytes": _device_bytes(device),
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _notes(args: Any, plan: BatchPlan, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is not wrong, but perhaps not meant."""
    step, train, heldout = (manifest[key] for key in ("step", "train_questions", "eval_questions"))
    if train["questions"] < step["questions"]:
        yield (
            f"a step asks the {train['questions']:,} questions "
            f"{step['questions'] / train['questions']:.1f} times: the set goes round"
        )
    if heldout["asked"] < args.eval_questions:
        yield (
            f"an evaluation asks all {heldout['asked']:,} held-out questions, fewer than "
            f"--eval-questions {args.eval_questions}"
        )
    for name, record in (("train", train), ("held-out", heldout)):
        if record["too_long"]:
            yield (
                f"{record['too_long']:,} {name} questions are left out: too long for the context "
                f"of {manifest['model']['context']:,} - {args.max_new_tokens:,} tokens"
            )
    longest = train["longest_prompt"] + args.max_new_tokens
    if longest > args.micro_batch_tokens:
        yield (
            f"a question and its response may have {train['longest_prompt']:,} + "
            f"{args.max_new_tokens:,} = {longest:,} tokens, more than --micro-batch-tokens "
            f"{args.micro_batch_tokens:,}: such a response is a micro-batch of its own"
        )
    if manifest["optimizer_step"]["questions"] < manifest["ranks"]:
        yield (
            f"an optimiser step has {manifest['optimizer_step']['questions']} questions for "
            f"{manifest['ranks']} ranks: some of them wait"
        )
    memory = manifest["memory_of_a_rank"]
    if memory["bytes"] > SHARE_FOR_WARNING * memory["device_bytes"]:
        yield (
            f"the estimate of {in_gib(memory['bytes'])} is near or above the device's "
            f"{in_gib(memory['device_bytes'])}"
        )


def in_gib(size: float) -> str:
    """Return bytes with their unit.

    >>> in_gib(3 * 2**30), in_gib(5 * 2**20)
    ('3.00 GiB', '5.0 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
