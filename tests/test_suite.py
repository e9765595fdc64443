from __future__ import annotations

import importlib.util
import json
import os
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmrl_env.errors import ConfigurationError, ModelError, QuestionError, UnknownNameError
from lmrl_env.grading import Grader
from lmrl_env.policy import load_model
from lmrl_env.prompts import PromptTable
from lmrl_env.questions import load_questions
from lmrl_env.registration import make_engine
from lmrl_env.rollout import rollout
from lmrl_env.samples import Sample, grade, read_samples, to_line
from lmrl_env.suite import (
    EvalSettings,
    SuitePrompts,
    choose_template,
    load_suite,
    sample_suite,
    split_suite,
)
from lmrl_env.summary import compare, summarise
from lmrl_env.tables import markdown, summary_table
from lmrl_env.templates import NONE, R1
from lmrl_env.tokenizer import TINY_MODEL, load_tokenizer

BUDGET = 48


@pytest.fixture(scope="module")
def grader():
    with Grader("answer_tag_math", workers=1) as grader:
        yield grader


@pytest.fixture
def question_file(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(40)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw(suite, grader, *, n=2, temperature=1.0, seed=0, template=R1, engine="local"):
    prompts = SuitePrompts.of("tiny", template, suite, BUDGET)
    settings = EvalSettings(n, temperature, BUDGET, engine, seed=seed)
    return [sample for batch in sample_suite(prompts, settings, grader) for sample in batch]


# --- the sets of a suite


def test_commas_within_options_do_not_split_a_suite():
    assert split_suite("aime24") == ["aime24"]
    assert split_suite("gsm8k:config=main,split=test, math-12k=b.jsonl:level=3-5,amc") == [
        "gsm8k:config=main,split=test",
        "math-12k=b.jsonl:level=3-5",
        "amc",
    ]


def test_sets_are_labelled_without_the_place_of_their_copy(question_file):
    suite = load_suite(f"{question_file},amc={question_file},arithmetic:level=1,size=9")
    assert list(suite) == ["sums", "amc", "arithmetic:level=1,size=9"]
    assert [len(questions) for questions in suite.values()] == [40, 40, 9]


def test_a_set_that_is_named_twice_is_refused(question_file):
    with pytest.raises(ConfigurationError, match="would be called 'amc'"):
        load_suite(f"amc={question_file},amc={question_file}")


def test_arithmetic_is_evaluated_on_its_held_out_questions():
    (questions,) = load_suite("arithmetic:size=50").values()
    assert {q.question for q in questions} == {
        q.question for q in load_questions("arithmetic:size=50", split="heldout")
    }


def test_a_limit_chooses_the_same_questions_spread_over_the_set(question_file):
    (some,) = load_suite(str(question_file), limit=12).values()
    (again,) = load_suite(str(question_file), limit=12).values()
    ids = [int(question.id.rpartition("/")[2]) for question in some]
    assert [question.id for question in again] == [question.id for question in some]
    assert len(set(ids)) == 12 and ids == sorted(ids) and max(ids) > 20
    (all_of_them,) = load_suite(str(question_file), limit=99).values()
    assert len(all_of_them) == 40


# --- templates


@pytest.fixture
def chat_model(tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(TINY_MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_chat_is_the_models_own_template(chat_model):
    template = choose_template("chat", chat_model)
    assert template.render("1 + {question}?") == "<user>1 + {question}?</><assistant>"
    assert template.stop == () and template.answer_format == "either"


def test_a_model_without_a_chat_template_is_named():
    with pytest.raises(ModelError, match="'tiny' has no chat template"):
        choose_template("chat", "tiny")


def test_a_begin_token_that_the_tokenizer_adds_stands_once(chat_model, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.bos_token = "<user>"

    class AddsBegin:
        chat_template, bos_token, bos_token_id = tokenizer.chat_template, "<user>", 7
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text):
            return {"input_ids": [7]}

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: AddsBegin())
    monkeypatch.setattr("lmrl_env.suite.load_tokenizer", lambda model: None)
    assert choose_template("chat", chat_model).text == "{question}</><assistant>"


def test_a_chat_template_that_loses_the_question_is_refused(chat_model):
    from pathlib import Path

    path = Path(chat_model) / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": "Hello"}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not keep the user's message"):
        choose_template("chat", chat_model)


def test_a_file_is_a_template(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Q: {question}\nA:", encoding="utf-8")
    template = choose_template(str(path), "tiny")
    assert template.name == "short" and template.render("why?") == "Q: why?\nA:"


@pytest.mark.parametrize("text", ["Q:", "{question} {question}"])
def test_a_file_without_one_place_for_the_question_is_refused(tmp_path, text):
    path = tmp_path / "short.txt"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=f"{text.count('{question}')} times"):
        choose_template(str(path), "tiny")


def test_an_unknown_template_is_refused_by_name():
    with pytest.raises(UnknownNameError, match="'r2': expected one of none, qwen-math, r1, 'chat'"):
        choose_template("r2", "tiny")


# --- samples


@pytest.mark.parametrize(
    ("env_id", "template", "verifier"),
    [("MathR1-v0", R1, "answer_tag_math"), ("MathPlain-v0", NONE, "math_answer")],
    ids=["stop string", "EOS"],
)
def test_an_evaluation_pays_what_training_pays(env_id, template, verifier):
    suite = load_suite("arithmetic:size=24")
    with Grader(verifier, workers=1) as grader:
        samples = draw(suite, grader, n=3, template=template)
    envs = gym.make_vec(
        env_id, 72, model="tiny", engine="local", questions="arithmetic:size=24",
        split="heldout", group_size=3, max_new_tokens=BUDGET, tokens_per_step=BUDGET,
        autoreset_mode="Disabled",
    )  # fmt: skip
    batch = rollout(
        envs,
        envs.unwrapped.engine,
        question_ids=np.arange(24),
        seeds=np.array([sample.seed for sample in samples]),
        temperature=1.0,
    )
    assert [sample.response for sample in samples] == batch.responses
    assert [sample.status for sample in samples] == list(batch.verifier_status)
    assert [sample.score for sample in samples] == batch.rewards.tolist()
    assert [sample.tokens for sample in samples] == batch.response_lengths.tolist()
    assert {"correct", "wrong", "truncated"} <= {sample.status for sample in samples}


def test_a_sample_does_not_depend_on_how_many_are_drawn(grader):
    many = draw(load_suite("arithmetic:size=12"), grader, n=3)
    few = draw(load_suite("arithmetic:size=12", limit=5), grader, n=2)
    found = {(sample.question_id, sample.sample): sample for sample in many}
    assert [found[sample.question_id, sample.sample] for sample in few] == few
    other = draw(load_suite("arithmetic:size=12", limit=5), grader, n=2, seed=1)
    assert [s.response for s in other] != [s.response for s in few]


def test_samples_come_back_from_their_file_as_they_were(grader, tmp_path, question_file):
    samples = draw(load_suite(f"{question_file},arithmetic:size=3", limit=3), grader)
    samples[0] = samples[0]._replace(
        response="line\u2028separator\nand \x85 more", answer=["1", "2"]
    )
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(map(to_line, samples)), encoding="utf-8")
    assert read_samples(path) == samples


