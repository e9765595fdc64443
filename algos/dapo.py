"""DAPO: decoupled clip and dynamic sampling.

J(θ) = E[ 1/Σᵢ|oᵢ| Σᵢ Σₜ min(ρᵢₜ Aᵢ, clip(ρᵢₜ, 1-ε_low, 1+ε_high) Aᵢ) ],
Aᵢ = (Rᵢ - mean(R₁, …, R_G)) / std(R₁, …, R_G),   ρᵢₜ = π_θ(oᵢₜ | q, oᵢ,<ₜ) / π_old(oᵢₜ | q, oᵢ,<ₜ)

Yu et al. 2025, "DAPO", arXiv:2503.14476, equation 8. Against Dr. GRPO: advantages are GRPO's; the
sum over tokens is divided by the batch's number of tokens; the ratio is clipped higher above than
below; groups of equal rewards are replaced by further samples (what is logged of rewards and
lengths is from before that); and responses near the budget are punished. Truncated responses may
be left out of the loss. Rewards include the punishment, so that a group of wrong answers of which
some are punished is kept, where the paper asks for right and wrong ones. The expected gradient is
not along ∇J: the number of tokens goes with the rewards, and 1/std weighs questions. Dynamic
sampling by itself turns nothing, since a group of equal rewards adds nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmrl_env import distributed
from lmrl_env.batches import clip_fractions, token_metrics
from lmrl_env.env import unwrap
from lmrl_env.evaluation import outcome_metrics
from lmrl_env.groups import by_group, has_signal
from lmrl_env.importance import mismatch_metrics, reweight
from lmrl_env.options import check_range, run_command
from lmrl_env.policy import Policy
from lmrl_env.rollout import Rollout
from lmrl_env.run import Run
from lmrl_env.types import BatchTotals
from lmrl_env.updates import Updates
from lmrl_env.wrappers import OverlongPenalty


@dataclass
class Args:
    """Settings of a run, beside the paper's for a 7B model where they differ."""

    # --- shared args: begin
    env: str = "MathR1-v0"
    """environment id, as MathR1-v0 or my_package:MyEnv-v0"""
    model: str = "tiny"
    """tiny, a folder in the Transformers format, or a hub id"""
    engine: Literal["auto", "local", "vllm", "vllm_server"] = "auto"
    """what samples; auto is vLLM if it and a GPU are there"""
    servers: str | None = None
    """addresses of vllm_server, as http://host:8000,http://host:8001; see lmrl serve"""
    questions: str = "arithmetic"
    """question set to train on: arithmetic, a .jsonl[.gz] file, a folder or a hub id"""
    eval_set: str | None = None
    """question set to evaluate on; by default the held-out part of --questions"""
    steps: int = 100
    """rollout batches"""
    prompts_per_step: int = 16
    """questions of a rollout batch, over all ranks (paper: 128)"""
    group_size: int = 8
    """responses to each question, G"""
    max_new_tokens: int = 96
    """token budget of a response, K (paper: 3000)"""
    temperature: float = 1.0
    """of sampling, training and evaluation"""
    async_depth: int = 0
    """1 samples the next batch while this one is trained on, from weights one step old"""
    rollout_parts: int = 1
    """parts of a rollout: one is graded while the next is sampled; for slow verifiers"""
    on_verifier_error: Literal["zero", "drop", "stop"] = "zero"
    """where the verifier timed out or crashed: pay 0, drop the group, or stop the run"""
    lr: float = 2e-4
    """learning rate of AdamW (paper: 1e-6)"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly; constant afterwards"""
    weight_decay: float = 0.0
    """of AdamW"""
    adam_beta2: float = 0.95
    """of AdamW; beta1 is 0.9"""
    max_grad_norm: float = 1.0
    """gradients of a larger norm are scaled down to it"""
    updates_per_step: int = 1
    """optimiser steps an epoch: parts that a rollout batch is cut into (paper: 8)"""
    epochs: int = 1
    """passes over a rollout batch"""
    tis_cap: float | None = None
    """cap of importance weights from engine to trainer; by default 5 if --async-depth is 1"""
    tis_level: Literal["token", "sequence"] = "sequence"
    """what has an importance weight: each token, or the whole response"""
    entropy_coef: float = 0.0
    """of the entropy bonus, the mean over tokens in nats"""
    micro_batch_tokens: int = 8192
    """tokens of a forward pass; does not change the gradient"""
    seed: int = 0
    """of everything random"""
    eval_every: int = 10
    """steps between evaluations; 0 evaluates the start and the end only (paper: 16)"""
    eval_questions: int = 512
    """held-out questions of an evaluation, one response each"""
    checkpoint_every: int = 50
    """steps between checkpoints; 0 writes the last one only"""
    keep_checkpoints: int = 3
    """newest checkpoints that are kept, besides the best; 0 keeps all"""
    run_dir: str | None = None
    """folder of the run; by default a new one under runs/"""
    resume: str | None = None
    """folder of a run to go on with, under its own settings except those given here"""
    save_batch: str | None = None
    """file that the first rollout batch is saved to"""
    profile: int = 0
    """steps to trace into the run's folder, after two of warm-up, with a picture of the time"""
    dry_run: bool = False
    """print what a step of this run would be, and stop"""
    tracker: Literal["tensorboard", "wandb"] | None = None
    """where metrics go besides metrics.jsonl"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """of the training"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the computation; master weights are float32 (paper: bfloat16)"""
    attention: Literal["packed", "sdpa", "eager", "flash_attention_2"] = "packed"
    """implementation; packed reads a question once for all its responses"""
    gradient_checkpointing: bool = False
    """keep no activations but recompute them: less memory, more time"""
    lora_rank: int | None = None
    """train low-rank adapters of this rank (PEFT) instead of all weights"""
    wait_limit: float = 30.0
    """minutes that a rank waits for the others before it stops the run by name"""
    # --- shared args: end
    clip_eps_low: float = 0.2
    """the ratio is clipped below at 1 minus this"""
    clip_eps_high: float = 0.28
    """the ratio is clipped above at 1 plus this"""
    max_refills: int = 3
    """further rollouts a step for groups whose rewards are all equal; 0 keeps such groups"""
    overlong_cache: int = 16
    """last tokens of the budget, over which the reward falls by 1; 0 turns it off (paper: 4096)"""
    overlong_filter: bool = False
    """leave truncated responses out of the loss"""

    def __post_init__(self) -> None:
        check_range(self, "group_size", least=2)  # a response is compared with its group's others
        check_range(self, "clip_eps_low", least=0, most=1)
        check_range(self, "clip_eps_high", least=0)
        check_range(self, "max_refills", least=0)
        check_range(self, "overlong_cache", least=0, most=self.max_new_tokens)


