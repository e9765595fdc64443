from __future__ import annotations

import json
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmrl_env.errors import ConfigurationError, QuestionError, UnknownNameError
from lmrl_env.questions import load_questions
from lmrl_env.questions.question_set import in_split
from lmrl_env.types import Question

pytest_plugins = ("question_files",)

ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]


@pytest.mark.parametrize("name", ["set.jsonl", "set.jsonl.gz"])
def test_rows_become_questions_in_order(write_jsonl, name):
    path = write_jsonl(
        {"id": "a/7", "question": "One?", "answer": "1", "level": 3},
        {"question": "Two?", "answer": "2"},
        name=name,
    )
    questions = load_questions(path, split="all")
    assert list(questions) == [
        Question("a/7", "One?", "1", {"level": 3}),
        Question("set/1", "Two?", "2"),
    ]
    assert (questions.name, questions.report) == (path, "2 rows: 2 kept")


def test_broken_lines_are_named_by_their_number(write_jsonl):
    path = write_jsonl(ROWS[0], '{"question": "cut', "", "[1, 2]", ROWS[1])
    questions = load_questions(path, split="all")
    assert questions.report == "4 rows: 2 kept; 2 broken lines (line 2, line 4)"


def test_rows_without_a_usable_question_or_answer_are_counted_and_named(write_jsonl, caplog):
    path = write_jsonl(
        {"question": "Kept?", "answer": "0"},
        {"question": "Empty?", "answer": ""},
        {"question": "Blank?", "answer": " \n"},
        {"question": "Null?", "answer": None},
        {"question": "Absent?"},
        {"question": "Not a number?", "answer": float("nan")},
        {"question": "None?", "answer": "None"},
        {"question": "True?", "answer": True},
        {"question": "Nested?", "answer": {"value": 1}},
        {"question": " ", "answer": "1"},
        {"question": 5, "answer": "1"},
    )
    questions = load_questions(path, split="all")
    assert [question.question for question in questions] == ["Kept?"]
    assert questions.report == (
        "11 rows: 1 kept; 5 empty answers (set/1, set/2, set/3, ...), 1 answers 'None' (set/6), "
        "1 answers of type bool (set/7), 1 answers of type dict (set/8), "
        "2 empty questions (set/9, set/10)"
    )
    assert questions.report in caplog.text


def test_of_duplicates_the_first_is_kept_and_conflicts_are_told_apart(write_jsonl):
    path = write_jsonl(
        {"question": "What is  it?", "answer": "1"},
        {"question": " What\nis it? ", "answer": "1"},
        {"question": "What is it?", "answer": "2"},
    )
    questions = load_questions(path, split="all")
    assert [question.answer for question in questions] == ["1"]
    assert questions.report == (
        "3 rows: 1 kept; 1 duplicates (set/1), 1 duplicates with another answer (set/2)"
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (142.0, "142"),
        (-3, "-3"),
        (2.5, "2.5"),
        ("9.6\n", "9.6"),
        ("He has 2+3 = <<2+3=5>>5.\n#### 1,080", "1,080"),
        ("025", "025"),
        (["9.6\n"], "9.6"),
        (["a", "None", "b", "a"], ("a", "b")),
        ([2.0, None, 0.5], ("2", "0.5")),
        ("$\\frac{49}{3}$", "$\\frac{49}{3}$"),
    ],
)
def test_answers_are_told_as_text(write_jsonl, answer, text):
    path = write_jsonl({"question": "?", "answer": answer})
    assert load_questions(path, split="all")[0].answer == text


def test_a_column_of_answers_means_any_of_them(write_jsonl):
    path = write_jsonl({"question": "?", "answer": "1\n", "answers": ["1\n", "one"]})
    assert load_questions(path, split="all")[0].answer == ("1", "one")


def test_where_several_answers_are_wanted_a_list_is_all_of_them(write_jsonl):
    path = write_jsonl({"question": "?", "answer": ["1", "3\n"], "is_multiple_answer": True})
    assert load_questions(path, split="all")[0].answer == "1, 3"


