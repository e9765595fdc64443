"""The folder of a training run: its settings, its log and its samples."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gymnasium.envs.registration import EnvSpec

from lmrl_env.checkpoint import Checkpoints
from lmrl_env.durable import naming, sync, write_text
from lmrl_env.errors import RunFolderError
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
        checkpoints: of the run.
        config: ``config.json`` as it was found, empty if there was none.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        file = self.path / "config.json"
        self.config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        self._lock: IO[str] | None = None

    @property
    def holds_a_run(self) -> bool:
        """Return whether something was logged here before."""
        return (self.path / "metrics.jsonl").exists()

    def lock(self) -> None:
        """Keep other processes out of the folder until this one ends, in whatever way.

        Raises:
            RunFolderError: if another process is in it, or it cannot be written.
        """
        with naming(self.path / ".lock"):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise RunFolderError(
                f"{self.path} is in use by {file.read().strip() or 'another process'} ({error}): "
                "wait for its end or stop it, or name another --run-dir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def unlock(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``."""
        write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write ``manifest.json``."""
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")

    def keep_rows(self, last_step: int) -> None:
        """Drop logged rows behind a step, which will be written again; -1 drops all."""
        for name in ("metrics.jsonl", "samples.jsonl", FAULTS_FILE):
            path = self.path / name
            if name == FAULTS_FILE and not path.exists():
                continue
            rows = []
            for line in path.read_text().splitlines() if path.exists() else ():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # cut off when the run was killed
                    break
                if row["step"] <= last_step:
                    rows.append(row)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            if name == "metrics.jsonl":
                self.rows = rows

    def append_row(self, row: dict[str, Any]) -> None:
        """Add a row to ``metrics.jsonl``; a number that is not finite is null there.

        Raises:
            RunFolderError: if it cannot be written.
        """
        row = finite(row)
        self.rows.append(row)
        path = self.path / "metrics.jsonl"
        with naming(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def append_faults(self, records: Sequence[dict[str, Any]]) -> None:
        """Add responses that were not finite to ``faults.jsonl``.

        Raises:
            RunFolderError: if they cannot be written.
        """
        path = self.path / FAULTS_FILE
        with naming(path), path.open("a") as file:
            file.writelines(json.dumps(finite(record)) + "\n" for record in records)

    def sync_logs(self) -> None:
        """Wait until all rows are on the disk, as a checkpoint that counts on them will be."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            with naming(self.path / name):
                sync(self.path / name)

    def append_samples(
        self, step: int, rollout: Rollout, count: int, decode: Callable[[Any], str]
    ) -> None:
        """Add the first responses of a batch to ``samples.jsonl``.

        Raises:
            RunFolderError: if they cannot be written.
        """
        path = self.path / "samples.jsonl"
        with naming(path), path.open("a") as file:
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


def spec_record(spec: EnvSpec | None) -> dict[str, Any] | None:
    """Return a spec as JSON can hold it, functions by their path."""
    if spec is None:
        return None
    paths: dict[str, Any] = {
        name: f"{function.__module__}:{function.__qualname__}"
        for name in ("entry_point", "vector_entry_point")
        if callable(function := getattr(spec, name))
    }
    return json.loads(dataclasses.replace(spec, **paths).to_json())


def default_run_dir(algorithm: str, args: Any) -> str:
    """Return ``runs/ALGORITHM-ENV-SEED-TIME``."""
    name = args.env.rsplit(":", 1)[-1]
    return f"runs/{algorithm}-{name}-s{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
