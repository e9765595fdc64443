"""Token MDPs over a few questions."""

from __future__ import annotations

import functools

from lmrl_env.env import TokenVectorEnv
from lmrl_env.prompts import PromptTable
from lmrl_env.questions import load_questions
from lmrl_env.templates import get_template
from lmrl_env.tokenizer import load_tokenizer

BUDGET = 12


@functools.cache
def prompt_table(template: str, max_new_tokens: int, size: int) -> PromptTable:
    questions = load_questions(f"arithmetic:size={size}")
    return PromptTable(questions, get_template(template), load_tokenizer("tiny"), max_new_tokens)


def token_envs(
    num_envs: int = 4,
    *,
    template: str = "r1",
    max_new_tokens: int = BUDGET,
    size: int = 20,
    autoreset_mode: str = "Disabled",
    **kwargs,
) -> TokenVectorEnv:
    """Return a bare token MDP over a few questions."""
    return TokenVectorEnv(
        prompt_table(template, max_new_tokens, size),
        load_tokenizer("tiny"),
        get_template(template),
        num_envs,
        max_new_tokens=max_new_tokens,
        autoreset_mode=autoreset_mode,
        **kwargs,
    )