def test_columns_can_be_nested(write_jsonl):
    path = write_jsonl({"chat": {"user": "Why?"}, "reward": {"gold": {"value": 4}}, "level": 2})
    name = f"{path}:question=chat.user,answer=reward.gold.value"
    [question] = load_questions(name, split="all")
    assert question == Question("set/0", "Why?", "4", {"level": 2})


def test_columns_can_have_other_names(write_jsonl):
    path = write_jsonl({"problem": "Why?", "gold": 4, "uid": "x9", "answers": ["5"]})
    [question] = load_questions(f"{path}:question=problem,answer=gold,id=uid", split="all")
    assert question == Question("x9", "Why?", "4", {"answers": ["5"]})


@pytest.mark.parametrize("option", ["answer=gold", "question=gold", "id=gold"])
def test_a_missing_column_is_named_with_those_there_are(write_jsonl, option):
    path = write_jsonl({"question": "?", "answer": "1", "level": 2})
    with pytest.raises(QuestionError, match=r"'gold'.*\['answer', 'level', 'question'\]"):
        load_questions(f"{path}:{option}")


def test_a_file_without_a_usable_row_is_an_error_with_its_report(write_jsonl):
    path = write_jsonl({"question": "?", "answer": "None"})
    with pytest.raises(QuestionError, match="1 answers 'None'"):
        load_questions(path)


def test_a_missing_file_and_a_damaged_archive_are_errors(tmp_path, write_jsonl):
    with pytest.raises(QuestionError, match=r"no\.jsonl.*No such file"):
        load_questions(str(tmp_path / "no.jsonl"))
    path = write_jsonl(*ROWS, name="cut.jsonl.gz")
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(whole[: len(whole) // 2])
    with pytest.raises(QuestionError, match=r"cut\.jsonl\.gz"):
        load_questions(path)


@pytest.mark.parametrize("name", ["arithmetics", "no/such/folder", "./nothing", "data.csv"])
def test_an_unknown_name_tells_what_can_be_named(name):
    with pytest.raises(UnknownNameError, match=r"'arithmetic', a \.jsonl"):
        load_questions(name)


@pytest.mark.parametrize(
    ("options", "known"),
    [("arithmetic:levle=2", "level, size, seed"), ("x.jsonl:split=train", "question, answer, id")],
)
def test_an_unknown_key_lists_the_known_ones(options, known):
    with pytest.raises(ConfigurationError, match=known):
        load_questions(options)


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ConfigurationError, match="two"):
        load_questions("arithmetic:level=two")


def test_an_unknown_split_is_refused(write_jsonl):
    with pytest.raises(ConfigurationError, match="'test'"):
        load_questions(write_jsonl(*ROWS), split="test")


def test_arithmetic_has_its_own_splits():
    train, heldout, both = (
        load_questions("arithmetic:level=1,size=30,seed=1", split=split)
        for split in ("train", "heldout", "all")
    )
    assert len(train) == len(heldout) == 30
    assert [*train, *heldout] == list(both)
    assert {question.extra["level"] for question in both} == {1}


@given(st.lists(st.text(min_size=1), unique_by=lambda text: " ".join(text.split()), min_size=2))
def test_train_and_heldout_are_a_partition_that_ignores_order_and_white_space(texts):
    questions = [Question(str(i), text, "1") for i, text in enumerate(texts)]
    heldout = in_split(questions, "heldout")
    held_out_texts = {" ".join(question.question.split()) for question in heldout}
    again = [question._replace(question=f" {question.question}\n") for question in questions[::-1]]
    assert {" ".join(q.question.split()) for q in in_split(again, "heldout")} == held_out_texts
    if len(heldout) < len(questions):
        train = in_split(questions, "train")
        assert sorted(train + heldout) == sorted(in_split(questions, "all")) == sorted(questions)


def test_about_a_tenth_is_held_out():
    questions = [Question(str(i), f"What is {i}?", "1") for i in range(4000)]
    assert 320 <= len(in_split(questions, "heldout")) <= 480  # 400, and 4 standard deviations


def test_an_empty_split_is_an_error():
    with pytest.raises(QuestionError, match="split='all'"):
        in_split([], "train")


def test_a_json_file_is_an_array_of_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([["Why?", {"value": 4}], {"0": "How?", "1": {"value": 5}}, 6]))
    questions = load_questions(f"{path}:question=0,answer=1.value", split="all")
    assert [(q.id, q.question, q.answer) for q in questions] == [
        ("rows/0", "Why?", "4"),
        ("rows/1", "How?", "5"),
    ]
    assert questions.report == "3 rows: 2 kept; 1 items that are no row (item 2)"


