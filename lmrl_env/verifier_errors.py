"""Responses that are left without a verdict, since their verifier timed out or crashed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmrl_env.distributed import any_rank
from lmrl_env.errors import GradingError
from lmrl_env.rollout import VERIFIER_ERRORS, Rollout

if TYPE_CHECKING:
    from accelerate import Accelerator

WARNED_OF = 0.01
"""Share of such responses above which a run warns."""


def settle_verifier_errors(
    accelerator: Accelerator, batch: Rollout, choice: str, group_size: int
) -> Rollout:
    """Treat such responses as ``--on-verifier-error`` says.

    Args:
        accelerator: of this rank.
        batch: of this rank.
        choice: ``zero``, ``drop`` or ``stop``.
        group_size: G.

    Returns:
        The batch; with ``drop`` without the groups of such responses in its mask.

    Raises:
        GradingError: with ``stop``, on all ranks, if a rank has such a response.
    """
    failed = batch.has_verifier_error
    if choice == "stop" and any_rank(accelerator, bool(failed.any())):
        raise GradingError(
            "--on-verifier-error stop: "
            + (_describe(batch, int(failed.argmax())) if failed.any() else "on another rank")
            + "; correct the verifier, give it a longer timeout, or take zero or drop"
        )
    return batch.drop_groups(failed, group_size) if choice == "drop" else batch


def verifier_warning(metrics: Mapping[str, Any]) -> str | None:
    """Return what to say of metrics in which too many responses have no verdict, or None."""
    for prefix in ("", "eval/"):
        shares = {s: metrics.get(f"{prefix}verifier/{s}") or 0.0 for s in VERIFIER_ERRORS}
        if sum(shares.values()) > WARNED_OF:
            listed = ", ".join(f"{status} {share:.1%}" for status, share in shares.items())
            return (
                f"the verifier did not finish on many {'held-out ' if prefix else ''}responses "
                f"({listed}), which counts as wrong where --on-verifier-error does not say "
                f"otherwise; this is said once, the shares are {prefix}verifier/* in metrics.jsonl"
            )
    return None


def _describe(batch: Rollout, row: int) -> str:
    """Return a response that has no verdict, as an error names it."""
    return (
        f"the verifier's status is {batch.verifier_status[row]!r} for response {row} to question "
        f"{batch.question_ids[row]}, gold answer {batch.answers[row]!r}: "
        f"{batch.responses[row][-500:]!r}"
    )
