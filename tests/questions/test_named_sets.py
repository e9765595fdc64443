from __future__ import annotations

import json
import re

import datasets
import huggingface_hub
import pytest

from lmrl_env.errors import ConfigurationError, QuestionError, UnknownNameError
from lmrl_env.questions import NAMED_SETS, load_questions
from lmrl_env.types import Question

pytest_plugins = ("question_files",)

OLYMPIAD = {"is_multiple_answer": True, "unit": None, "error": "1e-1", "answer_type": "Numerical"}

# Of every set one row in the layout of the hub, and the question and answer that it holds.
HUB_ROWS = {
    "orz-57k": (
        {
            "0": {"from": "human", "value": "Why?"},
            "1": {"from": "assistant", "ground_truth": {"value": "\\frac{1}{2}"}},
        },
        Question("orz-57k/0", "Why?", "\\frac{1}{2}"),
    ),
    "math-12k": ({"problem": "Why?", "answer": "p - q"}, Question("math-12k/0", "Why?", "p - q")),
    "math-lvl3to5": (
        {"problem": "Why?", "answer": "118"},
        Question("math-lvl3to5/0", "Why?", "118"),
    ),
    "gsm8k": (
        {"question": "Why?", "answer": "500 + 580 = 1080.\n#### 1,080"},
        Question("gsm8k/0", "Why?", "1,080"),
    ),
    "asdiv": ({"problem": "Why?", "answer": "9"}, Question("asdiv/0", "Why?", "9")),
    "aime24": (
        {"id": 60, "problem": "Why?", "answer": "025", "year": "2024"},
        Question("60", "Why?", "025", {"year": "2024"}),
    ),
    "amc": ({"id": 0, "problem": "Why?", "answer": 142.0}, Question("0", "Why?", "142")),
    "math500": (
        {"unique_id": "test/a/1.json", "problem": "Why?", "answer": "3", "level": 2},
        Question("test/a/1.json", "Why?", "3", {"level": 2}),
    ),
    "minerva": ({"question": "Why?", "answer": "9.6\n"}, Question("minerva/0", "Why?", "9.6")),
    "olympiad-bench": (
        {"id": 7, "question": "Why?", "final_answer": ["$1$, $3$"], **OLYMPIAD},
        Question("7", "Why?", "$1$, $3$", OLYMPIAD),
    ),
    "dapo-math-17k": (
        {"prompt": "Why?", "solution": "34", "ability": "MATH"},
        Question("dapo-math-17k/0", "Why?", "34", {"ability": "MATH"}),
    ),
    "aime25": ({"id": "3", "problem": "Why?", "answer": "070"}, Question("3", "Why?", "070")),
}


def test_every_named_set_is_tried():
    assert HUB_ROWS.keys() == NAMED_SETS.keys()


@pytest.mark.parametrize("name", NAMED_SETS)
def test_names_are_spelled_one_way_and_say_whose_they_are(name):
    known = NAMED_SETS[name]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", known.hub) and known.split and known.licence
    assert known.citation.authors and known.citation.title and 2020 <= known.citation.year <= 2025
    assert known.citation.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}", known.citation.arxiv)


@pytest.fixture
def hub(monkeypatch):
    """Answer in place of the hub, and note what was asked."""
    asked = []

    def load_dataset(hub, config):
        asked.append((hub, config, datasets.config.HF_HUB_OFFLINE))
        name = next(name for name, known in NAMED_SETS.items() if known.hub == hub)
        row, _ = HUB_ROWS[name]
        known = NAMED_SETS[name]
        other = [{key: "other" for key in row}]
        splits = {known.split: [row], "other": other} | ({"test": [row]} if name == "gsm8k" else {})
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    return asked


@pytest.mark.parametrize("name", NAMED_SETS)
def test_a_named_set_comes_from_its_place_on_the_hub(hub, name):
    [question] = load_questions(name, split="all")
    assert question == HUB_ROWS[name][1]
    assert hub == [(NAMED_SETS[name].hub, NAMED_SETS[name].config, False)]


def test_another_split_of_a_named_set_can_be_asked_for(hub):
    assert len(load_questions("gsm8k:split=test", split="all")) == 1
    with pytest.raises(QuestionError, match=r"'validation': expected one of \['other', 'test'"):
        load_questions("gsm8k:split=validation")


@pytest.mark.parametrize("name", NAMED_SETS)
def test_a_copy_of_a_named_set_may_have_the_columns_of_the_hub(write_jsonl, name):
    row, question = HUB_ROWS[name]
    [loaded] = load_questions(f"{name}={write_jsonl(row)}", split="all")
    assert loaded == question


@pytest.mark.parametrize("name", NAMED_SETS)
@pytest.mark.parametrize("column", ["question", "problem"])
def test_a_copy_of_a_named_set_may_have_plain_columns(write_jsonl, name, column):
    path = write_jsonl({column: "Why?", "answer": "9.6\n", "answers": ["9.6\n", "9.60"]})
    [loaded] = load_questions(f"{name}={path}", split="all")
    assert (loaded.id, loaded.question) == (f"{name}/0", "Why?")
    assert loaded.answer == ("9.6", "9.60")


def test_the_publishers_own_copy_of_math_lvl3to5_is_read_by_its_gold_answers(write_jsonl):
    path = write_jsonl({"question": "Why?", "answer": "So 118.", "gt_answer": "118", "level": 5})
    [loaded] = load_questions(f"math-lvl3to5={path}:level=5", split="all")
    assert loaded.answer == "118"


