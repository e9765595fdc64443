"""The checkpoints of a run: written as a whole, verified when read, kept by count.

``step-N/`` is a Transformers folder, which every ``--model`` takes. What only a resumed run needs
lies in ``step-N/trainer/``, and ``step-N/checksums.json`` vouches for all of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoTokenizer

from lmrl_env.durable import find_damage, naming, whole_folder
from lmrl_env.errors import RunFolderError
from lmrl_env.tokenizer import model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINER = "trainer"
"""Name of the folder inside of a checkpoint that is no part of the model."""


class Checkpoints:
    """The folder ``checkpoints/step-N/`` of a run.

    A checkpoint is never overwritten: there is at most one of a step.

    Args:
        path: of the folder, which is made with the first checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path

    def folder(self, step: int) -> Path:
        """Return where the checkpoint of a step is."""
        return self.path / f"step-{step}"

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, ascending."""
        names = (path.name.removeprefix("step-") for path in self.path.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def recover(self) -> tuple[int | None, list[str]]:
        """Find the newest intact checkpoint, and put damaged ones out of the way.

        What a killed run left half written or half deleted is removed.

        Returns:
            Its step, or None if there has been no checkpoint yet; and what was damaged, a line
            each.

        Raises:
            RunFolderError: if there are checkpoints and all of them are damaged.
        """
        for partial in self.path.glob("step-*.partial"):
            shutil.rmtree(partial)
        damaged: list[tuple[Path, str]] = []
        for step in reversed(self.steps):
            folder = self.folder(step)
            damage = find_damage(folder)
            if damage is None:
                for path, _ in damaged:
                    shutil.rmtree(f"{path}.damaged", ignore_errors=True)
                    path.rename(f"{path}.damaged")
                return step, [
                    f"{path} is damaged: {what}; it is not used, and is {path.name}.damaged now"
                    for path, what in damaged
                ]
            damaged.append((folder, damage))
        if damaged:
            listed = "; ".join(f"{path}: {what}" for path, what in damaged)
            raise RunFolderError(
                f"no checkpoint is intact ({listed}): expected one at least; put a copy back, or "
                f"remove {self.path} to start this run again"
            )
        return None, []

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Give a folder to write a checkpoint into, which gets its name when it is whole.

        Raises:
            RunFolderError: if it cannot be written; nothing is left of it then, and the others
                are as they were.
        """
        with whole_folder(self.folder(step)) as partial:
            (partial / TRAINER).mkdir()
            yield partial

    def prune(self, keep: int, accuracies: Mapping[int, float]) -> None:
        """Delete old checkpoints.

        Args:
            keep: number of the newest that stay; 0 keeps all.
            accuracies: held-out accuracy by step; the best checkpoint stays too.
        """
        steps = self.steps
        kept = set(steps[-keep:]) | best_step(steps, accuracies)
        for step in steps:
            if step not in kept:
                doomed = self.folder(step).with_suffix(".partial")
                self.folder(step).rename(doomed)  # a half-deleted one is no checkpoint either
                shutil.rmtree(doomed)


def best_step(steps: Iterable[int], accuracies: Mapping[int, float]) -> set[int]:
    """Return the step of the highest accuracy, the first of equals, as a set; empty without any."""
    evaluated = [step for step in steps if step in accuracies]
    return {max(evaluated, key=lambda step: (accuracies[step], -step))} if evaluated else set()


def accuracies(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Return the held-out accuracy by step, of the rows of ``metrics.jsonl`` that have one."""
    found = ((row["step"], row.get("eval/accuracy")) for row in rows)
    return {step: accuracy for step, accuracy in found if accuracy is not None}


def save_model(
    folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], tokenizer_of: str
) -> None:
    """Write a model and its tokenizer in the Transformers format.

    Args:
        folder: to write into.
        model: whose configuration it is.
        weights: by their names in the model.
        tokenizer_of: name of the model whose tokenizer is saved.

    Raises:
        RunFolderError: if they cannot be written.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path(tokenizer_of))
    with naming(folder / "model.safetensors"):
        model.save_pretrained(folder, state_dict=dict(weights))
    with naming(folder / "tokenizer.json"):
        tokenizer.save_pretrained(folder)
