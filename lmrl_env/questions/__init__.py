"""Question sets by name: generated, from files and folders, and from the hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np

from lmrl_env.errors import ConfigurationError, QuestionError, UnknownNameError
from lmrl_env.questions.arithmetic import arithmetic_questions
from lmrl_env.questions.grammar import SetName, parse_mixture
from lmrl_env.questions.named_sets import NAMED_SETS, NamedSet
from lmrl_env.questions.overlap import overlap, warn_of_overlap
from lmrl_env.questions.question_set import (
    Columns,
    Drops,
    Part,
    QuestionSet,
    Split,
    in_split,
    mix,
    usable_questions,
)
from lmrl_env.questions.selection import at_level, by_pass_rate
from lmrl_env.questions.sources import FILE_ENDINGS, Rows, read_file, read_folder, read_hub
from lmrl_env.types import Question

__all__ = [
    "NAMED_SETS",
    "Part",
    "QuestionSet",
    "Split",
    "load_questions",
    "overlap",
    "warn_of_overlap",
]

logger = logging.getLogger(__name__)

_CURRICULUM_KEYS = ("pass_rates", "band", "order")
_ARITHMETIC_KEYS = ("level", "size", "seed")
_FILE_KEYS = (*Columns._fields, "level", *_CURRICULUM_KEYS)
_FOLDER_KEYS = (*_FILE_KEYS, "split", "config")


def load_questions(name: str, *, split: Split = "train") -> QuestionSet:
    """Load a question set.

    Empty questions, answers that are empty or ``None``, and duplicates are dropped; the set's
    ``report`` counts and names them, and a warning says so. Every set but ``arithmetic``, which
    has its own, is split by a hash of each question's text, one tenth held out.

    Args:
        name: ``SET``, ``SET:key=value,key=value``, or a mixture ``SET:WEIGHT,SET:WEIGHT``, where
            each set may have keys, as in ``math-12k:level=3-5:0.7,gsm8k:0.3``. Training draws from
            the sets of a mixture in proportion to the weights. ``SET`` is one of

            - ``arithmetic``, with the keys ``level``, ``size`` and ``seed``;
            - a name in ``NAMED_SETS``, such as ``math500``, which is loaded from the hub, or
              ``math500=PATH``, a file or folder here that holds it;
            - a ``.jsonl``, ``.jsonl.gz``, ``.json`` or ``.parquet`` file;
            - a folder that ``datasets.load_from_disk`` or ``load_dataset`` reads;
            - a hub id such as ``openai/gsm8k``.

            Files, folders and hub ids have the keys ``question``, ``answer`` and ``id``, which
            name the columns and default to themselves (of a named set, to its own); a dot leads
            into a nested column. Folders and hub ids also have ``split`` and ``config``. These
            keys choose among the questions:

            - ``level=3-5`` keeps a range of levels, ``level=5`` one, by the column ``level``;
            - ``pass_rates=FILE``, of rows with ``id`` and ``pass_rate`` or the ``samples.jsonl`` of
              ``lmrl eval``, keeps what was measured;
              ``band=0.2-0.8`` keeps a range of it, ``order=easy-first`` or ``order=hard-first``
              asks in that order in every epoch, where else each epoch is shuffled anew. What is
              held out stays as it is, so that accuracies compare.
        split: ``train``, ``heldout`` or ``all``.

    Raises:
        UnknownNameError: if the name is of none of these kinds.
        ConfigurationError: for an unknown key, value or split, or a mixture with a bad weight.
        QuestionError: if the source cannot be read, or holds no usable question.

    >>> questions = load_questions("arithmetic:size=100", split="heldout")
    >>> len(questions)
    100
    """
    sets = [(_load_set(set_name, split), share) for set_name, share in parse_mixture(name)]
    return sets[0][0] if len(sets) == 1 else mix(name, sets)


def _load_set(name: SetName, split: Split) -> QuestionSet:
    """Load one set of a mixture, or the only one."""
    if name.source == "arithmetic":
        questions, report = _arithmetic(name, split)
    else:
        questions, report = _from_rows(name)
        if "level" in name.options:
            questions, note = at_level(name, questions)
            report += f"; {note}"
    if split != "heldout" and name.options.keys() & set(_CURRICULUM_KEYS):
        questions, note = by_pass_rate(name, questions)
        report += f"; {note}"
    if not questions:
        raise QuestionError(f"nothing is left of the question set {name.text!r}: {report}")
    if name.source != "arithmetic" and split != "all":
        questions = in_split(questions, split)
        report += f"; {len(questions):,} in {split!r}"
    part = Part(np.arange(len(questions)), ordered="order" in name.options)
    return QuestionSet(name.text, questions, report, [part])


def _from_rows(name: SetName) -> tuple[list[Question], str]:
    """Return the usable questions of a source, and what became of its rows."""
    drops = Drops()
    known, label, place = _locate(name)
    rows = list(_read(name, known, label, place, drops))
    if not rows:
        raise QuestionError(
            f"the question set {name.text!r} holds no rows ({drops or 'it is empty'}): expected "
            "one question a row, in JSONL one JSON object a line"
        )
    columns = _columns(name, known, {key for row in rows for key in row})
    if known is None:
        label = Path(place).name.removesuffix(".gz")
        label = label.removesuffix(Path(label).suffix) if label.endswith(FILE_ENDINGS) else label
    questions = usable_questions(label, rows, columns, drops)
    report = f"{len(questions) + len(drops):,} rows: {len(questions):,} kept"
    if drops:
        report += f"; {drops}"
        logger.warning("%s: %s", name.text, report)
    if not questions:
        raise QuestionError(f"the question set {name.text!r} holds no usable question: {report}")
    return questions, report


def _locate(name: SetName) -> tuple[NamedSet | None, str, str]:
    """Return the named set that is meant, its name, and the place where it or another is.

    >>> _locate(SetName("", "math500=copy.jsonl", {}))[1:]
    ('math500', 'copy.jsonl')
    """
    label, _, place = name.source.partition("=")
    if label in NAMED_SETS and (place or label == name.source):
        return NAMED_SETS[label], label, place
    if place and re.fullmatch(r"[\w-]+", label) and not Path(name.source).exists():
        raise UnknownNameError(
            f"unknown question set {label!r}: {name.source!r} says where a copy of it is; expected "
            f"one of {', '.join(NAMED_SETS)}, or the path alone"
        )
    return None, "", name.source


def _read(name: SetName, known: NamedSet | None, label: str, place: str, drops: Drops) -> Rows:
    """Return the rows of a file, a folder or a data set of the hub."""
    path = Path(place).expanduser()
    if place.endswith(FILE_ENDINGS):
        name.check_keys(_FILE_KEYS)
        return read_file(path, drops)
    config, split = name.options.get("config"), name.options.get("split")
    preferred = (known.config, known.split) if known else (None, None)
    if place and path.is_dir():
        name.check_keys(_FOLDER_KEYS)
        return read_folder(path, config, split, preferred)
    if known and not place:
        name.check_keys(_FOLDER_KEYS)
        copy = f"{label}="
        return read_hub(known.hub, config or known.config, split or known.split, copy)
    if known:
        raise QuestionError(
            f"{place!r} is to be a copy of {label}, but is no folder that exists and no file in "
            f"one of the formats {', '.join(FILE_ENDINGS)}: check the path"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not path.exists() and place[0] != ".":
        name.check_keys(_FOLDER_KEYS)
        return read_hub(place, config, split, "./")
    raise UnknownNameError(
        f"unknown question set {place!r}: expected 'arithmetic', a {' or '.join(FILE_ENDINGS)} "
        f"file, a folder that exists, a hub id such as 'openai/gsm8k', or one of "
        f"{', '.join(NAMED_SETS)}"
    )


def _columns(name: SetName, known: NamedSet | None, present: set[str]) -> Columns:
    """Return the columns of a set, by its options, its own names or the plain ones.

    A copy of a named set may have the columns of the hub, the plain ones, or ``problem``, as all
    sets of the paper's own repository have.
    """
    chosen: dict[str, str] = {}
    for key, plain in Columns()._asdict().items():
        names = [name.options.get(key) or plain]
        if known and key not in name.options:
            names = [getattr(known.columns, key), plain, *["problem"] * (key == "question")]
        heads = [column for column in names if {column, column.partition(".")[0]} & present]
        if not heads and (key != "id" or key in name.options):
            raise QuestionError(
                f"the question set {name.text!r} has no column {' or '.join(map(repr, names))}: "
                f"its columns are {sorted(present)}; name the right one by {key}=COLUMN after a "
                "colon"
            )
        chosen[key] = (heads or names)[0]
    return Columns(**chosen)


def _arithmetic(name: SetName, split: Split) -> tuple[list[Question], str]:
    name.check_keys((*_ARITHMETIC_KEYS, *_CURRICULUM_KEYS))
    try:
        numbers = {key: int(name.options[key]) for key in _ARITHMETIC_KEYS if key in name.options}
    except ValueError as error:
        raise ConfigurationError(
            f"{name.text!r}: expected whole numbers for {', '.join(_ARITHMETIC_KEYS)} ({error})"
        ) from error
    if split == "all":
        questions = arithmetic_questions("train", **numbers)
        questions += arithmetic_questions("heldout", **numbers)
    else:
        questions = arithmetic_questions(split, **numbers)
    return questions, f"{len(questions):,} questions made, all kept"
