"""Responses made to break, stop or deceive a grader: a part of them.

``benchmarks/bench_hostile.py`` has them all.
"""

import time
from collections import Counter
from pathlib import Path

import pytest
from hostile import CANARY, GENERATORS, any_verifier, hostile_items
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.grading import Grader
from lmrl_env.quantities import plain_number, split_unit
from lmrl_env.verifiers import extraction, verdict_at_once
from lmrl_env.verifiers.texts import choice

TIMEOUT = 0.5
ITEMS = list(hostile_items(seed=2, count=13 * len(GENERATORS), size=200_000))


@pytest.fixture(scope="module")
def grader():
    with Grader(any_verifier, timeout=TIMEOUT, memory_limit=2 * 2**30) as grader:
        yield grader


def test_hostile_responses_neither_stop_nor_deceive_the_grader(grader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verdicts = grader.grade(*zip(*((i.response, i.gold, i.row) for i in ITEMS), strict=True))
    deceived = [
        (item.kind, item.row.extra["verifier"], item.response[:200])
        for item, verdict in zip(ITEMS, verdicts, strict=True)
        if verdict.status == "correct" or verdict.score
    ]
    assert deceived == []
    assert {item.kind for item in ITEMS} > {generate.__name__ for generate in GENERATORS}
    statuses = Counter(verdict.status for verdict in verdicts)
    assert statuses["crash"] + statuses["timeout"] < len(ITEMS) / 5
    assert grader.counts == statuses
    assert all(worker.alive for worker in grader._pool)
    assert not list(Path().rglob(CANARY))


def test_a_look_takes_time_in_proportion_to_the_response():
    start = time.process_time()
    for item in ITEMS:
        for name in ("boxed_math", "answer_tag_math", "math_answer", "last_number"):
            verdict = verdict_at_once(f"lmrl_env.verifiers:{name}", item.response, item.gold)
            assert verdict is None or verdict.status in ("wrong", "unparseable")
    assert time.process_time() - start < 15


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *("<answer>", "</answer>", "</think>", r"\boxed{", "{", "}", r"\{", "####", "```"),
                *("```python\n", "\n", " ", "-", "$", r"\$", "%", ",", ".", "/", r"\frac", "^"),
                *("1", "23", "1,000", "0.5", "A", "(B)", "and", "answer is", "cm", " m/s", "_2"),
                *(r"\text{", r"^\circ", r"\overline{", "=", "x", "−", "٣", "e5", "\0", "\u202e"),
            ]
        ),
        st.text(max_size=3),
    ),
    max_size=15,
).map("".join)


@settings(max_examples=300)
@given(PIECES)
def test_what_is_extracted_is_a_part_of_the_response(text):
    for extract in (extraction.last_tag, extraction.last_box, extraction.marked_answer):
        found = extract(text)
        assert found is None or found in text
    number = extraction.last_number_in(text)
    assert number is None or set(number) <= set(text)
    block = extraction.last_code_block(text)
    assert block is None or block in f"{text}\n"
    assert extraction.after_thinking(text) in text


@settings(max_examples=300)
@given(PIECES, st.booleans())
def test_a_number_and_its_unit_are_parts_of_the_answer(text, letters):
    number, unit = split_unit(text, letters=letters)
    assert number in text
    assert all(power for _, power in unit)
    value = plain_number(text)
    assert value is None or abs(value) <= 10**1300


@settings(max_examples=200)
@given(PIECES)
def test_letters_of_a_choice_are_sorted_letters(text):
    verdict = choice(text, "B")
    assert (verdict.status == "unparseable") or verdict.extracted in (
        ", ".join(sorted(set(verdict.extracted.split(", ")))),
    )
    assert (verdict.status == "correct") == (verdict.extracted == "B" and verdict.score == 1)
