"""The gap between the policy that samples, in the engine, and the policy that is trained.

Where generation overlaps training, samples are one update old: whole responses are weighed then, up
to a cap of 5. For updates of 0.1 nats a response the expected gradient is 15.5° off ∇J uncorrected,
13.2° with tokens up to 2, 5.2° with responses up to 2, and 0.0° with responses up to 5. Its squared
error on 128 × 8 responses is 0.172, 0.119, 0.068 and 0.051 of ‖∇J‖²; on 16 × 8, where the variance
is most of it, 0.388, 0.383, 0.381 and 0.408. The variance is averaged over steps, the bias is not:
hence 5. (Exact medians over 48 random updates, ``benchmarks/bench_staleness.py``.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lmrl_env.distributed import all_gather
from lmrl_env.errors import ConfigurationError
from lmrl_env.kl import k3

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmrl_env.rollout import Rollout

Level = Literal["token", "sequence"]
"""What an importance weight is of."""


def truncated_importance_weights(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    cap: float,
    *,
    level: Level = "token",
    mask: Tensor | None = None,
) -> Tensor:
    """Return weights that turn the engine's samples into the trainer's, up to the cap.

    token:     wᵢₜ = min(π_old(oᵢₜ) / π_engine(oᵢₜ), C)
    sequence:  wᵢₜ = min(Πₛ π_old(oᵢₛ) / π_engine(oᵢₛ), C), over all actions of the response

    Truncated importance sampling (Ionides 2008), per token as in Yao et al. 2025, "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training". Multiplied with the advantages, the
    weight of a token corrects its own probability, and not that of its prefix or of what follows;
    the weight of the sequence corrects all, and without a cap it makes the gradient exact.

    Args:
        old_logprobs: shape (n, K), of the trainer before the first update by the batch; nats.
        sampling_logprobs: shape (n, K), of the engine with the weights that it sampled by; nats.
        cap: C, above 0.
        level: whether a token or the whole response is weighed.
        mask: shape (n, K), bool, True where a token was an action; a sequence needs it.

    Returns:
        Shape (n, K), without gradient.

    Raises:
        ConfigurationError: for sequences without a mask.

    >>> old, sampling = torch.tensor([[0.0, -1.0]]), torch.tensor([[-1.0, -0.5]])
    >>> truncated_importance_weights(old, sampling, 2.0)
    tensor([[2.0000, 0.6065]])
    >>> mask = torch.tensor([[True, True]])
    >>> truncated_importance_weights(old, sampling, 2.0, level="sequence", mask=mask)
    tensor([[1.6487, 1.6487]])
    """
    log_ratio = (old_logprobs - sampling_logprobs).detach()
    if level == "sequence":
        if mask is None:
            raise ConfigurationError(
                "level='sequence' without a mask: expected one, since only actions count; pass "
                "the batch's"
            )
        log_ratio = torch.where(mask, log_ratio, 0).sum(1, keepdim=True).expand_as(log_ratio)
    return log_ratio.exp().clamp(max=cap)


def reweight(
    advantages: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    cap: float,
    *,
    level: Level = "token",
    mask: Tensor | None = None,
) -> Tensor:
    """Return advantages times their tokens' truncated importance weights, shape (n, K).

    Args:
        advantages: shape (n,) or (n, K).
        old_logprobs: as ``truncated_importance_weights`` takes them, and so what follows.
        sampling_logprobs: shape (n, K).
        cap: of the weights, above 0.
        level: of a token or of the whole response.
        mask: shape (n, K), bool.
    """
    weights = truncated_importance_weights(
        old_logprobs, sampling_logprobs, cap, level=level, mask=mask
    )
    return weights * advantages.reshape(len(weights), -1)


@torch.no_grad()
def mismatch_metrics(
    accelerator: Accelerator, batch: Rollout, old_logprobs: Tensor
) -> dict[str, float | None]:
    """Return how far the engine's log-probs are from the trainer's at the same weights.

    Over all action tokens of all ranks, with x = log π_engine - log π_old and w = exp(-x):
    ``logprob_abs_mean`` and ``logprob_abs_p99`` are the mean and the 99th percentile of |x| in
    nats, ``k3`` estimates the divergence of engine from trainer in nats per token, and
    ``effective_sample_size`` is (Σw)² / (T·Σw²), the share of the T tokens that weighting by w
    would leave, at most 1.

    Args:
        accelerator: of this rank.
        batch: of this rank.
        old_logprobs: shape (N, K), of the trainer at the rollout's weights; nats.
    """
    sampling = torch.as_tensor(batch.sampling_logprobs, device=old_logprobs.device)
    mask = all_gather(accelerator, batch.mask).bool()
    gap = all_gather(accelerator, sampling - old_logprobs)[mask].double()
    names = ("logprob_abs_mean", "logprob_abs_p99", "k3", "effective_sample_size")
    if not len(gap):  # every response was filtered out
        return {f"mismatch/{name}": None for name in names}
    size, weights = gap.abs(), (-gap).exp()
    p99 = size.kthvalue(max(1, round(0.99 * len(size)))).values
    share = weights.sum().square() / (len(gap) * weights.square().sum())
    values = (size.mean(), p99, k3(gap).mean(), share)
    return {f"mismatch/{n}": v.item() for n, v in zip(names, values, strict=True)}