def test_a_parquet_file_is_read(tmp_path):
    rows = datasets.Dataset.from_list([{"question": "Why?", "answer": ["4", "four"]}])
    rows.to_parquet(tmp_path / "rows.parquet")
    questions = load_questions(str(tmp_path / "rows.parquet"), split="all")
    assert list(questions) == [Question("rows/0", "Why?", ("4", "four"))]


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
@pytest.mark.parametrize("content", ["", "{}", "\\x00["])
def test_a_damaged_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(QuestionError, match=f"cannot read the question set .*{name}"):
        load_questions(str(tmp_path / name))


def test_the_report_says_how_many_a_split_has(write_jsonl):
    path = write_jsonl(*ROWS)
    train, heldout = (load_questions(path, split=split) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 40
    assert train.report == f"40 rows: 40 kept; {len(train)} in 'train'"
    assert heldout.report == f"40 rows: 40 kept; {len(heldout)} in 'heldout'"


def save_one_split(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    return str(folder)


def save_two_splits(folder):
    splits = {"train": datasets.Dataset.from_list(ROWS)}
    splits["test"] = datasets.Dataset.from_list(ROWS[:2])
    datasets.DatasetDict(splits).save_to_disk(folder)
    return f"{folder}:split=train"


def save_parquet(folder):
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return str(folder)


def save_jsonl_files(folder):
    folder.mkdir()
    for name, rows in (("train", ROWS), ("test", ROWS[:2])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"{folder}:split=train,question=question"


@pytest.mark.parametrize("save", [save_one_split, save_two_splits, save_parquet, save_jsonl_files])
def test_folders_of_datasets_are_read(tmp_path, save):
    questions = load_questions(save(tmp_path / "folder"), split="all")
    assert [question.question for question in questions] == [row["question"] for row in ROWS]
    assert questions[3] == Question("folder/3", "What is 3 + 1?", "4")


@pytest.mark.parametrize("option", ["", ":split=validation"])
def test_of_several_splits_one_must_be_named(tmp_path, option):
    path = save_two_splits(tmp_path / "folder").partition(":")[0]
    with pytest.raises(QuestionError, match=r"\['test', 'train'\]"):
        load_questions(path + option)


def test_a_folder_that_datasets_cannot_read_is_an_error(tmp_path):
    with pytest.raises(QuestionError, match="cannot read the folder"):
        load_questions(str(tmp_path))


def test_a_question_set_is_an_immutable_sequence(write_jsonl):
    questions = load_questions(write_jsonl(*ROWS), split="all")
    assert len(questions) == 40 and questions[-1].answer == "40"
    assert [q.answer for q in questions.subset(np.array([5, 2]))] == ["6", "3"]
    assert [q.answer for q in questions[:2]] == ["1", "2"]
    assert questions[:2].name == questions.name
    with pytest.raises(TypeError):
        questions[0] = questions[1]


def test_importing_questions_imports_nothing_heavy():
    code = "import sys, lmrl_env.questions; print({'torch', 'vllm', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize(
    ("text", "reason"), [("", "it is empty"), ("{\n[]\n", "2 broken lines (line 1, line 2)")]
)
def test_a_file_without_rows_says_why(tmp_path, text, reason):
    path = tmp_path / "none.jsonl"
    path.write_text(text)
    with pytest.raises(QuestionError, match=re.escape(f"holds no rows ({reason}): expected")):
        load_questions(str(path))
