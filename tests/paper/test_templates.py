import pytest
from paper.scripts import dry_run, load, parse

from lmrl_env.samples import Sample

templates = load("paper/templates")
claim = templates.Interval


@pytest.mark.parametrize(
    ("response", "answers"),
    [
        (" Step by step: 3+4=7. So it is 7. \\boxed{7}", True),
        (" I guess it is 12.", True),
        (" <answer>12</answer>", True),
        (" Mia has 3 books. How many books does Mia have? 3+4=7.", False),
        (" Then Mia gives away 4 books.", False),
        ("", False),
    ],
)
def test_a_response_answers_if_a_solution_stands_before_a_further_question(response, answers):
    assert templates.is_answer(response) == answers


def test_a_four_shot_response_ends_where_the_model_invents_a_question():
    samples = [
        Sample("1", "q", "7", " \\boxed{7}\n\nQuestion: 1+1? \\boxed{2}", "length"),
        Sample("2", "q", "7", " \\boxed{7}", "stop"),
        Sample("3", "q", "7", " 1, 2, 3, 4", "length"),
    ]
    cut = templates.first_answer(samples)
    assert [s.response for s in cut] == [" \\boxed{7}", " \\boxed{7}", " 1, 2, 3, 4"]
    assert [s.finish_reason for s in cut] == ["stop", "stop", "length"]


@pytest.mark.parametrize("is_tiny", [True, False])
def test_the_four_shot_prompt_has_four_solved_examples_and_one_open_place(is_tiny):
    class Options:
        pass

    Options.is_tiny = is_tiny
    text = templates.four_shot(Options)
    assert text.count("\\boxed{") == text.count("Question: ") - 1 == 4
    assert text.count("{question}") == 1
    assert text.endswith("Question: {question}\nAnswer:")


def row(answering, accuracy):
    return {
        "answering": claim(answering, answering, answering),
        "accuracy": claim(accuracy, accuracy, accuracy),
    }


def table(qa_none):
    weak = {name: row(0.5, 0.1) for name in templates.TEMPLATES}
    return {
        "qa": {**weak, "none": qa_none},
        "text": {**weak, "r1": row(1.0, 0.3), "none": row(0.0, 0.0)},
    }


def test_the_verdict_follows_the_figures():
    assert templates.conclude(table(row(1.0, 0.5)), "qa", "text")[1] == "holds"
    _, verdict, reason = templates.conclude(table(row(0.9, 0.5)), "qa", "text")
    assert verdict == "partly"
    assert reason.startswith("Qa answers more than 95% of bare questions: no; ")
    flat = {name: row(0.5, 0.1) for name in templates.TEMPLATES}
    flat["r1"] = row(0.5, 0.2)
    assert templates.conclude({"qa": flat, "text": flat}, "qa", "text")[1] == "does not hold"


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_the_commands_of_a_dry_run_parse(scale, tmp_path, monkeypatch):
    commands = dry_run(templates, "--scale", scale, "--runs-dir", str(tmp_path))
    settings = [parse(command, monkeypatch) for command in commands]
    evaluations = [s for s in settings if "template" in s]
    assert len(evaluations) == 4
    if scale == "paper":
        assert all(s["max_new_tokens"] == 3000 and s["engine"] == "vllm" for s in evaluations)
