"""What goes on as before when a run is resumed, what changes, and what cannot."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrl_env.distributed import all_sum
from lmrl_env.errors import ConfigurationError
from lmrl_env.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

IDENTITY = (
    *("algorithm", "model", "lora_rank", "env", "questions"),
    *("seed", "prompts_per_step", "group_size"),
)
"""Settings without which the weights, or the place in the stream of questions, are not the run's"""

PLACE = ("resume", "run_dir", "save_batch", "profile", "dry_run")
"""Settings that say nothing of how a run goes on."""

ARITHMETIC = {
    "ranks": "ranks {} → {}, which sum in another order",
    "hardware": "hardware {!r} → {!r}",
    "torch": "torch {} → {}",
    "transformers": "transformers {} → {}",
}
"""Parts of ``config.json`` that change roundings."""


class Resumption:
    """From where a run goes on, after its folder was taken for this process.

    A run that is not resumed, or has no checkpoint yet, begins at step 0.

    Args:
        folder: of the run.
        accelerator: of this rank.
        settings: of the run, its algorithm included.

    Attributes:
        step: that was finished last.
        checkpoint: of that step, or None.
        settings: with the run's own id.

    Raises:
        ConfigurationError: for settings of another run, or fewer steps than it has taken.
        RunFolderError: if another process is in the folder, or all its checkpoints are damaged.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator, settings: Mapping[str, Any]):
        self._folder = folder
        self._resumed = settings["resume"] is not None
        self._damaged: list[str] = []
        run_id = folder.config.get("run_id") or uuid.uuid4().hex[:8]
        self.settings = {**settings, "run_id": run_id}
        changed = changed_settings(folder.config, settings) if self._resumed else {}
        self._changed = {name: list(values) for name, values in changed.items()}
        found: int | None = None
        if accelerator.is_main_process and settings["dry_run"]:  # which leaves the folder as it is
            found = max(folder.checkpoints.steps, default=None) if self._resumed else None
        elif accelerator.is_main_process:
            folder.lock()
            if self._resumed:
                found, self._damaged = folder.checkpoints.recover()
            else:  # from here on a killed run can be resumed
                folder.write_config(self.settings)
        code = int(all_sum(accelerator, 0 if found is None else found + 1))  # all ranks agree
        self.step = max(0, code - 1)
        self.checkpoint: Path | None = folder.checkpoints.folder(self.step) if code else None
        if self.checkpoint is not None:
            refuse_another_run(changed, self.checkpoint)
            if settings["steps"] < self.step:
                raise ConfigurationError(
                    f"--steps {settings['steps']}: the run in {str(folder.path)!r} has taken "
                    f"{self.step} already; expected as many or more, such as --steps "
                    f"{2 * self.step}"
                )

    def begin(self, config: dict[str, Any]) -> list[str]:
        """Write ``config.json``, drop the rows that will be written again, and tell what changed.

        Args:
            config: of the run; where it is resumed, the history of its resumptions is added.

        Returns:
            Lines to show.
        """
        lines = []
        if self._resumed:
            source = self.checkpoint or "the start, since the run has no checkpoint yet"
            inexact = changed_arithmetic(self._folder.config, config) if self.checkpoint else []
            lines = [
                f"going on from {source}",
                *(f"warning: {line}" for line in self._damaged),
                *(f"changed: {flag(k)} {old} → {new}" for k, (old, new) in self._changed.items()),
                *(f"from here on not the same bit for bit: {line}" for line in inexact),
            ]
            record = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "step": self.step,
                "changed": self._changed,
                "not_bit_exact": inexact,
                "damaged": self._damaged,
            }
            config["resumed"] = [*self._folder.config.get("resumed", []), record]
        self._folder.write_config(config)
        self._folder.keep_rows(self.step if self.checkpoint else -1)
        return lines

    def tracker_options(self, tracker: str) -> dict[str, Any]:
        """Return what a tracker is started with, so that the run has each point once.

        Args:
            tracker: ``tensorboard`` or ``wandb``.
        """
        if tracker == "wandb":  # its log does not go back, and takes no step again that it has
            return {"wandb": {"id": self.settings["run_id"], "resume": "allow"}}
        return {"tensorboard": {"purge_step": self.step + 1 if self.checkpoint else 0}}


def flag(name: str) -> str:
    """Return how a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"


def changed_settings(
    config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return old and new value of the settings in which a resumed run differs from its config.

    Args:
        config: ``config.json`` of the run.
        settings: now.
    """
    return {
        name: (config[name], value)
        for name, value in settings.items()
        if name in config and name not in PLACE and config[name] != value
    }


def refuse_another_run(changed: Mapping[str, tuple[Any, Any]], checkpoint: Any) -> None:
    """Refuse settings that are those of another run.

    Args:
        changed: see ``changed_settings``.
        checkpoint: folder that would be gone on from.

    Raises:
        ConfigurationError: that names them.
    """
    contrary = [
        f"{flag(name)} {new} (the run: {old})"
        for name, (old, new) in changed.items()
        if name in IDENTITY
    ]
    if contrary:
        raise ConfigurationError(
            f"--resume cannot go on with {', '.join(contrary)}: leave that out, or start a new run "
            f"from these weights, --model {checkpoint}"
        )


def changed_arithmetic(config: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return why a resumed run is no longer the uninterrupted one bit for bit; empty if it is.

    Args:
        config: ``config.json`` of the run.
        now: that of the resumed run.
    """
    flat = [{**each, **each.get("versions", {})} for each in (config, now)]
    return [
        text.format(flat[0][name], flat[1][name])
        for name, text in ARITHMETIC.items()
        if name in flat[0] and flat[0][name] != flat[1][name]
    ]
