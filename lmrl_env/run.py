"""A training run: its folder, its log, its clock, its checkpoints, and its clean end."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import EnvSpec

from lmrl_env.rollout import Rollout

if TYPE_CHECKING:
    pass


def _spec_record(spec: EnvSpec | None) -> dict[str, Any] | None:
    """Return a spec as JSON can hold it, functions by their path."""
    if spec is None:
        return None
    paths: dict[str, Any] = {
        name: f"{function.__module__}:{function.__qualname__}"
        for name in ("entry_point", "vector_entry_point")
        if callable(function := getattr(spec, name))
    }
    return json.loads(dataclasses.replace(spec, **paths).to_json())


def _describe(batch: Rollout, row: int) -> str:
    """Return a response that has no verdict, as an error names it."""
    return (
        f"the verifier's status is {batch.verifier_status[row]!r} for response {row} to question "
        f"{batch.question_ids[row]}, gold answer {batch.answers[row]!r}: "
        f"{batch.responses[row][-500:]!r}"
    )


def _default_run_dir(algorithm: str, args: Any) -> str:
    """Return ``runs/ALGORITHM-ENV-SEED-TIME``."""
    name = args.env.rsplit(":", 1)[-1]
    return f"runs/{algorithm}-{name}-s{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
