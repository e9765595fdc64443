from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.errors import ConfigurationError
from lmrl_env.prompts import PromptTable, QuestionStream
from lmrl_env.questions import Part, load_questions
from lmrl_env.questions.question_set import QuestionSet
from lmrl_env.templates import get_template
from lmrl_env.types import Question

pytest_plugins = ("question_files",)

SEEDS = st.integers(0, 2**31)


def make_parts(sizes, shares, ordered=False) -> list[Part]:
    starts = np.cumsum([0, *sizes])
    return [
        Part(np.arange(start, start + size), share, ordered)
        for start, size, share in zip(starts, sizes, shares, strict=False)
    ]


@st.composite
def parts_of_mixtures(draw) -> list[Part]:
    weights = draw(st.lists(st.integers(1, 50), min_size=2, max_size=5))
    sizes = draw(st.lists(st.integers(1, 30), min_size=len(weights), max_size=len(weights)))
    return make_parts(sizes, [weight / sum(weights) for weight in weights])


def draws_by_part(parts, seed, positions) -> list[list[int]]:
    stream = QuestionStream(parts)
    drawn = [stream.question_id(seed, position) for position in positions]
    return [[i for i in drawn if i in set(part.indices.tolist())] for part in parts]


@given(parts_of_mixtures(), SEEDS, st.integers(0, 3000), st.integers(1, 200))
@settings(max_examples=60)
def test_any_run_of_draws_has_its_share_of_every_part(parts, seed, start, length):
    drawn = draws_by_part(parts, seed, range(start, start + length))
    assert sum(map(len, drawn)) == length
    for part, ids in zip(parts, drawn, strict=True):
        # A share is rounded to a thousandth at most, and a run cuts the pattern at two ends.
        assert abs(len(ids) - part.share * length) <= 0.001 * length + len(parts)


