import itertools
import operator
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.errors import ConfigurationError
from lmrl_env.questions.arithmetic import (
    LARGEST,
    SMALLEST,
    Problem,
    Step,
    arithmetic_questions,
    problems,
    split_of,
)

SPLITS = st.sampled_from(["train", "heldout"])
LEVELS = st.sampled_from([1, 2, 3])
SEEDS = st.integers(0, 2**32)

APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def take(n: int, split: str, **kwargs: object) -> list[Problem]:
    return list(itertools.islice(problems(split, **kwargs), n))


def expression(problem: Problem) -> str:
    """The left-nested expression, written independently of the module's own key."""
    text = str(problem.steps[0].left)
    for step in problem.steps:
        text = f"({text}{step.operator}{step.right})"
    return text


@given(split=SPLITS, level=LEVELS, seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_problem_has_as_many_steps_as_its_level(split, level, seed):
    assert {len(problem.steps) for problem in take(20, split, level=level, seed=seed)} == {level}


@given(split=SPLITS, seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_answer_is_what_the_steps_evaluate_to(split, seed):
    for problem in take(50, split, seed=seed):
        value = problem.steps[0].left
        for step in problem.steps:
            assert step.left == value
            value = APPLY[step.operator](value, step.right)
            assert step.result == value
        assert problem.answer == value == int(value)


@given(split=SPLITS, seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_all_numbers_stay_within_two_digits(split, seed):
    for problem in take(50, split, seed=seed):
        for step in problem.steps:
            assert min(step.left, step.right, step.result) >= SMALLEST
            assert max(step.left, step.right, step.result) <= LARGEST


@given(split=SPLITS, seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_story_tells_every_number_once(split, seed):
    for problem in take(50, split, seed=seed):
        told = re.sub(r"only 1/", "only ", problem.question)  # "1/4 of that" divides by 4
        numbers = sorted(int(number) for number in re.findall(r"\d+", told))
        used = [problem.steps[0].left, *(step.right for step in problem.steps)]
        assert numbers == sorted(used), problem.question


def test_a_story_is_complete_and_ends_in_a_question():
    for problem in take(2000, "train"):
        assert "{" not in problem.question
        assert problem.question.endswith("?")


@given(seeds=st.tuples(SEEDS, SEEDS), level=st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=10, deadline=None)
def test_no_expression_is_in_both_splits(seeds, level):
    train = {expression(p) for p in take(300, "train", level=level, seed=seeds[0])}
    heldout = {expression(p) for p in take(300, "heldout", level=level, seed=seeds[1])}
    assert not train & heldout


@given(left=st.integers(2, 99), right=st.integers(2, 99), sign=st.sampled_from("+*"))
@settings(max_examples=50, deadline=None)
def test_a_sum_and_its_mirror_image_are_in_the_same_split(left, right, sign):
    assert split_of((Step(left, sign, right, 0),)) == split_of((Step(right, sign, left, 0),))


def test_the_split_of_an_expression_never_changes():
    # The shipped model was trained on one of the splits. `zlib.crc32` of these texts, modulo 5:
    # 9+7 is looked up as 7+9: 4145045350, 0. 30-5*2: 1162453270, 0. 12+30: 3874204316, 1.
    # 14/2*3: 624969797, 2.
    assert split_of((Step(9, "+", 7, 16),)) == "heldout"
    assert split_of((Step(30, "-", 5, 25), Step(25, "*", 2, 50))) == "heldout"
    assert split_of((Step(12, "+", 30, 42),)) == "train"
    assert split_of((Step(14, "/", 2, 7), Step(7, "*", 3, 21))) == "train"


def test_about_one_expression_in_five_is_held_out():
    splits = [split_of((Step(a, "-", b, 0),)) for a in range(1, 100) for b in range(1, 100)]
    assert 0.18 < splits.count("heldout") / len(splits) < 0.22


@given(split=SPLITS, level=st.sampled_from([None, 1, 2, 3]), seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_the_same_seed_gives_the_same_set_and_another_seed_another(split, level, seed):
    first = arithmetic_questions(split, level=level, size=30, seed=seed)
    assert first == arithmetic_questions(split, level=level, size=30, seed=seed)
    assert first != arithmetic_questions(split, level=level, size=30, seed=seed + 1)


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    assert arithmetic_questions("train", size=50) == arithmetic_questions("train", size=80)[:50]


def test_ids_count_up_and_questions_do_not_repeat():
    questions = arithmetic_questions("heldout", level=1, size=3000)
    assert [q.id for q in questions] == [f"arithmetic/heldout/{i}" for i in range(3000)]
    assert len({q.question for q in questions}) == 3000


def test_levels_are_mixed_evenly_and_told_in_extra():
    levels = [q.extra["level"] for q in arithmetic_questions("train", size=3000)]
    assert all(900 < levels.count(level) < 1100 for level in (1, 2, 3))  # 1000 +- 4 s.d. of 26


def test_answers_are_integer_texts_of_the_problems_in_order():
    questions = arithmetic_questions("train", size=20, seed=3)
    told = {p.question: p.answer for p in take(40, "train", seed=3)}
    assert all(q.answer == str(told[q.question]) for q in questions)


def test_the_set_has_many_thousands_of_expressions():
    assert len({expression(p) for p in take(6000, "heldout")}) > 3000


def test_ten_thousand_questions_take_about_a_second():
    start = time.perf_counter()
    assert len(arithmetic_questions("train", size=10_000)) == 10_000
    assert time.perf_counter() - start < 5  # 0.2 s on an idle core


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"split": "test"}, "'test'.*'train' or 'heldout'"),
        ({"split": "train", "level": 4}, "level 4.*1, 2, 3"),
        ({"split": "train", "size": 0}, "size=0.*at least 1"),
    ],
)
def test_a_wrong_argument_is_named(kwargs, told):
    with pytest.raises(ConfigurationError, match=told):
        arithmetic_questions(**kwargs)


def test_a_set_that_is_too_large_is_refused_instead_of_searched_for_ever(monkeypatch):
    monkeypatch.setattr(
        "lmrl_env.questions.arithmetic._tell", lambda rng, steps: str(steps[0].left)
    )
    with pytest.raises(ConfigurationError, match=r"size=200.*lower size"):
        arithmetic_questions("train", size=200)
