"""Playing token environments by script."""

from __future__ import annotations

import numpy as np

from lmrl_env.env import NO_TOKEN, unwrap
from lmrl_env.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
EOS = TOKENIZER.eos_token_ids[0]


def ids(text):
    return TOKENIZER.encode_text(text)


def play(envs, *turns, seed=0, question_ids=None):
    """Write each slot's turns, and return the returns and the last infos of the first episodes.

    A slot's turns are lists of tokens. With ``tokens_per_step=k`` a step takes up to k tokens of a
    turn; its next turn begins when it has written one.

    Returns:
        Returns, shape (N,); for each slot its info at the end, or None while it goes on.
    """
    env = unwrap(envs)
    k, n = env.tokens_per_step, env.num_envs
    options = None if question_ids is None else {"question_ids": question_ids}
    envs.reset(seed=seed, options=options)
    left = [[list(turn) for turn in slot_turns] for slot_turns in turns]
    returns, ends = np.zeros(n), [None] * n
    while any(left[slot] and ends[slot] is None for slot in range(n)):
        actions = np.full((n, k), NO_TOKEN if k > 1 else EOS, dtype=np.int32)
        for slot in range(n):
            if ends[slot] is None and left[slot]:
                now = left[slot][0][:k]
                actions[slot, : len(now)] = now
                left[slot][0] = left[slot][0][k:]
                if not left[slot][0]:
                    left[slot].pop(0)
        _, rewards, terminated, truncated, info = envs.step(actions if k > 1 else actions[:, 0])
        for slot in range(n):
            if ends[slot] is None:
                returns[slot] += rewards[slot]
                if terminated[slot] or truncated[slot]:
                    ends[slot] = {
                        key: values[slot]
                        for key, values in info.items()
                        if not key.startswith("_") and info[f"_{key}"][slot]
                    }
    return returns, ends
