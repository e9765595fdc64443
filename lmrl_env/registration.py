"""Environment ids, and what builds an environment or an engine from JSON-able names."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from lmrl_env.env import TokenVectorEnv
from lmrl_env.errors import ConfigurationError, UnknownNameError
from lmrl_env.prompts import PromptTable
from lmrl_env.questions import Split, load_questions
from lmrl_env.templates import get_template
from lmrl_env.token_env import TokenEnv
from lmrl_env.tokenizer import load_tokenizer
from lmrl_env.verifiers import verifier_for
from lmrl_env.wrappers import VerifierReward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmrl_env.engines.engine import Engine

ENGINES = ("auto", "local", "vllm", "vllm_server")


def register_envs() -> None:
    """Register ``MathR1-v0``, ``MathQwen-v0`` and ``MathPlain-v0`` with Gymnasium."""
    for env_id, template in (
        ("MathR1-v0", "r1"),
        ("MathQwen-v0", "qwen-math"),
        ("MathPlain-v0", "none"),
    ):
        gym.register(
            id=env_id,
            entry_point="lmrl_env.registration:make_math_env",
            vector_entry_point="lmrl_env.registration:make_math_vector_env",
            kwargs={"template": template},
        )


def make_token_vector_env(
    num_envs: int = 1,
    *,
    model: str = "tiny",
    engine: str = "auto",
    servers: str | None = None,
    questions: str = "arithmetic",
    split: Split = "train",
    template: str = "r1",
    group_size: int = 1,
    max_new_tokens: int = 96,
    tokens_per_step: int = 1,
    autoreset_mode: str | AutoresetMode = "NextStep",
    copy: bool = True,
    render_mode: str | None = None,
) -> TokenVectorEnv:
    """Build the bare token MDP, which pays no reward: the start of an id of your own.

    Args:
        num_envs: N, number of slots.
        model: ``tiny``, a folder or a hub id; its tokenizer and context define the MDP.
        engine: ``auto``, ``local``, ``vllm`` or ``vllm_server``: what ``envs.unwrapped.engine``
            will be.
        servers: URLs for ``vllm_server``, such as ``http://host:8000,http://host:8001``.
        questions: name of a question set; see ``load_questions``.
        split: part of the set that is asked.
        template: ``r1``, ``qwen-math`` or ``none``.
        group_size: G, adjacent slots that get the same question.
        max_new_tokens: K, the token budget of a response.
        tokens_per_step: tokens of one action.
        autoreset_mode: ``"NextStep"`` or ``"Disabled"``.
        copy: whether observations are copies; without, they are read-only views that the next
            step or reset changes.
        render_mode: ``"ansi"`` or None.

    Raises:
        UnknownNameError: for an unknown engine or template.
        ConfigurationError: for values that do not fit together.
        ModelError: if the model's tokenizer cannot be loaded.
        QuestionError: if the question set cannot be loaded, or none of it fits.
    """
    _check_engine(engine)
    prompts = _prompt_table(questions, split, template, model, max_new_tokens)
    return TokenVectorEnv(
        prompts,
        load_tokenizer(model),
        get_template(template),
        num_envs,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        tokens_per_step=tokens_per_step,
        autoreset_mode=autoreset_mode,
        copy=copy,
        make_engine=lambda: make_engine(
            engine, model, max_model_len=prompts.width + max_new_tokens, servers=servers
        ),
        render_mode=render_mode,
    )


def make_math_vector_env(
    num_envs: int = 1,
    *,
    template: str = "r1",
    truncated_reward: float | None = 0.0,
    **kwargs: Any,
) -> VerifierReward:
    """Build the token MDP that pays 1 for a right final answer, by Math-Verify.

    Args:
        num_envs: N, number of slots.
        template: around the questions; its answer format chooses the verifier.
        truncated_reward: what a response earns that the budget cut off, or None to grade it
            like any other. 0 is the paper's (Liu et al. 2025, arXiv:2503.20783).
        **kwargs: see ``make_token_vector_env``.
    """
    envs = make_token_vector_env(num_envs, template=template, **kwargs)
    verifier = verifier_for(get_template(template).answer_format)
    return VerifierReward(envs, verifier, truncated_reward=truncated_reward)


def make_math_env(*, group_size: int = 1, autoreset_mode: Any = None, **kwargs: Any) -> TokenEnv:
    """Build one slot of ``make_math_vector_env`` as a plain Gymnasium environment.

    Raises:
        ConfigurationError: for ``group_size`` or ``autoreset_mode``, which only a vector
            environment has.
    """
    if group_size != 1 or autoreset_mode is not None:
        raise ConfigurationError(
            f"group_size={group_size}, autoreset_mode={autoreset_mode!r}: a single environment has "
            "one slot and no autoreset; use gymnasium.make_vec"
        )
    return TokenEnv(make_math_vector_env(1, autoreset_mode="Disabled", **kwargs))


@lru_cache(maxsize=8)
def _prompt_table(
    questions: str, split: Split, template: str, model: str, max_new_tokens: int
) -> PromptTable:
    """Return the prompts, shared by all environments of the process that ask the same."""
    return PromptTable(
        load_questions(questions, split=split),
        get_template(template),
        load_tokenizer(model),
        max_new_tokens,
    )


def _check_engine(name: str) -> None:
    if name not in ENGINES:
        raise UnknownNameError(f"unknown engine {name!r}: expected one of {list(ENGINES)}")


def resolve_engine(name: str) -> str:
    """Return the engine that a name stands for: ``auto`` is vLLM if it and a GPU are there.

    Raises:
        UnknownNameError: for an unknown name.
    """
    _check_engine(name)
    if name != "auto":
        return name
    import torch

    has_vllm = importlib.util.find_spec("vllm") is not None
    return "vllm" if has_vllm and torch.cuda.is_available() else "local"


def make_engine(
    name: str,
    model: str,
    *,
    max_model_len: int,
    module: PreTrainedModel | None = None,
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
    servers: str | None = None,
) -> Engine:
    """Build an engine.

    Args:
        name: ``auto``, ``local``, ``vllm`` or ``vllm_server``.
        model: ``tiny``, a folder or a hub id.
        max_model_len: most tokens of a prompt and its response together.
        module: the trainer's own Transformers model, which the local engine then shares, so
            that a weight sync copies nothing; None loads the model's weights.
        dtype: of the computation; the local engine keeps float32 weights.
        device: of the local engine, where it loads the weights; None is a GPU if there is one.
        seed: of the engine's own random numbers, where it has any.
        servers: URLs of the servers of ``vllm_server``, separated by commas.

    Raises:
        ConfigurationError: if servers are given to another engine, or none to this one.
    """
    tokenizer = load_tokenizer(model)
    used = resolve_engine(name)
    if servers and used != "vllm_server":
        raise ConfigurationError(
            f"servers={servers!r} with engine={name!r}: expected engine='vllm_server', the one "
            "that has servers"
        )
    if used == "vllm_server":
        from lmrl_env.engines.vllm_server import VllmServerEngine

        urls = [url.strip() for url in (servers or "").split(",") if url.strip()]
        return VllmServerEngine(model, tokenizer, urls, dtype=dtype, max_model_len=max_model_len)
    if used == "vllm":
        from lmrl_env.engines.vllm import VllmEngine

        return VllmEngine(model, tokenizer, max_model_len=max_model_len, dtype=dtype, seed=seed)
    import torch

    from lmrl_env.engines.local import LocalEngine
    from lmrl_env.policy import load_model

    if module is None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        module = load_model(model, device=device)
    return LocalEngine(module, tokenizer, dtype=dtype)