def test_orz_57k_is_read_from_a_folder_with_the_publishers_array_of_arrays(tmp_path):
    turns = [{"value": "Why?"}, {"ground_truth": {"value": "118"}}]
    (tmp_path / "orz_math_57k_collection.json").write_text(json.dumps([turns]))
    [loaded] = load_questions(f"orz-57k={tmp_path}", split="all")
    assert (loaded.question, loaded.answer) == ("Why?", "118")


def test_columns_that_are_named_come_before_those_of_the_set(write_jsonl):
    path = write_jsonl({"problem": "Why?", "text": "How?", "answer": "1"})
    assert load_questions(f"math500={path}:question=text", split="all")[0].question == "How?"
    with pytest.raises(QuestionError, match="no column 'txet': its columns are"):
        load_questions(f"math500={path}:question=txet")


def test_a_copy_without_the_columns_names_all_that_were_looked_for(write_jsonl):
    path = write_jsonl({"query": "Why?", "answer": "1"})
    with pytest.raises(QuestionError, match=r"'prompt' or 'question' or 'problem'.*question=COL"):
        load_questions(f"dapo-math-17k={path}")


def test_a_folder_is_read_in_the_split_of_the_set_where_it_has_it(tmp_path):
    row = HUB_ROWS["math500"][0]
    splits = {"train": [row | {"problem": "Easy?"}], "test": [row]}
    data = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    data.save_to_disk(tmp_path / "saved")
    for split, rows in data.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "files" / f"{split}.parquet")
    data["test"].save_to_disk(tmp_path / "one")
    for folder in ("saved", "files", "one"):
        [question] = load_questions(f"math500={tmp_path / folder}", split="all")
        assert question.question == "Why?"
    name = f"math500={tmp_path / 'saved'}:split=train"
    assert load_questions(name, split="all")[0].question == "Easy?"


def test_a_copy_of_the_hubs_folder_is_read_in_the_configuration_of_the_set(tmp_path):
    folder = tmp_path / "gsm8k"
    for config, question in (("main", "Why?"), ("socratic", "How?")):
        (folder / config).mkdir(parents=True)
        rows = datasets.Dataset.from_list([{"question": question, "answer": "#### 3"}])
        rows.to_parquet(folder / config / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
        "- config_name: socratic\n  data_files:\n  - split: train\n    path: socratic/train-*\n"
        "---\n"
    )
    assert load_questions(f"gsm8k={folder}", split="all")[0].question == "Why?"
    assert load_questions(f"{folder}:config=socratic", split="all")[0].question == "How?"


@pytest.mark.parametrize("copy", ["/no/such/folder", "./no.txt"])
def test_a_copy_that_is_not_there_is_an_error(copy):
    with pytest.raises(QuestionError, match=f"'{copy}' is to be a copy of math500"):
        load_questions(f"math500={copy}")


@pytest.mark.parametrize("name", ["maths500=x.jsonl", "math-500=/tmp"])
def test_a_copy_of_a_set_that_nobody_knows_lists_those_there_are(name):
    with pytest.raises(UnknownNameError, match=r"expected one of orz-57k, .*, aime25"):
        load_questions(name)


@pytest.mark.parametrize("name", ["gsm9k", "GSM8K", "math500=", ""])
def test_an_unknown_name_lists_the_named_sets(name):
    with pytest.raises(UnknownNameError, match=r"'arithmetic'.* orz-57k, .*, aime25"):
        load_questions(name)


@pytest.mark.parametrize("option", ["levl=3", "size=3", "level="])
def test_a_bad_option_of_a_named_set_lists_the_good_ones(option):
    with pytest.raises(ConfigurationError, match=r"question, answer, id, level, .*split, config"):
        load_questions(f"math500:{option}")


class UnreachableError(Exception):
    """What some HTTP client raises."""


@pytest.fixture
def offline(hub, monkeypatch):
    def dataset_info(*args, timeout, **kwargs):
        assert timeout <= 30
        raise UnreachableError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return hub


def test_a_set_in_the_cache_is_read_where_the_hub_does_not_answer(offline):
    assert load_questions("math500", split="all")[0] == HUB_ROWS["math500"][1]
    assert offline == [("HuggingFaceH4/MATH-500", None, True)]
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("math500", "math500=MATH-500"),
        ("math500:level=3", "math500=MATH-500"),
        ("HuggingFaceH4/MATH-500:split=test", "./MATH-500"),
    ],
)
def test_offline_one_line_says_what_to_download_and_how_to_name_it(
    offline, monkeypatch, name, copy
):
    def load_dataset(*args):
        raise ConnectionError("Couldn't reach\nit")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(QuestionError) as caught:
        load_questions(name)
    message = str(caught.value)
    assert "(it does not answer: Name or service not known)" in message and "\n" not in message
    assert (
        "`hf download HuggingFaceH4/MATH-500 --repo-type dataset --local-dir MATH-500`" in message
    )
    assert message.endswith(f"name the copy: {copy}")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__  # no second trace
    assert datasets.config.HF_HUB_OFFLINE is False


def test_offline_mode_asks_the_hub_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: asked.append(args)
    )
    with pytest.raises(QuestionError, match=r"'openai/gsm8k' from the Hugging Face hub"):
        load_questions("openai/gsm8k:config=main,split=train")
    assert not asked
