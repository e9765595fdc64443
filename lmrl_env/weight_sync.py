"""The weights of the policy, on their way to the engine, and the check that they got there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lmrl_env.adapters import merge_adapters
from lmrl_env.errors import WeightSyncError
from lmrl_env.policy import TokenBatch
from lmrl_env.sharding import full_tensors
from lmrl_env.types import Sampling
from lmrl_env.waiting import waiting

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmrl_env.engines.engine import Engine

CANARY_TOKENS = 2
CANARY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest accepted difference of a token's log-prob between trainer and engine, in nats."""


def full_weights(accelerator: Accelerator, policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the policy's weights, whole, adapters merged, named as its Transformers model's.

    They come one after another, so that one tensor is all the memory that a sharded policy takes
    more. Every rank takes all of them.
    """
    model = accelerator.unwrap_model(policy).model
    yield from merge_adapters(model, full_tensors(model))


def sync_weights(
    accelerator: Accelerator,
    policy: nn.Module,
    engine: Engine,
    version: int,
    *,
    prompt_ids: Sequence[int],
    temperature: float,
    max_new_tokens: int,
    dtype: str,
) -> float:
    """Give the engine the policy's weights, and check that it samples from them.

    The check is a canary: the engine writes a few tokens, and the log-probs that it reports for
    them must be the policy's.

    Args:
        accelerator: of this rank.
        policy: what to copy, as ``prepare`` returned it.
        engine: where to.
        version: stamped on what the engine writes from now on.
        prompt_ids: of the canary.
        temperature: of the canary and of training.
        max_new_tokens: most tokens that the engine is made for.
        dtype: chooses the tolerance.

    Returns:
        The largest difference of a canary token's log-prob, in nats.

    Raises:
        WeightSyncError: if it exceeds the tolerance, or the version is not the new one.
    """
    weights = full_weights(accelerator, policy)
    engine.update_weights(weights, version)
    for _ in weights:  # an engine that another rank gives them leaves them, and ranks gather them
        pass
    sampling = Sampling(min(CANARY_TOKENS, max_new_tokens), temperature)
    (completion,) = engine.generate([prompt_ids], sampling, 1, [version])
    device = accelerator.device
    batch = TokenBatch(
        prompt_ids=torch.tensor([list(prompt_ids)], device=device),
        prompt_lengths=torch.tensor([len(prompt_ids)], device=device),
        prompt_index=torch.zeros(1, dtype=torch.int64, device=device),
        response_ids=torch.as_tensor(completion.token_ids[None].astype(np.int64), device=device),
        response_lengths=torch.tensor([len(completion.token_ids)], device=device),
    )
    with torch.no_grad(), waiting(accelerator.device):  # every rank: a sharded policy communicates
        logprobs, _ = policy(batch, temperature=temperature)
    gap = float(np.abs(logprobs[0].cpu().numpy() - completion.logprobs).max())
    if completion.version != version or not gap <= CANARY_TOLERANCE[dtype]:
        raise WeightSyncError(
            f"after the sync to version {version} the engine samples version {completion.version} "
            f"and its log-probs differ from the policy's by up to {gap:.3g} nats (accepted: "
            f"{CANARY_TOLERANCE[dtype]}): policy {logprobs[0].tolist()}, engine "
            f"{completion.logprobs.tolist()}; check that --model and --dtype are the engine's too"
        )
    return gap
