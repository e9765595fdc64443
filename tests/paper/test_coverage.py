import json

import pytest
from paper.scripts import dry_run, load, parse

coverage = load("paper/coverage")


def write_run(folder, accuracies, rewards=(0.0,)):
    """Write a run with an accuracy every 20 steps and a reward every step."""
    folder.mkdir()
    rows = [{"step": 20 * i, "eval/accuracy": value} for i, value in enumerate(accuracies)]
    rows += [{"step": i, "reward/mean": value} for i, value in enumerate(rewards, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_accuracy_and_reward_are_means_over_seeds_at_start_and_end(tmp_path):
    rewards = [0.1] * 5 + [0.5] * 3 + [0.8] * 5
    folders = {
        ("R1", "all", 1): write_run(tmp_path / "1", [0.1, 0.2, 0.59], rewards),
        ("R1", "all", 2): write_run(tmp_path / "2", [0.1, 0.4, 0.61], [0.2, *rewards[1:]]),
        ("R1", "few", 1): write_run(tmp_path / "3", [0.1, 0.2, 0.3]),
        ("R1", "few", 2): write_run(tmp_path / "4", [0.1, 0.2, 0.3]),
    }
    table = coverage.measure(folders)
    assert table["R1"]["all"]["steps"] == [0, 20, 40]
    assert table["R1"]["all"]["start"].mean == pytest.approx(0.1)
    end = table["R1"]["all"]["end"]
    assert end.mean == pytest.approx(0.6)
    assert end.high - end.mean == pytest.approx(12.706 * 0.01, rel=1e-4)  # t(0.975, 1) · s/√2
    assert coverage.spread(table, "R1") == pytest.approx(0.3)
    assert table["R1"]["all"]["rewards"] == pytest.approx([0.11, 0.8])


def test_an_interval_of_a_share_lies_within_0_and_1():
    assert coverage.share([0.1, 0.9]) == (0.5, 0, 1)


def test_a_set_that_pays_next_to_nothing_is_named(tmp_path):
    folders = {
        ("R1", "all", 1): write_run(tmp_path / "1", [0.1, 0.7], [0.3]),
        ("R1", "far", 1): write_run(tmp_path / "2", [0.1, 0.1], [0.01]),
    }
    _, verdict, reason = coverage.conclude(coverage.measure(folders))
    assert verdict == "does not hold"
    assert "On far the reward of the first 5 steps is 1.0% at most" in reason
    assert "The other sets all end at 70.0% or more" in reason


def test_sums_are_questions_of_their_own_wording():
    questions = coverage.sums()
    assert len(questions) == len({q.question for q in questions}) == 1000
    assert all(q.question.startswith("Compute ") for q in questions)
    words = questions[0].question.removesuffix(".").split()[1:]
    assert eval("".join(words)) == int(questions[0].answer)


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_the_commands_of_a_dry_run_parse(scale, tmp_path, monkeypatch):
    commands = dry_run(coverage, "--scale", scale, "--runs-dir", str(tmp_path), "--seeds", "1")
    settings = [parse(command, monkeypatch) for command in commands]
    runs = [s for s in settings if "env" in s]
    assert len({(s["env"], s["questions"]) for s in runs}) == len(runs) == 12
    if scale == "paper":
        assert {s["questions"] for s in runs} == {"orz-57k", "math-12k", "gsm8k", "asdiv"}
        assert all((s["prompts_per_step"], s["lr"]) == (128, 1e-6) for s in runs)
        assert all(s["gradient_checkpointing"] for s in runs)
