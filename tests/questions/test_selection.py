from __future__ import annotations

import pytest

from lmrl_env.errors import ConfigurationError, QuestionError
from lmrl_env.prompts import QuestionStream
from lmrl_env.questions import load_questions

pytest_plugins = ("question_files",)

LEVELS = [1, "Level 2", 3.0, "3", "Level 5", "Level ?", None]
RATES = {"set/0": 0.0, "set/1": 0.875, "set/2": 0.125, "set/3": 0.5, "set/4": 1, "set/5": 0.5}


@pytest.fixture
def with_levels(write_jsonl):
    rows = [
        {"question": f"What is {i}?", "answer": i, "level": level} for i, level in enumerate(LEVELS)
    ]
    return write_jsonl(*rows)


@pytest.mark.parametrize(
    ("level", "kept"), [("3", [2, 3]), ("2-4", [1, 2, 3]), ("1-5", [0, 1, 2, 3, 4]), ("4-9", [4])]
)
def test_a_range_of_levels_is_kept_however_a_level_is_written(with_levels, level, kept):
    questions = load_questions(f"{with_levels}:level={level}", split="all")
    assert [question.id for question in questions] == [f"set/{i}" for i in kept]
    assert questions.report == (f"7 rows: 7 kept; {len(kept)} at level {level} (2 without a level)")


def test_a_level_that_no_row_has_is_an_error(with_levels, write_jsonl):
    with pytest.raises(QuestionError, match=r"nothing is left of .*; 0 at level 7"):
        load_questions(f"{with_levels}:level=7")
    path = write_jsonl({"question": "Why?", "answer": "1", "level": "hard"}, name="hard.jsonl")
    with pytest.raises(QuestionError, match="none of its rows has a number in a column 'level'"):
        load_questions(f"{path}:level=3")


@pytest.mark.parametrize("level", ["5-3", "three", "3-", "-3", "1-2-3", "nan"])
def test_a_range_that_is_none_is_refused(with_levels, level):
    with pytest.raises(ConfigurationError, match=f"level={level} .* expected a number, or a range"):
        load_questions(f"{with_levels}:level={level}")


@pytest.fixture
def measured(write_jsonl):
    """Return the name of a set of seven questions, six of which have a measured pass rate."""
    rates = write_jsonl(
        *({"id": key, "pass_rate": rate, "samples": 8} for key, rate in RATES.items()),
        name="rates.jsonl",
    )
    rows = ({"question": f"What is {i}?", "answer": i} for i in range(7))
    return f"{write_jsonl(*rows)}:pass_rates={rates}"


def test_a_band_keeps_the_questions_whose_pass_rate_is_in_it(measured):
    questions = load_questions(f"{measured},band=0.125-0.875", split="all")
    assert {question.id: question.extra["pass_rate"] for question in questions} == {
        "set/1": 0.875,
        "set/2": 0.125,
        "set/3": 0.5,
        "set/5": 0.5,
    }
    assert questions.report == (
        "7 rows: 7 kept; 4 with a pass rate of 0.125 to 0.875 (1 without a pass rate)"
    )
    assert not questions.parts[0].ordered


@pytest.mark.parametrize(
    ("order", "ids"), [("easy-first", [4, 1, 3, 5, 2, 0]), ("hard-first", [0, 2, 3, 5, 1, 4])]
)
def test_an_order_is_by_pass_rate_in_every_epoch(measured, order, ids):
    questions = load_questions(f"{measured},order={order}", split="all")
    assert [question.id for question in questions] == [f"set/{i}" for i in ids]
    assert questions.report.endswith(
        f"6 with a pass rate of 0 to 1, {order.replace('-', ' ')} (1 without a pass rate)"
    )
    stream = QuestionStream(questions.parts)
    asked = [stream.question_id(7, position) for position in range(12)]
    assert asked == [*range(6), *range(6)]


def test_a_split_of_an_ordered_set_stays_in_order(measured):
    train = load_questions(f"{measured},order=hard-first", split="train")
    rates = [question.extra["pass_rate"] for question in train]
    assert rates == sorted(rates) and train.parts[0].ordered


def test_a_curriculum_leaves_what_is_held_out_as_it_is(write_jsonl):
    rows = [{"question": f"What is {i}?", "answer": i} for i in range(80)]
    path = write_jsonl(*rows)
    rates = ({"id": f"set/{i}", "pass_rate": i / 80} for i in range(80))
    name = f"{path}:pass_rates={write_jsonl(*rates, name='rates.jsonl')},band=0.4-0.6"
    heldout, train = load_questions(name, split="heldout"), load_questions(name, split="train")
    assert list(heldout) == list(load_questions(path, split="heldout"))
    banded = [q.id for q in load_questions(path, split="train") if 32 <= int(q.answer) <= 48]
    assert [question.id for question in train] == banded


def test_arithmetic_has_a_curriculum_too(write_jsonl):
    path = write_jsonl(*({"id": f"arithmetic/train/{i}", "pass_rate": i / 10} for i in range(10)))
    name = f"arithmetic:size=10,pass_rates={path},band=0.3-0.5,order=easy-first"
    assert [q.id for q in load_questions(name)] == [f"arithmetic/train/{i}" for i in (5, 4, 3)]
    assert len(load_questions(name, split="heldout")) == 10


def test_the_samples_of_an_evaluation_are_pass_rates(write_jsonl):
    statuses = {0: ["correct", "wrong"], 1: ["correct"] * 2, 2: ["truncated", "timeout"]}
    samples = [
        {"question_id": f"arithmetic/train/{i}", "status": status, "model": "m", "set": "s"}
        for i, of_question in statuses.items()
        for status in of_question
    ]
    name = f"arithmetic:size=10,pass_rates={write_jsonl(*samples)},order=hard-first"
    assert [question.extra["pass_rate"] for question in load_questions(name)] == [0, 0.5, 1]
    path = write_jsonl(*samples, samples[0] | {"model": "other"})
    with pytest.raises(QuestionError, match=r"\('m', 's'\) and \('other', 's'\): expected one"):
        load_questions(f"arithmetic:size=10,pass_rates={path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("band=0.5", "expected pass_rates=FILE too"),
        ("order=easy-first", "expected pass_rates=FILE too"),
        ("pass_rates={},order=random", r"order=random .* expected one of \('easy-first'"),
        ("pass_rates={},band=0.8-0.2", "band=0.8-0.2 .* expected a number, or a range"),
    ],
)
def test_a_curriculum_that_cannot_be_meant_is_refused(write_jsonl, options, message):
    path = write_jsonl({"id": "arithmetic/train/0", "pass_rate": 0.5})
    with pytest.raises(ConfigurationError, match=message):
        load_questions(f"arithmetic:size=9,{options.format(path)}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "x", "pass_rate": 0.5}], "like 'x', expected ids like 'arithmetic/train/0'"),
        ([{"id": "arithmetic/train/0"}], "'pass_rate', a number from 0 to 1"),
        ([{"pass_rate": 0.5}], "expected 'id', another in every row"),
        ([{"id": "x", "pass_rate": 12}], "'pass_rate', a number from 0 to 1"),
        ([{"id": "x", "pass_rate": float("nan")}], "'pass_rate', a number from 0 to 1"),
        ([{"id": "x", "pass_rate": 0}] * 2, "expected 'id', another in every row"),
        (["cut"], "has 1 broken lines"),
    ],
)
def test_a_file_of_pass_rates_that_cannot_be_used_is_an_error(write_jsonl, rows, message):
    with pytest.raises(QuestionError, match=message):
        load_questions(f"arithmetic:size=9,pass_rates={write_jsonl(*rows)}")
