"""The folder of a training run: its settings, its log and its samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmrl_env.rollout import Rollout

FAULTS_FILE = "faults.jsonl"
"""Responses whose loss or gradient was not finite."""


class RunFolder:
    """``config.json manifest.json metrics.jsonl samples.jsonl curves.png checkpoints/step-N/``.

    Responses that were not finite are in ``faults.jsonl``, if there were any. Only the first rank
    writes to it.

    Args:
        path: of the folder, which is made when something is written first.

    Attributes:
        rows: of ``metrics.jsonl``, those of the run that this one goes on with included.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []

    @property
    def holds_a_run(self) -> bool:
        """Return whether something was logged here before."""
        return (self.path / "metrics.jsonl").exists()

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write ``manifest.json``."""
        (self.path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    def keep_rows(self, last_step: int | None) -> None:
        """Drop logged rows behind a step, which will be written again; None drops all."""
        for name in ("metrics.jsonl", "samples.jsonl", FAULTS_FILE):
            path = self.path / name
            if name == FAULTS_FILE and not path.exists():
                continue
            rows = []
            if last_step is not None and path.exists():
                for line in path.read_text().splitlines():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError:  # cut off when the run was killed
                        break
                    if row["step"] <= last_step:
                        rows.append(row)
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
            partial.replace(path)
            if name == "metrics.jsonl":
                self.rows = rows

    def append_row(self, row: dict[str, Any]) -> None:
        """Add a row to ``metrics.jsonl``; a number that is not finite is null there."""
        row = finite(row)
        self.rows.append(row)
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def append_faults(self, records: Sequence[dict[str, Any]]) -> None:
        """Add responses that were not finite to ``faults.jsonl``."""
        with (self.path / FAULTS_FILE).open("a") as file:
            file.writelines(json.dumps(finite(record)) + "\n" for record in records)

    def append_samples(
        self, step: int, rollout: Rollout, count: int, decode: Callable[[Any], str]
    ) -> None:
        """Add the first responses of a batch to ``samples.jsonl``."""
        with (self.path / "samples.jsonl").open("a") as file:
            for i in range(min(count, len(rollout.rewards))):
                record = finite({"step": step, **sample_record(rollout, i, decode)})
                file.write(json.dumps(record) + "\n")


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with None for numbers that are not finite, which JSON cannot hold."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def sample_record(rollout: Rollout, row: int, decode: Callable[[Any], str]) -> dict[str, Any]:
    """Return a response as JSON can hold it.

    Args:
        rollout: the batch.
        row: index of the response.
        decode: returns the text of token ids.
    """
    return {
        "question_id": int(rollout.question_ids[row]),
        "prompt": decode(rollout.prompt_ids[row, : rollout.prompt_lengths[row]]),
        "response": rollout.responses[row],
        "answer": rollout.answers[row],
        "reward": float(rollout.rewards[row]),
        "finish_reason": "stop" if rollout.terminated[row] else "length",
        "verifier_status": rollout.verifier_status[row],
        "length": int(rollout.response_lengths[row]),
    }