def test_regrading_with_the_same_verifier_changes_nothing(grader):
    samples = draw(load_suite("arithmetic:size=8"), grader)
    bare = [sample._replace(status=None, score=9.0, extracted="x") for sample in samples]
    assert grade(bare, grader) == samples


def test_a_truncated_response_is_not_graded_even_if_it_is_right(grader):
    right = Sample("1", "1 + 1?", "2", "so </think> <answer>2</answer>", "stop")
    cut = right._replace(finish_reason="length", status="correct", score=1.0)
    graded = grade([cut, right], grader)
    assert [(s.status, s.score, s.extracted) for s in graded] == [
        ("truncated", 0.0, None),
        ("correct", 1.0, "2"),
    ]


def test_any_gold_answer_of_several_counts_as_right(grader):
    sample = Sample("1", "1 + 1?", ["two", "2"], "so </think> <answer>2</answer>", "stop")
    assert grade([sample], grader)[0].status == "correct"


ROW = '{"question_id": "1", "question": "", "finish_reason": "stop", %s}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"question": "1 + 1?"}', r"samples.jsonl:1 is no sample .* at least answer, finish_rea"),
        ("[]", "is no sample"),
        ("{", "is no sample"),
        (
            '{"question_id": 1, "question": "", "answer": "", "response": "", "finish_reason": 3}',
            "finish_reason 3",
        ),
        (ROW % '"answer": 4, "response": ""', "samples.jsonl:1 has answer 4: expected a text or a"),
        (ROW % '"answer": [4], "response": ""', r"has answer \[4\]: expected a text or a list"),
        (ROW % '"answer": [], "response": ""', r"has answer \[\]: expected a text or a list"),
        (ROW % '"answer": "4", "response": null', "has response None: expected text"),
        (ROW % '"answer": "4", "response": "", "extra": "x"', "has extra 'x': expected an object"),
        (ROW % '"answer": "4", "response": "", "tokens": "x"', "has tokens 'x': expected a whole"),
        (ROW % '"answer": "4", "response": "", "score": "x"', "has score 'x': expected a number"),
        (ROW % '"answer": "4", "response": "", "status": "x"', "has status 'x': expected one of"),
    ],
)
def test_a_file_that_holds_no_samples_is_refused(tmp_path, text, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(text)
    with pytest.raises(QuestionError, match=message):
        read_samples(path)


def test_a_missing_file_of_samples_is_refused(tmp_path):
    with pytest.raises(QuestionError, match="cannot be read"):
        read_samples(tmp_path / "none.jsonl")


# --- summaries


def sample(question, status, extracted=None, tokens=10, label="a", **fields):
    score = float(status == "correct")
    return Sample(
        question, question, "4", "", "stop", set=label, status=status, score=score,
        extracted=extracted, tokens=tokens, **fields,
    )  # fmt: skip


TWO_SETS = [
    # set a: two questions of four samples
    sample("1", "correct", "4", 10),
    sample("1", "correct", "4.0", 20),
    sample("1", "wrong", "5", 30),
    sample("1", "wrong", "5", 40),
    sample("2", "wrong", "7", 50),
    sample("2", "unparseable", None, 60),
    sample("2", "truncated", None, 99),
    sample("2", "timeout", None, 70),
    # set b: one question of four samples
    *[sample("1", "correct", "4", 5, "b")] * 3,
    sample("1", "crash", None, 7, "b"),
]


def test_a_summary_is_what_one_counts_by_hand():
    a, b = summarise(TWO_SETS)["sets"].values()
    values = {name: entry["value"] for name, entry in a.items() if "@" in name or name == "score"}
    assert values == {
        "score": pytest.approx(0.25),
        "pass@1": pytest.approx((2 / 4 + 0) / 2),
        "pass@2": pytest.approx((1 - 1 / 6) / 2),  # 1 of the 6 pairs of question 1 is all wrong
        "pass@4": pytest.approx(0.5),
        "majority@1": pytest.approx(0.25),
        "majority@2": pytest.approx(0.25),  # of question 1's pairs 1 wins, 1 loses, 4 tie
        "majority@4": pytest.approx(0.25),  # 4 = 4.0 against 5 is a tie
    }
    assert a["accuracy"]["value"] == 0.25
    assert a["questions"] == 2 and a["samples_per_question"] == 4
    assert a["tokens"] == {"right": 15, "wrong": (30 + 40 + 50 + 60 + 70) / 5, "truncated": 99}
    assert a["formatted"] == 5 / 8
    assert a["status"] == {
        "correct": 2, "wrong": 3, "unparseable": 1, "truncated": 1, "timeout": 1, "crash": 0,
    }  # fmt: skip
    assert b["status"]["crash"] == 1 and b["tokens"]["truncated"] is None


def test_there_is_no_majority_where_right_samples_name_no_answer():
    voted = [sample("1", "correct", "4"), sample("1", "wrong")]
    unnamed = [sample("1", "correct", None, label="b"), sample("1", "wrong", "3", label="b")]
    summary = summarise([*voted, *unnamed])
    assert summary["sets"]["a"]["majority@2"]["value"] == 1
    assert [key for key in summary["sets"]["b"] if "@" in key] == ["pass@1", "pass@2"]
    cells = [row[5] for row in summary_table("", summary).rows[:2]]
    assert cells == ["100.0%", "–"]


def test_the_two_averages_weigh_sets_and_questions():
    summary = summarise(TWO_SETS)
    assert summary["mean_over_sets"]["value"] == pytest.approx((0.25 + 0.75) / 2)
    assert summary["mean_over_questions"]["value"] == pytest.approx((2 * 0.25 + 0.75) / 3)


def test_the_interval_of_an_average_treats_sets_as_independent():
    samples = [
        sample(str(i), "correct" if i % 2 else "wrong", label=label)
        for label in "abcd"
        for i in range(50)
    ]
    summary = summarise(samples)
    one, mean = (e["high"] - e["low"] for e in (
        summary["sets"]["a"]["accuracy"], summary["mean_over_sets"]
    ))  # fmt: skip
    assert one == pytest.approx(2 * 1.96 * (0.25 / 50) ** 0.5, rel=0.1)
    assert mean == pytest.approx(one / 2, rel=0.1)


def test_three_samples_have_scores_of_one_two_and_three():
    a = summarise([sample("1", "correct", "4")] * 3)["sets"]["a"]
    assert [name for name in a if name.startswith("pass")] == ["pass@1", "pass@2", "pass@3"]


def test_a_difference_is_paired_by_question_and_leaves_out_what_one_lacks():
    base = [sample(str(i), "correct" if i < 50 else "wrong") for i in range(100)]
    better = [sample(str(i), "correct" if i < 60 else "wrong") for i in range(5, 100)]
    row = compare(base, better)["a"]
    assert row["questions"] == 95 and row["difference"] == pytest.approx(10 / 95)
    # each question gains 0 or 1, with probability 10/95: far narrower than unpaired
    width = 2 * 1.96 * (10 / 95 * 85 / 95 / 95) ** 0.5
    assert row["high"] - row["low"] == pytest.approx(width, rel=0.15)
    assert row["low"] > 0


def test_a_model_does_not_differ_from_itself():
    row = compare(TWO_SETS, TWO_SETS)["mean_over_sets"]
    assert row == {"questions": 3, "difference": 0, "low": 0, "high": 0}


def test_sets_that_only_one_model_was_asked_are_not_compared():
    assert compare(TWO_SETS, [sample("1", "correct", label="z")]) == {}


@settings(max_examples=40)
@given(st.permutations(TWO_SETS[:8]))
def test_the_order_of_samples_does_not_matter(samples):
    summary = summarise(samples)["sets"]["a"]
    assert summary == summarise(TWO_SETS)["sets"]["a"]


def test_the_markdown_has_a_row_for_each_set_and_average():
    text = markdown([summary_table("tiny", summarise(TWO_SETS))])
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("|")]
    assert rows == [
        "| set",
        "| :--",
        "| a",
        "| b",
        "| mean over sets (each set counts alike)",
        "| mean over questions (each question counts alike)",
    ]
    assert "| a | 2 | 25.0% |" in text


