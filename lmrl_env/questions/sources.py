"""Where rows come from: files, folders in the formats of ``datasets``, and the hub."""

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

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")

_HUB_TIMEOUT = 10.0
"""Seconds in which the hub must answer a first request."""


def read_file(path: Path, drops: Drops) -> Rows:
    """Return the rows of a file.

    Args:
        path: ends in one of ``FILE_ENDINGS``. A ``.json`` file is one array of objects, or of
            arrays, whose places are then the columns ``0``, ``1`` and so on.
        drops: gets the lines or items that are no row.

    Raises:
        QuestionError: if the file cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        if path.suffix == ".json":
            return _read_json(path, drops)
        return _read_jsonl(path, drops)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise QuestionError(
            f"cannot read the question set {str(path)!r} ({error}): expected a readable file in "
            f"one of the formats {', '.join(FILE_ENDINGS)}; check the path, or fetch the file again"
        ) from error


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _read_json(path: Path, drops: Drops) -> Rows:
    rows = []
    items = json.loads(path.read_bytes())
    if not isinstance(items, list):
        raise ValueError(f"it holds one {type(items).__name__}, no array of rows")
    for number, item in enumerate(items):
        if isinstance(item, list):
            item = {str(place): value for place, value in enumerate(item)}
        if isinstance(item, dict):
            rows.append(item)
        else:
            drops.add("items that are no row", f"item {number}")
    return rows


def _read_jsonl(path: Path, drops: Drops) -> Rows:
    rows = []
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
    return rows


def read_folder(
    folder: Path, config: str | None, split: str | None, preferred: tuple[str | None, str | None]
) -> Rows:
    """Return the rows of a folder that ``datasets`` reads.

    Args:
        folder: written by ``save_to_disk``, or with data files (parquet, JSON, CSV, ...), or a
            copy of a data set of the hub.
        config: which configuration, where there are several.
        split: which split, where there are several.
        preferred: configuration and split to take where none is named and the folder has them.

    Raises:
        QuestionError: if the folder cannot be read or has no such split.
    """
    import datasets

    saved = any((folder / file).exists() for file in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            data = datasets.load_from_disk(str(folder))
        else:
            if config is None and preferred[0] in datasets.get_dataset_config_names(str(folder)):
                config = preferred[0]
            data = datasets.load_dataset(str(folder), config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise QuestionError(
            f"cannot read the folder {str(folder)!r} ({reason}): expected one that "
            "datasets.load_from_disk or datasets.load_dataset reads, such as a folder of .parquet "
            "or .jsonl files"
        ) from error
    if split is None and isinstance(data, dict) and preferred[1] in data:
        split = preferred[1]
    return _one_split(str(folder), data, split)


def read_hub(hub: str, config: str | None, split: str | None, copy: str) -> Rows:
    """Return the rows of a data set on the Hugging Face hub, or of a copy in its cache.

    Args:
        hub: its id, such as ``openai/gsm8k``.
        config: which configuration, where there are several.
        split: which split, where there are several.
        copy: how the name of a set of questions begins that is a local copy.

    Raises:
        QuestionError: if it cannot be loaded, or has no such split.
    """
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    reason = "" if offline else _why_unreachable(hub)
    datasets.config.HF_HUB_OFFLINE = offline or bool(reason)  # then the cache, without retries
    try:
        data = datasets.load_dataset(hub, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        folder, reason = hub.rpartition("/")[2], reason or " ".join(str(error).split())
        raise QuestionError(
            f"cannot load {hub!r} from the Hugging Face hub ({reason}): check the spelling, "
            "HF_HUB_OFFLINE and the network, or run `hf download "
            f"{hub} --repo-type dataset --local-dir {folder}` where there is a network, and name "
            f"the copy: {copy}{folder}"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return _one_split(hub, data, split)


def _why_unreachable(hub: str) -> str:
    """Return why the hub does not answer one request, or an empty text if it does."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().dataset_info(hub, timeout=_HUB_TIMEOUT)
    except HfHubHTTPError:
        return ""  # an answer: whether the data set is missing or closed, load_dataset says better
    except Exception as error:  # the HTTP client's own, which is another in every version
        return f"it does not answer: {error}"
    return ""


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
