"""What the scripts on the survey's findings share: their runs' settings, and batches to measure on.

Most of what a training trick does is a matter of the weights that it gives to the tokens of a
batch: that is measured on batches that a model samples, without a training run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from claim import Job, Options, algorithm, curves
from recipe import RECIPE
from torch import Tensor

from lmrl_env.algorithm_files import Algorithm, load_algorithms
from lmrl_env.batches import micro_batch_rows, micro_batches
from lmrl_env.engines.local import LocalEngine
from lmrl_env.env import unwrap
from lmrl_env.policy import Policy, load_model
from lmrl_env.rollout import Rollout, response_seeds, rollout
from lmrl_env.types import BatchTotals

TINY = {
    "model": "tiny",
    "questions": "arithmetic",
    "steps": 20,
    "prompts_per_step": 8,
    "group_size": 8,
    "max_new_tokens": 96,
    "eval_every": 0,
    "eval_questions": 128,
    "checkpoint_every": 0,
}
PAPER = RECIPE | {"model": "Qwen/Qwen2.5-Math-1.5B", "questions": "math-12k", "steps": 200}
MAX_TOKENS = 8192


def settings(options: Options, **changes: Any) -> dict[str, Any]:
    """Return the flags of a run at the scale that is asked for, with changes at both scales."""
    own = {"model": options.model, "questions": options.questions}
    given = {name: value for name, value in own.items() if value is not None}
    return (TINY if options.is_tiny else PAPER) | changes | given


def seeded(name: str, program: str, seeds: int, flags: Mapping[str, Any]) -> list[Job]:
    """Return the runs ``NAME-SEED`` of an algorithm file."""
    return [
        Job(f"{name}-{seed}", algorithm(program), {**flags, "seed": seed}) for seed in range(seeds)
    ]


def by_seed(folders: Mapping[str, Path], name: str, seeds: int) -> list[Path]:
    """Return the folders of the runs ``NAME-SEED``."""
    return [folders[f"{name}-{seed}"] for seed in range(seeds)]


def last_third(folders: Sequence[Path], key: str) -> np.ndarray:
    """Return a metric's mean over the last third of training, shape (seeds,)."""
    return late(curves(folders, key)[1])


