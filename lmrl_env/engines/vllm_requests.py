"""What is asked of vLLM and what becomes of its answer: the same in-process and over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmrl_env.errors import ConfigurationError, EngineError, PromptTooLongError
from lmrl_env.tokenizer import Tokenizer
from lmrl_env.types import Completion, FinishReason, Sampling

LOWEST_LOGPROB = -9999.0
"""What vLLM's server writes for a log-prob that is no number, in nats."""


def padding_bias(tokenizer: Tokenizer, logit_width: int) -> dict[int, float]:
    """Return the logit bias that forbids the ids beyond those of the tokenizer."""
    return dict.fromkeys(range(tokenizer.vocab_size, logit_width), -float("inf"))


def check_request(
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    n: int,
    seeds: Sequence[int],
    max_model_len: int,
) -> None:
    """Check the arguments of an engine's ``generate``.

    Raises:
        ConfigurationError: if the seeds are not one a response, or one is negative.
        PromptTooLongError: if a prompt and its response exceed ``max_model_len``.
    """
    if len(seeds) != len(prompt_ids) * n or min(seeds, default=0) < 0:
        raise ConfigurationError(
            f"{len(seeds)} seeds from {min(seeds, default=0)} on for {len(prompt_ids)} prompts "
            f"with n={n}: expected {len(prompt_ids) * n} of them, none negative"
        )
    longest = max(map(len, prompt_ids), default=0)
    if longest + sampling.max_new_tokens > max_model_len:
        raise PromptTooLongError(
            f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed "
            f"max_model_len={max_model_len}: start the engine with a larger one"
        )


def sampling_options(
    sampling: Sampling, seed: int, tokenizer: Tokenizer, padding: dict[int, float]
) -> dict[str, Any]:
    """Return the arguments of ``vllm.SamplingParams`` for one response.

    Args:
        sampling: how to draw.
        seed: of the response.
        tokenizer: of the model.
        padding: see ``padding_bias``.
    """
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": int(seed),
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(tokenizer.eos_token_ids),
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
        "logit_bias": padding or None,
    }


def make_completion(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: FinishReason,
    version: int,
) -> Completion:
    """Return a completion of vLLM's figures.

    Raises:
        EngineError: if a log-prob is not finite.
    """
    array = np.asarray(logprobs, dtype=np.float32)
    if not (np.isfinite(array) & (array > LOWEST_LOGPROB)).all():
        raise EngineError(
            "the model's logits are not finite: expected numbers; its weights have diverged or "
            "overflow in this dtype, so go back to a checkpoint with a lower learning rate"
        )
    return Completion(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        logprobs=array,
        finish_reason=finish_reason,
        version=version,
    )