@given(parts_of_mixtures(), SEEDS)
@settings(max_examples=30)
def test_a_part_of_a_mixture_is_asked_whole_before_a_question_of_it_repeats(parts, seed):
    for part, ids in zip(parts, draws_by_part(parts, seed, range(2000)), strict=True):
        size = len(part.indices)
        for epoch in range(len(ids) // size):
            assert sorted(ids[epoch * size : (epoch + 1) * size]) == part.indices.tolist()


@given(parts_of_mixtures(), SEEDS, st.lists(st.integers(0, 5000), max_size=20))
@settings(max_examples=30)
def test_a_question_depends_on_seed_and_position_alone(parts, seed, positions):
    used = QuestionStream(parts)
    for position in positions:
        fresh = QuestionStream(parts).question_id(seed, position)
        assert used.question_id(seed, position) == fresh


@given(st.integers(1, 50), SEEDS)
@settings(max_examples=30)
def test_a_set_of_one_part_is_shuffled_epoch_by_epoch(size, seed):
    stream = QuestionStream(size)
    asked = [stream.question_id(seed, position) for position in range(3 * size)]
    shuffles = [np.random.default_rng((seed, epoch)).permutation(size) for epoch in range(3)]
    assert asked == np.concatenate(shuffles).tolist()


def test_two_epochs_and_two_seeds_are_asked_in_different_orders():
    stream = QuestionStream(make_parts([30, 30], [0.5, 0.5]))
    first, second = ([stream.question_id(0, i) for i in range(k, k + 60)] for k in (0, 60))
    other = [stream.question_id(1, i) for i in range(60)]
    assert sorted(first) == sorted(second) == sorted(other) == list(range(60))
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_an_ordered_part_is_asked_in_its_order_in_every_epoch():
    parts = [Part(np.array([4, 0, 3]), 0.5, ordered=True), Part(np.array([1, 2]), 0.5)]
    for seed in (0, 1):
        assert draws_by_part(parts, seed, range(12))[0] == [4, 0, 3, 4, 0, 3]


def test_three_quarters_and_a_quarter_take_turns_evenly():
    stream = QuestionStream(make_parts([1, 1], [0.75, 0.25]))
    assert [stream.question_id(0, i) for i in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_a_tiny_share_is_a_draw_in_a_thousand():
    stream = QuestionStream(make_parts([1, 1, 1], [0.0002, 0.0003, 0.9995]))
    drawn = [stream.question_id(0, i) for i in range(2000)]
    assert (drawn.count(0), drawn.count(1)) == (2, 2)


def test_a_mixture_holds_its_sets_one_after_the_other_with_their_shares(write_jsonl):
    path = write_jsonl(*({"question": f"What is {i}?", "answer": i} for i in range(5)))
    name = f"{path}:question=question:3,arithmetic:level=1,size=4:1"
    questions = load_questions(name, split="all")
    assert [question.id for question in questions] == [
        *(f"set/{i}" for i in range(5)),
        *(f"arithmetic/train/{i}" for i in range(4)),
        *(f"arithmetic/heldout/{i}" for i in range(4)),
    ]
    assert questions.name == name
    assert [(part.indices.tolist(), part.share) for part in questions.parts] == [
        ([0, 1, 2, 3, 4], 0.75),
        ([5, 6, 7, 8, 9, 10, 11, 12], 0.25),
    ]
    assert questions.report == (
        f"75.0% {path}:question=question: 5 rows: 5 kept | "
        "25.0% arithmetic:level=1,size=4: 8 questions made, all kept"
    )


def test_every_set_of_a_mixture_is_split_as_it_would_be_alone(write_jsonl):
    path = write_jsonl(*({"question": f"What is {i}?", "answer": i} for i in range(50)))
    for split in ("train", "heldout"):
        mixture = load_questions(f"{path}:0.5,arithmetic:size=9:0.5", split=split)
        alone = load_questions(path, split=split), load_questions("arithmetic:size=9", split=split)
        assert list(mixture) == [*alone[0], *alone[1]]


@pytest.mark.parametrize(
    "name",
    [
        "arithmetic:0.5",
        "arithmetic:0.5,",
        "arithmetic:0.5,asdiv",
        "asdiv,arithmetic:0.5",
        "asdiv:0.5,arithmetic:0.5,amc",
        "asdiv:0.5,arithmetic:0.5,",
        "arithmetic:1,asdiv:0",
        "arithmetic:0,asdiv:0",
        "arithmetic:1000,asdiv:0.5",
        "arithmetic:0.5,:0.5",
        "arithmetic:-1,asdiv:2",
    ],
)
def test_a_mixture_with_a_bad_weight_is_refused_before_anything_is_loaded(name):
    with pytest.raises(ConfigurationError, match=r"is no mixture: .*'gsm8k:0\.7,asdiv:0\.3'"):
        load_questions(name)


def mixture_of_ids(sizes, shares) -> QuestionSet:
    questions = [Question(str(i), f"What is {i}?", str(i)) for i in range(sum(sizes))]
    return QuestionSet("mixture", questions, "", make_parts(sizes, shares))


@given(st.lists(st.integers(0, 8), max_size=12))
@settings(max_examples=50)
def test_a_subset_keeps_every_question_in_its_part(indices):
    subset = mixture_of_ids([3, 4, 2], [0.5, 0.3, 0.2]).subset(indices)
    assert [question.id for question in subset] == [str(i) for i in indices]
    of_part = [[i for i in indices if i in part] for part in (range(3), range(3, 7), range(7, 9))]
    left = [(ids, share) for ids, share in zip(of_part, (0.5, 0.3, 0.2), strict=True) if ids]
    assert [[int(subset[i].id) for i in part.indices] for part in subset.parts] == [
        ids for ids, _ in left
    ]
    total = sum(share for _, share in left)
    assert [part.share for part in subset.parts] == pytest.approx([s / total for _, s in left])


def test_questions_that_do_not_fit_leave_the_shares_of_the_others_as_they_are(tokenizer):
    questions = mixture_of_ids([2, 2], [0.25, 0.75])
    long = [questions[0]._replace(question="What is it? " * 50), *questions[1:]]
    mixture = QuestionSet("mixture", long, "", questions.parts)
    table = PromptTable(mixture, get_template("none"), tokenizer, tokenizer.context_length - 50)
    assert table.dropped == 1
    assert [(part.indices.tolist(), part.share) for part in table.questions.parts] == [
        ([0], 0.25),
        ([1, 2], 0.75),
    ]