def late(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last third of steps, shape (seeds,), of values (seeds, steps)."""
    steps = np.arange(1, values.shape[1] + 1)
    return np.nanmean(values[:, steps > values.shape[1] * 2 / 3], axis=1)


def checkpoint_of(options: Options, job: Job) -> str:
    """Return the last checkpoint of a run, as a model."""
    return str(options.runs_dir / job.name / "checkpoints" / f"step-{job.flags['steps']}")


def trained_model(options: Options, script: str) -> Job:
    """Return the run that makes an already trained model out of the base: Dr. GRPO, seed 100.

    Each script trains its own, since several may be at work at one time.
    """
    steps = {"steps": 50, "prompts_per_step": 16} if options.is_tiny else {}
    return Job(f"{script}-trained", algorithm("dr_grpo"), settings(options, **steps, seed=100))


def outcome(*checks: bool) -> Literal["holds", "partly", "does not hold"]:
    """Return what becomes of a claim of several parts.

    >>> outcome(True, False)
    'partly'
    """
    return "holds" if all(checks) else "partly" if any(checks) else "does not hold"


@lru_cache
def functions(name: str) -> Algorithm:
    """Return the advantages and the loss of an algorithm file."""
    return load_algorithms([algorithm(name)])[0]


def adam(policy: Policy, lr: float) -> torch.optim.Optimizer:
    """Return the optimiser of ``algos/``."""
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


class Learner:
    """A model that samples batches, scores them, and is moved by gradients of losses on them.

    Args:
        model: as of ``--model``.
        questions: to ask.
        flags: with ``group_size`` and ``max_new_tokens``.
        groups: of a batch.
    """

    def __init__(self, model: str, questions: str, flags: Mapping[str, Any], groups: int):
        self.group_size, budget = flags["group_size"], flags["max_new_tokens"]
        self.groups = groups
        self.envs = gym.make_vec(
            flags.get("env", "MathR1-v0"), groups * self.group_size, model=model, engine="local",
            questions=questions, group_size=self.group_size, max_new_tokens=budget,
            tokens_per_step=budget, autoreset_mode="Disabled",
        )  # fmt: skip
        tokenizer = unwrap(self.envs).tokenizer
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.policy = Policy(load_model(model, device=self.device), tokenizer.vocab_size)
        self.engine = LocalEngine(self.policy.model, tokenizer)
        self._start = {key: value.clone() for key, value in self.policy.state_dict().items()}

    def reset(self) -> None:
        """Put the weights back that the model had at first."""
        self.policy.load_state_dict(self._start)

    def sample(self, seed: int) -> Rollout:
        """Return responses to questions that the seed chooses."""
        number = len(unwrap(self.envs).prompts)
        chosen = np.random.default_rng(seed).choice(number, self.groups, replace=False)
        seeds = response_seeds(seed, 1, self.groups * self.group_size)
        return rollout(self.envs, self.engine, question_ids=chosen, seeds=seeds)

    @torch.no_grad()
    def logprobs(self, batch: Rollout) -> Tensor:
        """Return log-probs of a batch's tokens, shape (N, K)."""
        found = torch.zeros(batch.mask.shape)
        for micro in self._micro_batches(batch, np.arange(len(batch.rewards))):
            logprobs, _ = self.policy(micro.tokens, temperature=1.0)
            found[micro.rows.cpu(), : micro.width] = logprobs.cpu()
        return found

    def backward(
        self, batch: Rollout, rows: Sequence[int], advantages: Tensor, old: Tensor,
        policy_loss: Callable[..., Any],
    ) -> Tensor:  # fmt: skip
        """Return the gradient of the loss of some rows, flat, and leave it in the parameters.

        Args:
            batch: what the rows are of.
            rows: those of a group adjacent.
            advantages: shape (N,).
            old: log-probs at sampling, shape (N, K).
            policy_loss: of an algorithm file.
        """
        chosen = np.asarray(rows)
        responses, tokens = len(chosen), int(batch.mask[chosen].sum())
        totals = BatchTotals(responses, tokens, batch.mask.shape[1])
        self.policy.zero_grad()
        for micro in self._micro_batches(batch, chosen):
            logprobs, _ = self.policy(micro.tokens, temperature=1.0)
            at = micro.rows.cpu()
            own_old = old[at, : micro.width].to(self.device)
            own = advantages[at].float().to(self.device)
            policy_loss(logprobs, own_old, own, micro.mask, totals)[0].backward()
        gradients = [parameter.grad for parameter in self.policy.parameters()]
        return torch.cat(
            [gradient.flatten().cpu() for gradient in gradients if gradient is not None]
        )

    def train(
        self, compute_advantages: Callable[..., Tensor], policy_loss: Callable[..., Any], *,
        steps: int, seed: int, lr: float = 2e-4,
    ) -> list[float]:  # fmt: skip
        """Train from the first weights on, one update a step, as a program of ``algos/`` does.

        Args:
            compute_advantages: of rewards and group size.
            policy_loss: of an algorithm file.
            steps: batches.
            seed: of questions and samples.
            lr: of AdamW.

        Returns:
            The share of right answers of each batch.
        """
        self.reset()
        optimizer = adam(self.policy, lr)
        shares = []
        for step in range(steps):
            batch = self.sample(1000 * seed + step)
            advantages = compute_advantages(torch.from_numpy(batch.rewards), self.group_size)
            old = torch.from_numpy(batch.sampling_logprobs)
            self.backward(batch, range(len(advantages)), advantages, old, policy_loss)
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            optimizer.step()
            shares.append(float(batch.correct.mean()))
        return shares

    def _micro_batches(self, batch: Rollout, rows: Any) -> Any:
        cuts = micro_batch_rows(batch, rows, self.group_size, MAX_TOKENS)
        return micro_batches(batch, cuts, self.group_size, self.device)