def compute_advantages(rewards: Tensor, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """Return the reward of each response, standardised within its group.

    Aᵢ = (Rᵢ - mean(R₁, …, R_G)) / (std(R₁, …, R_G) + eps)
    Yu et al. 2025, arXiv:2503.14476, eq. 9

    Args:
        rewards: shape (N,), float, over all ranks; the G responses to a question are adjacent.
        group_size: G, at least 2, a divisor of N.
        eps: keeps a group of equal rewards, whose deviations may be rounding errors, near 0.

    Returns:
        Advantages, shape (N,), without unit. The std is the sample's, with Bessel's correction.

    Raises:
        ConfigurationError: for rewards that do not form groups.

    >>> compute_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=4, eps=0.0)
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    """
    groups = by_group(rewards, group_size)  # (N / G, G)
    deviations = groups - groups.mean(dim=1, keepdim=True)
    return (deviations / (groups.std(dim=1, keepdim=True) + eps)).reshape(-1)


def is_informative(batch: Rollout, group_size: int) -> npt.NDArray[np.bool_]:
    """Return for each group whether its rewards differ and it was not dropped."""
    differ = has_signal(torch.from_numpy(batch.rewards), group_size).numpy()
    return differ & batch.kept.reshape(-1, group_size).all(axis=1)


def informative_groups(batch: Rollout, group_size: int) -> int:
    """Return the number of groups whose rewards are not all equal."""
    return int(is_informative(batch, group_size).sum())


def choose_groups(batch: Rollout, count: int, group_size: int) -> Rollout:
    """Return a number of groups, in the order of sampling, those of equal rewards last."""
    groups = np.argsort(~is_informative(batch, group_size), kind="stable")[:count]
    return batch.take((groups[:, None] * group_size + np.arange(group_size)).ravel())


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    totals: BatchTotals,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.28,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a micro-batch's share of the loss; the shares of an optimiser step sum to it.

    -1/Σᵢ|oᵢ| Σᵢ Σₜ min(ρᵢₜ Aᵢₜ, clip(ρᵢₜ, 1-ε_low, 1+ε_high) Aᵢₜ)
    Yu et al. 2025, arXiv:2503.14476, eq. 8

    Args:
        logprobs: shape (n, k), of the policy, with gradient; nats.
        old_logprobs: shape (n, k), of the policy that the batch was sampled with.
        advantages: shape (n,) or (n, k).
        mask: shape (n, k), bool, True where a token was an action.
        totals: counts over the whole optimiser step.
        clip_eps_low: in [0, 1].
        clip_eps_high: at least 0.

    Returns:
        The loss, a scalar, and metrics, scalars without gradient that are shares too.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # (n, 1)
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)  # (n, k)
    loss = -(objective * mask).sum() / totals.tokens
    is_clipped = (objective < ratio * advantages) & mask
    return loss, clip_fractions(ratio, is_clipped, totals)


