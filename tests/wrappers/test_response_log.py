"""Wrappers that write responses down."""

from __future__ import annotations

import json

import numpy as np
from episodes import EOS, TOKENIZER, ids, play
from gymnasium.vector import VectorWrapper
from small_envs import BUDGET, token_envs

from lmrl_env.wrappers import DisagreementLog, LengthPenalty, RecordResponses, VerifierReward

X, Y, Z = ids("xyz")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- all responses


def test_every_finished_response_becomes_a_line(tmp_path):
    path = tmp_path / "new" / "responses.jsonl"
    base = token_envs(2, tokens_per_step=BUDGET)
    envs = RecordResponses(VerifierReward(base, "scripted_scores:has_x"), path)
    play(envs, [[X, EOS]], [[Y] * BUDGET], question_ids=[4, 5])
    first, second = lines(path)
    question = base.prompts.questions[4]
    assert first == {
        "question": question.id,
        "prompt": TOKENIZER.decode(base.prompts[4]),
        "return": 1.0,
        "question_id": 4,
        "response": "x",
        "response_length": 2,
        "finish_reason": "stop",
        "answer": question.answer,
        "verifier_status": "correct",
        "verifier_extracted": "x",
    }
    assert (second["response"], second["finish_reason"]) == ("y" * BUDGET, "length")
    assert (second["verifier_status"], second["return"]) == ("truncated", 0)


def test_the_return_is_that_of_the_episode_whatever_the_grain_of_its_steps(tmp_path):
    class Paying(LengthPenalty):
        def step(self, actions):
            observations, rewards, *rest = super().step(actions)
            return observations, rewards + (actions.reshape(2, -1) == X).sum(axis=1), *rest

    recorded = []
    for k in (1, 4, BUDGET):
        path = tmp_path / f"{k}.jsonl"
        envs = RecordResponses(Paying(token_envs(2, tokens_per_step=k), 1.2), path)
        play(envs, [[X, Y, X, X, X, EOS]], [[Y, X, EOS]])
        rows = sorted(lines(path), key=lambda line: line["response"])
        recorded.append([(row["response"], round(row["return"], 9)) for row in rows])
    assert recorded == [[("xyxxx", 4 - 0.6), ("yx", 1 - 0.3)]] * 3


class PaysOneAStep(VectorWrapper):
    def step(self, actions):
        observations, rewards, *rest = self.env.step(actions)
        return observations, rewards + 1, *rest


def test_a_response_that_a_reset_cut_short_is_not_recorded(tmp_path):
    path = tmp_path / "responses.jsonl"
    envs = RecordResponses(PaysOneAStep(token_envs(2)), path)
    envs.reset(seed=0)
    envs.step(np.array([X, X]))
    envs.reset(options={"reset_mask": np.array([True, False])})
    envs.step(np.array([EOS, EOS]))
    assert [(row["response"], row["return"]) for row in lines(path)] == [("", 1), ("x", 2)]


def test_episodes_that_follow_each_other_are_recorded_one_by_one(tmp_path):
    path = tmp_path / "responses.jsonl"
    envs = RecordResponses(
        LengthPenalty(token_envs(1, tokens_per_step=BUDGET, autoreset_mode="NextStep"), 1.2), path
    )
    envs.reset(seed=0)
    row = [[X, EOS] + [-1] * (BUDGET - 2)]
    for _ in range(4):
        envs.step(np.array(row))
    assert [round(line["return"], 9) for line in lines(path)] == [-0.2, -0.2]


def test_text_stays_readable_in_the_file(tmp_path):
    path = tmp_path / "responses.jsonl"
    play(RecordResponses(token_envs(1, tokens_per_step=BUDGET), path), [[*ids("é\n"), EOS]])
    assert "é\\n" in path.read_text(encoding="utf-8")


# --- what two verifiers disagree on


def test_what_two_verifiers_disagree_on_becomes_a_line_with_both_verdicts(tmp_path):
    path = tmp_path / "new" / "disagreements.jsonl"
    base = token_envs(5, tokens_per_step=BUDGET)
    verifiers = "scripted_scores:has_x", "scripted_scores:has_y"
    envs = DisagreementLog(base, *verifiers, path)
    rows = [[X, EOS]], [[Y, EOS]], [[X, Y, EOS]], [[EOS]], [[X] * BUDGET]
    returns, ends = play(envs, *rows, question_ids=[4, 5, 6, 7, 8])
    assert not returns.any()
    assert [end.get("verifiers_differ") for end in ends] == [True, True, False, False, None]
    first, second = lines(path)
    assert first == {
        "question": base.prompts.questions[4].id,
        "prompt": TOKENIZER.decode(base.prompts[4]),
        "response": "x",
        "answer": base.prompts.questions[4].answer,
        "first": {"score": 1.0, "status": "correct", "extracted": "x", "detail": ""},
        "second": {"score": 0.0, "status": "wrong", "extracted": None, "detail": ""},
    }
    assert (second["first"]["status"], second["second"]["status"]) == ("wrong", "correct")


def test_a_verifier_that_fails_disagrees_with_one_that_calls_it_correct(tmp_path):
    path = tmp_path / "disagreements.jsonl"
    verifiers = "scripted_scores:has_x", "scripted_scores:has_y"
    envs = DisagreementLog(token_envs(2, tokens_per_step=BUDGET), *verifiers, path)
    play(envs, [[X, Z, EOS]], [[Z, EOS]])
    (line,) = lines(path)
    assert line["second"]["status"] == "crash" and "z" in line["second"]["detail"]


def test_agreement_writes_nothing(tmp_path):
    path = tmp_path / "disagreements.jsonl"
    verifiers = "scripted_scores:has_x", "scripted_scores:has_x"
    play(DisagreementLog(token_envs(1, tokens_per_step=BUDGET), *verifiers, path), [[X, EOS]])
    assert not path.exists()
