"""How long a policy goes on after its answer stands, by its own probabilities: no sampling noise.

The tiny base writes a solution that commits to a result, a number of sentences that repeat it
("Let me check again. It is 12."), and the end. After each of them the next token alone settles
whether one more follows. Its probability h, read off a fixed set of prefixes by teacher forcing,
gives the expected number of tail sentences: h₀ (1 + h₁ (1 + h₂ / (1 - h₂))), with the hazards after
0, 1 and 2 of them, and later ones taken to be like the last.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from lmrl_env.env import unwrap
from lmrl_env.policy import load_model
from lmrl_env.rollout import response_seeds, rollout
from lmrl_env.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1]))
from pretrain_tiny import CAREFUL_OPENINGS, CARELESS_OPENINGS, CONCLUSIONS, TAILS

QUESTIONS = 384
PREFIXES = 32
MAX_NEW_TOKENS = 160
END = " </think>"
COMMITMENT = re.compile(rf" ?.*?(?:{'|'.join(CARELESS_OPENINGS + CONCLUSIONS)}) (?P<result>\d+)\.")

Prefix = list[list[int]]
"""Token ids up to the committed result, then those of two tail sentences."""


def commitment(response: str) -> tuple[str, str, bool] | None:
    """Return a response up to where its result stands, the result, and whether it was careful.

    >>> commitment(" I guess it is 12. I recheck: it is 12. </think> <answer>12</answer>")
    (' I guess it is 12.', '12', False)
    """
    found = COMMITMENT.match(response)
    if found is None:
        return None
    return found[0], found["result"], found[0].strip().startswith(CAREFUL_OPENINGS)


def prefixes(model: str) -> dict[str, list[Prefix]]:
    """Sample responses to held-out questions, and cut them where their result stands.

    Args:
        model: the base, whose own responses these are.

    Returns:
        ``right``: after careful solutions with the right result; ``wrong``: after wrong guesses.

    Raises:
        ValueError: if the model gives fewer than ``PREFIXES`` of one kind.
    """
    envs = gym.make_vec(
        "MathR1-v0", num_envs=QUESTIONS, model=model, engine="local", questions="arithmetic",
        split="heldout", max_new_tokens=MAX_NEW_TOKENS, tokens_per_step=MAX_NEW_TOKENS,
        autoreset_mode="Disabled",
    )  # fmt: skip
    env, ids = unwrap(envs), np.arange(QUESTIONS)
    batch = rollout(envs, env.engine, question_ids=ids, seeds=response_seeds(0, 0, QUESTIONS))
    encode = env.tokenizer.encode_text
    found: dict[str, list[Prefix]] = {"right": [], "wrong": []}
    for i, response in enumerate(batch.responses):
        if (cut := commitment(response)) is None:
            continue
        text, result, careful = cut
        prompt = batch.prompt_ids[i, : batch.prompt_lengths[i]].tolist()
        prefix = [prompt + encode(text), *(encode(f" {tail} {result}.") for tail in TAILS[:2])]
        if batch.correct[i] and careful:
            found["right"].append(prefix)
        elif batch.terminated[i] and not batch.correct[i] and not careful:
            found["wrong"].append(prefix)
    envs.close()
    if min(map(len, found.values())) < PREFIXES:
        counts = {kind: len(rows) for kind, rows in found.items()}
        raise ValueError(
            f"{model} gave {counts} commitments to {QUESTIONS} questions: expected at least "
            f"{PREFIXES} of each kind; give a base that writes like the tiny model"
        )
    return {kind: rows[:PREFIXES] for kind, rows in found.items()}


@torch.no_grad()
def hazards(model: str, rows: Sequence[Prefix]) -> Tensor:
    """Return the probability of one more tail sentence against the end.

    Args:
        model: a checkpoint.
        rows: N prefixes with two tail sentences.

    Returns:
        Shape (N, 3): after 0, 1 and 2 tail sentences.
    """
    encode = load_tokenizer(model).encode_text
    opens, end = [encode(f" {tail}")[0] for tail in TAILS], encode(END)[0]
    ids = [torch.tensor([token for part in row for token in part]) for row in rows]
    last = torch.tensor([np.cumsum([len(part) for part in row]).tolist() for row in rows]) - 1
    loaded = load_model(model, attention="sdpa")
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # right: causal, so unseen
    states = loaded.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state
    probs = loaded.get_output_embeddings()(states.gather(1, _at(last, states))).softmax(-1)
    opening = probs[..., opens].sum(-1)
    return opening / (opening + probs[..., end])


def _at(positions: Tensor, states: Tensor) -> Tensor:
    return positions[:, :, None].expand(-1, -1, states.shape[2])


def expected_tails(h: Tensor) -> Tensor:
    """Return the expected number of tail sentences; h: (N, 3), returns (N,).

    >>> expected_tails(torch.full((1, 3), 0.5))  # geometric: h / (1 - h)
    tensor([1.])
    """
    return h[:, 0] * (1 + h[:, 1] * (1 + h[:, 2] / (1 - h[:, 2])))


def over_training(
    run: Path, base: str, steps: Sequence[int], rows: Mapping[str, list[Prefix]]
) -> dict[str, list[float]]:
    """Return what a run does to the tails, kept in its folder once it is known.

    Args:
        run: folder of a run with these checkpoints.
        base: that it started from, for step 0.
        steps: of the checkpoints, from 0.
        rows: prefixes by kind.

    Returns:
        By kind the expected tail sentences at each step, and under ``hazard KIND`` the probability
        of the first.
    """
    file = run / "tails.json"
    if file.exists():
        known: dict[str, list[float]] = json.loads(file.read_text())
        return known
    figures: dict[str, list[float]] = {}
    for step in steps:
        model = str(run / "checkpoints" / f"step-{step}") if step else base
        for kind, chosen in rows.items():
            h = hazards(model, chosen)
            figures.setdefault(kind, []).append(expected_tails(h).mean().item())
            figures.setdefault(f"hazard {kind}", []).append(h[:, 0].mean().item())
    file.write_text(json.dumps(figures) + "\n")
    return figures