def main(args: Args) -> None:
    """Train."""
    # --- shared setup: begin
    run = Run(args, __file__)
    accelerator, plan = run.accelerator, run.plan
    envs, eval_envs = run.make_envs()
    vocab_size = unwrap(envs).tokenizer.vocab_size
    policy = Policy(run.load_model(), vocab_size)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=args.lr,
        betas=(0.9, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    run.restore(policy, optimizer)
    updates = Updates(plan, policy, optimizer, args.max_grad_norm)
    run.start(envs, eval_envs, policy)
    # --- shared setup: end
    if args.overlong_cache:
        envs = OverlongPenalty(envs, args.overlong_cache)

    for step in run.steps():
        # --- shared rollout: begin
        batch = run.rollout(envs, step)
        row = outcome_metrics(accelerator, batch, args.group_size)
        batch = run.settle_verifier_errors(batch)
        old_logprobs: Tensor | None = None
        train_started = time.perf_counter()
        # --- shared rollout: end
        rollouts = 1
        sampled = distributed.all_rollouts(accelerator, batch)
        while (
            rollouts <= args.max_refills
            and informative_groups(sampled, args.group_size) < plan.questions
        ):
            refill = run.rollout(envs, step, refill=rollouts)
            refill = distributed.all_rollouts(accelerator, run.settle_verifier_errors(refill))
            sampled = Rollout.concatenate([sampled, refill])
            rollouts += 1
        batch = choose_groups(sampled, plan.questions, args.group_size).take(plan.own)
        if args.overlong_filter:
            batch = batch._replace(mask=batch.mask & batch.terminated[:, None])
        row["sampling/rollouts"] = rollouts
        train_started = time.perf_counter()

        rewards = distributed.all_gather(accelerator, batch.rewards)
        advantages = plan.own_rows(compute_advantages(rewards, args.group_size))

        # --- shared update: begin
        minibatches = list(plan.minibatches(step))
        if old_logprobs is None:
            old_logprobs = plan.old_logprobs(policy, batch, args.temperature, minibatches)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / max(1, args.warmup_steps))
        for update, rows in enumerate(minibatches):
            totals = plan.totals(batch, rows)
            for micro in updates.micro_batches(batch, rows):
                with updates.micro_step(micro):
                    logprobs, entropy = policy(
                        micro.tokens, temperature=args.temperature, with_entropy=True
                    )
                    if update == 0:  # the policy is still the rollout's
                        old_logprobs[micro.rows, : micro.width] = logprobs.detach()
                    old = torch.where(micro.mask, micro.part(old_logprobs), logprobs.detach())
                    weighted = micro.part(advantages)  # (n,) or (n, k)
                    if args.tis_cap is not None:
                        weighted = reweight(
                            weighted,
                            old,
                            micro.sampling_logprobs,
                            args.tis_cap,
                            level=args.tis_level,
                            mask=micro.mask,
                        )
                    # --- shared update: end
                    loss, metrics = policy_loss(
                        logprobs,
                        old,
                        weighted,
                        micro.mask,
                        totals,
                        clip_eps_low=args.clip_eps_low,
                        clip_eps_high=args.clip_eps_high,
                    )
                    # --- shared step: begin
                    metrics |= token_metrics(micro, logprobs, old, entropy, totals)
                    if args.entropy_coef:
                        loss = loss - args.entropy_coef * metrics["policy/entropy"]
                    updates.backward(loss, metrics)
            updates.step()
        # --- shared step: end

        # --- shared log: begin
        row |= updates.metrics()
        row |= mismatch_metrics(accelerator, batch, old_logprobs)
        row |= run.sync(policy, batch, time.perf_counter() - train_started)
        if run.is_due(args.eval_every):
            row |= run.evaluate(eval_envs)
        run.log(row, batch, envs)
        if run.is_stopping() or run.is_due(args.checkpoint_every):
            run.save(policy, optimizer)
        # --- shared log: end

    # --- shared end: begin
    run.finish(envs, eval_envs)
    del policy, optimizer, updates
    distributed.shutdown(accelerator)
    # --- shared end: end


if __name__ == "__main__":
    run_command(Args, main)
