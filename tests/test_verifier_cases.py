"""Labelled cases: what each verifier must say of answers that a person has judged.

A case of ``verifier_cases.jsonl`` holds a prediction, the gold answer or answers, the right label,
its kind, and the verifier with its arguments (``math_equal`` where none is named). A near miss says
what is wrong with it. A case that says why it ``disagrees`` is one that the library gets wrong.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from lmrl_env.types import Question
from lmrl_env.verifiers import math_equal
from lmrl_env.verifiers.paths import load_verifier

LINES = (Path(__file__).parent / "verifier_cases.jsonl").read_text().splitlines()
CASES = [json.loads(line) for line in LINES]
KINDS = [
    *("integer", "thousands comma", "unit", "percentage", "fraction", "decimal", "expression"),
    *("equation", "set", "interval", "tuple", "matrix", "text", "multiple answers"),
    *("box", "tag", "tag or box", "last number", "numeric", "exact", "choice", "regex", "code"),
]


def verdict_on(case):
    prediction, gold = case["prediction"], case["gold"]
    if "verifier" not in case:
        return "correct" if math_equal(prediction, gold) else "wrong"
    row = Question("row", "?", gold, case["row"]) if "row" in case else None
    return load_verifier(case["verifier"])(prediction, gold, question=row).status


@pytest.mark.parametrize("kind", KINDS)
def test_the_verifiers_say_what_a_person_says(kind):
    disagreements = [
        f"{case['prediction']!r} for {case['gold']!r}: {verdict}, not {case['label']}"
        for case in CASES
        if case["kind"] == kind and (verdict := verdict_on(case)) != case["label"]
    ]
    assert disagreements == []


def test_the_known_disagreements_are_refusals_and_still_disagree():
    known = [case for case in CASES if "disagrees" in case]
    assert {case["kind"] for case in known} == {"known"}
    assert all(case["disagrees"] for case in known)
    assert {(verdict_on(case), case["label"]) for case in known} == {("wrong", "correct")}


def test_there_are_enough_cases_of_every_kind():
    labels = Counter((case["kind"], case["label"] == "correct") for case in CASES)
    assert set(KINDS) | {"known"} == {kind for kind, _ in labels}
    assert all(labels[kind, True] >= 2 and labels[kind, False] >= 2 for kind in KINDS)
    assert sum(labels.values()) >= 600
    assert len(set(LINES)) == len(LINES)
    misses = Counter(case.get("miss") for case in CASES if case["label"] != "correct")
    assert sum(misses.values()) >= 300
    assert min(misses[m] for m in ("sign", "factor", "unit", "digit", "order", "extra answer")) > 20