# --- engines


@pytest.mark.vllm
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None and not os.environ.get("CI"),
    reason="vLLM is not installed",
)
def test_greedy_responses_are_those_of_vllm_up_to_ties(grader, monkeypatch):
    drawn: dict[str, list[np.ndarray]] = {"local": [], "vllm": []}

    def make_recording_engine(name, *args, **kwargs):
        engine = make_engine(name, *args, **kwargs)
        generate = engine.generate

        def record(*call):
            completions = generate(*call)
            drawn[name] += [completion.token_ids for completion in completions]
            return completions

        engine.generate = record
        return engine

    monkeypatch.setattr("lmrl_env.suite.make_engine", make_recording_engine)
    suite = load_suite("arithmetic:size=64")
    local, vllm = (
        draw(suite, grader, n=1, temperature=0.0, engine=engine) for engine in ("local", "vllm")
    )
    (questions,) = suite.values()
    table = PromptTable(questions, R1, load_tokenizer("tiny"), BUDGET)
    model = load_model("tiny", device="cpu")
    differing = 0
    for i, (a, b) in enumerate(zip(drawn["local"], drawn["vllm"], strict=True)):
        if np.array_equal(a, b):
            assert local[i] == vllm[i]
            continue
        differing += 1
        shared = next(t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        prompt = torch.tensor([[*table[i].tolist(), *a[:shared].tolist()]])
        with torch.no_grad():
            best = model(prompt).logits[0, -1].topk(2).values
        assert best[0] - best[1] < 1e-4
    assert len(local) == 64 and differing < 8
