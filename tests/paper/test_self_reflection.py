"""The search for self-reflection: by hand, against a local judge, and its commands."""

from __future__ import annotations

import json
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "paper"))

import self_reflection  # noqa: E402
from reflection import (  # noqa: E402
    KEYWORDS,
    Category,
    Detection,
    accuracy_differences,
    ask_judge,
    detect,
    has_keyword,
    lengths,
    outcome,
    outcomes_by_level,
    shares,
)

from algos.grpo import Args  # noqa: E402
from lmrl_env.options import run_command  # noqa: E402
from lmrl_env.samples import Sample  # noqa: E402


def sample(question=0, response="It is 4.", status="correct", level=1):
    reason = "length" if status == "truncated" else "stop"
    text = f"How many, {question}?"
    return Sample(str(question), text, "4", response, reason, status=status, extra={"level": level})


class Judge(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint that replies what a function makes of the prompt."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.reply = reply
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class JudgeHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        text = self.server.reply(body["messages"][0]["content"])
        self.send_response(200 if text is not None else 400)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    """Calls a response that says hm a reflection, and any other one an attempt."""
    with Judge(lambda prompt: f"So. CATEGORY: {2 if 'hm' in prompt else 1}") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_every_keyword_of_the_pool_is_found_in_any_case_and_form():
    assert len(set(KEYWORDS)) == 15
    for word in KEYWORDS:
        assert has_keyword(f"Now, {word.upper()}ing it.")
    assert has_keyword("check\nagain")


@pytest.mark.parametrize(
    "text", ["Wait.", "Let me try again.", "I check it again.", "prereconsider", "Think, again", ""]
)
def test_what_is_not_in_the_pool_is_not_found(text):
    assert not has_keyword(text)


@pytest.mark.parametrize("tail", ["Let me check again. It is 4.", "I recheck: it", "Double-check:"])
def test_the_tails_of_the_tiny_model_are_found(tail):
    assert has_keyword(f"I guess it is 4. {tail}")


@pytest.mark.parametrize(
    ("reply", "category"),
    [
        ("It is off. CATEGORY: 0", Category.OFF_TOPIC),
        ("CATEGORY: 1", Category.ATTEMPT),
        ("Not CATEGORY: 1 but\n**CATEGORY:** 2", Category.REFLECTION),
        ("CATEGORY: 3.", Category.PYTHON_ONLY),
        ("CATEGORY: 4", None),
        ("2", None),
        (None, None),
    ],
)
def test_the_last_category_of_the_reply_counts(judge, reply, category):
    judge.reply = lambda prompt: reply
    found, said = ask_judge("Why?", "So.", base_url=judge.url, model="wise")
    assert found is category
    assert said == reply if reply is not None else "HTTP Error 400" in said


def test_the_judge_sees_question_and_response_as_they_are(judge):
    ask_judge("{response} {0}", "{question} \\boxed{4}", base_url=judge.url, model="wise")
    (body,) = judge.requests
    prompt = body["messages"][0]["content"]
    assert "Question:\n{response} {0}\n" in prompt
    assert "\n{question} \\boxed{4}\n" in prompt
    assert (body["model"], body["temperature"]) == ("wise", 0.0)


def test_keyword_and_judge_are_crossed(judge):
    texts = ["I recheck, hm.", "I recheck.", "hm", "It is 4."]
    found = detect([sample(response=text) for text in texts], judge_url=judge.url)
    assert [d.keyword for d in found] == [True, True, False, False]
    assert [d.judge for d in found] == [2, 1, 2, 1]
    assert [d.both for d in found] == [True, False, False, False]
    figures = self_reflection.share_figures([sample(i // 2) for i in range(4)], found)
    assert figures["keyword"]["responses"]["mean"] == 0.5
    assert figures["keyword"]["questions"]["mean"] == 0.5
    assert figures["judge"]["questions"]["mean"] == 1.0
    assert figures["both"]["responses"]["mean"] == 0.25
    assert (figures["categories"], figures["unjudged"]) == ([0, 2, 2, 0], 0)


def test_a_judge_that_says_nothing_is_counted_and_no_reflection(judge):
    judge.reply = lambda prompt: "perhaps"
    samples = [sample(response="I recheck.")]
    found = detect(samples, judge_url=judge.url)
    assert found == [Detection(True, None, "perhaps")]
    assert self_reflection.reflects(found) == [False]
    assert self_reflection.share_figures(samples, found)["unjudged"] == 1


def test_without_a_judge_keywords_decide():
    found = detect([sample(response="I recheck."), sample()])
    assert self_reflection.reflects(found) == [True, False]


def test_shares_of_responses_and_of_questions_are_apart():
    samples = [sample(question) for question in (0, 0, 0, 0, 1, 1)]
    responses, questions = shares(samples, [True, False, False, False, False, False])
    np.testing.assert_array_equal(responses, [0.25, 0])
    np.testing.assert_array_equal(questions, [1, 0])


def test_outcomes_are_shares_of_a_level_and_lengths_are_characters():
    samples = [
        sample(response="1234", level=1),
        sample(response="12", status="wrong", level=1),
        sample(response="123456", status="wrong", level=2),
        sample(response="1", status="unparseable", level=2),
    ]
    levels = outcomes_by_level(samples)
    assert levels["1"] == {"correct": 0.5, "wrong": 0.5, "unformatted": 0, "truncated": 0}
    assert levels["2"] == {"correct": 0, "wrong": 0.5, "unformatted": 0.5, "truncated": 0}
    assert lengths(samples) == {"correct": 4, "wrong": 4, "unformatted": 1, "truncated": None}


def test_a_response_whose_verifier_crashed_is_no_outcome():
    with pytest.raises(ValueError, match="status 'crash'"):
        outcome(sample(status="crash"))


def test_accuracy_is_compared_where_a_question_has_enough_of_both_kinds():
    statuses = ["correct", "wrong", "wrong", "wrong"] + ["correct"] * 3 + ["wrong"]
    samples = [sample(i // 4, status=status) for i, status in enumerate(statuses)]
    found = [True, True, False, False, False, True, True, True]
    np.testing.assert_allclose(accuracy_differences(samples, found, at_least=1), [0.5, -1 / 3])
    np.testing.assert_allclose(accuracy_differences(samples, found, at_least=2), [0.5])


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_a_dry_run_prints_commands_that_the_algorithm_understands(scale, monkeypatch):
    arguments = ["--dry-run", "--scale", scale, "--seeds", "2"]
    result = CliRunner().invoke(self_reflection.main, arguments)
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(click.Command, "main", parse)
    for seed, line in enumerate(result.output.splitlines()):
        _, program, *flags = shlex.split(line)
        assert program == str(ROOT / "algos/grpo.py")
        given: list[Args] = []
        monkeypatch.setattr(sys, "argv", [program, *flags])
        run_command(Args, given.append)
        assert given[0].seed == seed
    assert seed == 1
    if scale == "paper":
        args = given[0]
        assert (args.model, args.lr) == ("Qwen/Qwen2.5-Math-1.5B", 1e-6)
        assert (args.max_new_tokens, args.questions) == (3000, "math-12k")


def parse(command, *args, **kwargs):
    """Run a command without ending the process."""
    with command.make_context(command.name, sys.argv[1:]) as context:
        command.invoke(context)
