from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.questions import load_questions, overlap, warn_of_overlap
from lmrl_env.types import Question

pytest_plugins = ("question_files",)

NUMBERS = [{"question": f"What is {i}  plus 1?", "answer": i + 1} for i in range(30)]


def shared(train: tuple, evaluation: tuple) -> bool:
    """Return whether two pairs of a text and its answer are found to be one question."""
    found = overlap([Question("train/0", *train)], [Question("test/0", *evaluation)])
    assert found in ([], [("test/0", "train/0")])
    return bool(found)


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        (("Why?", "1"), ("Why?", "1")),
        (("  why ?".upper(), "1"), ("WHY\n?", "2")),
        (("What is\n\n 1 + 1? ", "2"), (" what is 1 + 1?", "two")),
        (("Find $x$ if $2x = 6$.", "3"), ("Find x if \\(2 x=6\\)", "$3$")),
        (("Compute $\\frac12 - 1$.", "$-\\frac{1}{2}$"), ("Compute \\frac{1}{2}-1", "-\\frac12")),
        (("Name it.", ("one", "1")), ("Name it!", ("1", "I"))),
        (("Σ = 1?", "1"), ("σ = 1", "1")),
    ],
)
def test_the_same_question_is_found_however_it_is_typeset(train, evaluation):
    assert shared(train, evaluation)


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        (("What is 3 + 5?", "8"), ("What is 3 * 5?", "15")),
        (("What is 3 - 5?", "-2"), ("What is -3 + 5?", "2")),
        (("What is 1.5 * 2?", "3.0"), ("What is 15 * 2?", "30")),
        (("What is the sine of x?", "1"), ("What is the cosine of x?", "1")),
        (("+?", "1"), ("-?", "1")),
    ],
)
def test_variants_of_a_question_are_not_found(train, evaluation):
    assert not shared(train, evaluation)


def test_of_several_copies_in_training_the_first_is_named():
    train = [Question(f"train/{i}", text, "1") for i, text in enumerate(("How?", "Why?", "WHY?"))]
    asked = [Question("test/0", "Why?", "1"), Question("test/1", "When?", "1")]
    assert overlap(train, asked) == [("test/0", "train/1")]


@given(st.lists(st.tuples(st.text(max_size=4), st.sampled_from("123")), max_size=12), st.data())
@settings(max_examples=100)
def test_what_is_found_is_found_in_any_order_and_names_real_questions(rows, data):
    questions = [Question(str(i), *row) for i, row in enumerate(rows)]
    cut = data.draw(st.integers(0, len(questions)))
    train, evaluation = questions[:cut], questions[cut:]
    found = overlap(train, evaluation)
    assert {theirs for theirs, _ in found} <= {question.id for question in evaluation}
    assert {ours for _, ours in found} <= {question.id for question in train}
    assert {theirs for theirs, _ in overlap(train[::-1], evaluation)} == {pair[0] for pair in found}
    assert len(overlap(questions, questions)) == len(questions)


def test_a_training_copy_that_holds_the_test_set_is_told_loudly(write_jsonl, caplog):
    """As of a copy of GSM8K whose 8,792 rows are its 7,473 training and 1,319 test questions."""
    train, test = NUMBERS[:20], NUMBERS[20:]
    copied = [{**row, "question": row["question"].replace("  ", " ")} for row in test]
    gsm8k = load_questions(f"gsm8k={write_jsonl(*train, *copied, name='all.jsonl')}", split="all")
    evaluation = load_questions(write_jsonl(*test, name="test.jsonl"), split="all")
    warning = warn_of_overlap(gsm8k, evaluation)
    assert warning == (
        f"10 of the 10 questions of {evaluation.name!r} are in the training set {gsm8k.name!r}, so "
        "an accuracy there measures memory: test/0 is gsm8k/20, test/1 is gsm8k/21, "
        "test/2 is gsm8k/22, test/3 is gsm8k/23, test/4 is gsm8k/24, ..."
    )
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", warning)
    ]


def test_sets_that_share_nothing_give_no_warning(write_jsonl, caplog):
    train = load_questions(write_jsonl(*NUMBERS[:20], name="train.jsonl"), split="all")
    test = load_questions(write_jsonl(*NUMBERS[20:], name="test.jsonl"), split="all")
    assert warn_of_overlap(train, test) == "" and not caplog.records


@pytest.mark.parametrize("name", ["arithmetic:size=2000", "arithmetic:level=2,size=500"])
def test_a_set_shares_nothing_with_what_it_holds_out(name, write_jsonl):
    for source in (name, write_jsonl(*NUMBERS)):
        train, heldout = (load_questions(source, split=split) for split in ("train", "heldout"))
        assert overlap(train, heldout) == []
