"""Where rows come from: JSONL files, folders in the formats of ``datasets``, and the hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmrl_env.errors import QuestionError
from lmrl_env.questions.question_set import Drops

Rows = Iterable[Mapping[str, Any]]


def read_jsonl(path: Path, drops: Drops) -> Rows:
    """Return the rows of a JSONL file, which may be compressed by gzip.

    Args:
        path: ends in ``.jsonl`` or ``.jsonl.gz``.
        drops: gets the lines that are no JSON object.

    Raises:
        QuestionError: if the file cannot be read.
    """
    rows = []
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    rows.append(row)
                else:
                    drops.add("broken lines", f"line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise QuestionError(
            f"cannot read the question set {str(path)!r} ({error}): expected a readable .jsonl or "
            ".jsonl.gz file; check the path, or fetch the file again"
        ) from error
    return rows


def read_folder(folder: Path, split: str | None) -> Rows:
    """Return the rows of a folder that ``datasets`` reads.

    Args:
        folder: written by ``save_to_disk``, or with data files (parquet, JSON, CSV, ...).
        split: which split, where there are several.

    Raises:
        QuestionError: if the folder cannot be read or has no such split.
    """
    import datasets

    saved = any((folder / file).exists() for file in ("dataset_dict.json", "state.json"))
    load = datasets.load_from_disk if saved else datasets.load_dataset
    try:
        data = load(str(folder))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise QuestionError(
            f"cannot read the folder {str(folder)!r} ({error}): expected one that "
            "datasets.load_from_disk or datasets.load_dataset reads, such as a folder of .parquet "
            "or .jsonl files"
        ) from error
    return _one_split(str(folder), data, split)


def read_hub(name: str, config: str | None, split: str | None) -> Rows:
    """Return the rows of a data set on the Hugging Face hub.

    Args:
        name: its id, such as ``openai/gsm8k``.
        config: which configuration, where there are several.
        split: which split, where there are several.

    Raises:
        QuestionError: if it cannot be loaded, or has no such split.
    """
    import datasets

    try:
        data = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise QuestionError(
            f"cannot load {name!r} from the Hugging Face hub ({error}): it is no file or folder "
            "here, so expected the id of a data set on the hub that can be reached; check the "
            "spelling, the network, HF_HUB_OFFLINE and config=NAME, or name a local file"
        ) from error
    return _one_split(name, data, split)


def _one_split(name: str, data: Any, split: str | None) -> Rows:
    if not isinstance(data, dict):  # a single split, saved by itself
        if split is not None:
            raise QuestionError(f"{name!r} has no splits: leave out split={split}")
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise QuestionError(
            f"the split of {name!r} is {split!r}: expected one of {sorted(data)}; say which by "
            f"split={next(iter(data))} after a colon"
        )
    return data[split]
