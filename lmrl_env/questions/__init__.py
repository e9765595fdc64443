"""Question sets by name: generated, from files and folders, and from the hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from lmrl_env.errors import ConfigurationError, QuestionError, UnknownNameError
from lmrl_env.questions.arithmetic import arithmetic_questions
from lmrl_env.questions.question_set import (
    Columns,
    Drops,
    QuestionSet,
    Split,
    in_split,
    usable_questions,
)
from lmrl_env.questions.sources import read_folder, read_hub, read_jsonl

__all__ = ["QuestionSet", "Split", "load_questions"]

logger = logging.getLogger(__name__)

_ARITHMETIC_KEYS = ("level", "size", "seed")
_FOLDER_KEYS = (*Columns._fields, "split")
_HUB_KEYS = (*_FOLDER_KEYS, "config")


def load_questions(name: str, *, split: Split = "train") -> QuestionSet:
    """Load a question set.

    Empty questions, answers that are empty or ``None``, and duplicates are dropped; the set's
    ``report`` counts and names them, and a warning says so. Every set but ``arithmetic``, which
    has its own, is split by a hash of each question's text, one tenth held out.

    Args:
        name: ``NAME`` or ``NAME:key=value,key=value``, where ``NAME`` is one of

            - ``arithmetic``, with the keys ``level``, ``size`` and ``seed``;
            - a ``.jsonl`` or ``.jsonl.gz`` file, with the keys ``question``, ``answer`` and ``id``,
              which name the columns and default to themselves;
            - a folder that ``datasets.load_from_disk`` or ``load_dataset`` reads, with the same
              keys and ``split``;
            - a hub id such as ``openai/gsm8k``, with the same keys and ``config``.
        split: ``train``, ``heldout`` or ``all``.

    Raises:
        UnknownNameError: if the name is of none of these kinds.
        ConfigurationError: for an unknown key, value or split.
        QuestionError: if the source cannot be read, or holds no usable question.

    >>> questions = load_questions("arithmetic:size=100", split="heldout")
    >>> len(questions)
    100
    """
    source, options = _parse(name)
    path = Path(source).expanduser()
    if source == "arithmetic":
        _check_keys(name, options, _ARITHMETIC_KEYS)
        return _arithmetic(name, options, split)
    columns = Columns(**{key: options[key] for key in Columns._fields if key in options})
    drops = Drops()
    if source.endswith((".jsonl", ".jsonl.gz")):
        _check_keys(name, options, Columns._fields)
        rows = read_jsonl(path, drops)
    elif path.is_dir():
        _check_keys(name, options, _FOLDER_KEYS)
        rows = read_folder(path, options.get("split"))
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists() and source[0] != ".":
        _check_keys(name, options, _HUB_KEYS)
        rows = read_hub(source, options.get("config"), options.get("split"))
    else:
        raise UnknownNameError(
            f"unknown question set {source!r}: expected 'arithmetic', a .jsonl or .jsonl.gz file, "
            "a folder that exists (of .parquet files, say), or a hub id such as 'openai/gsm8k'"
        )
    rows = list(rows)
    _check_columns(name, {key for row in rows for key in row}, columns, options)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    questions = usable_questions(stem, rows, columns, drops)
    report = f"{len(questions) + len(drops):,} rows: {len(questions):,} kept"
    if drops:
        report += f"; {drops}"
        logger.warning("%s: %s", name, report)
    if not questions:
        raise QuestionError(f"the question set {name!r} holds no usable question: {report}")
    return QuestionSet(name, in_split(questions, split), report)


def _parse(name: str) -> tuple[str, dict[str, str]]:
    """Split a name from its options, at the first colon that a key follows.

    >>> _parse("openai/gsm8k:config=main,split=train")
    ('openai/gsm8k', {'config': 'main', 'split': 'train'})
    """
    match = re.fullmatch(r"(.+?):(\w+=.*)", name)
    if match is None:
        return name, {}
    pairs = [option.partition("=") for option in match[2].split(",")]
    return match[1], {key: value for key, _, value in pairs}


def _check_keys(name: str, options: dict[str, str], known: tuple[str, ...]) -> None:
    for key, value in options.items():
        if key not in known or not value:
            raise ConfigurationError(
                f"{key}={value} in the question set {name!r}: expected key=value with one of the "
                f"keys {', '.join(known)}"
            )


def _check_columns(name: str, present: set[str], columns: Columns, options: dict[str, str]) -> None:
    for key, column in columns._asdict().items():
        if column not in present and (key != "id" or "id" in options):
            raise QuestionError(
                f"the question set {name!r} has no column {column!r}: its columns are "
                f"{sorted(present)}; name the right one by {key}=COLUMN after a colon"
            )


def _arithmetic(name: str, options: dict[str, str], split: Split) -> QuestionSet:
    try:
        numbers = {key: int(value) for key, value in options.items()}
    except ValueError as error:
        raise ConfigurationError(
            f"{name!r}: expected whole numbers for {', '.join(_ARITHMETIC_KEYS)} ({error})"
        ) from error
    if split == "all":
        questions = arithmetic_questions("train", **numbers)
        questions += arithmetic_questions("heldout", **numbers)
    else:
        questions = arithmetic_questions(split, **numbers)
    return QuestionSet(name, questions, f"{len(questions):,} questions made, all kept")
