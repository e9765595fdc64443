import json
from types import SimpleNamespace

import click
import pytest
from paper.scripts import load

from lmrl_env.samples import Sample

bases = load("paper/bases")


def sample(model="m", question="q", status="correct", number=0):
    return Sample(question, "Why?", "4", "", "stop", model=model, status=status, sample=number)


def test_seeds_weigh_alike_in_the_mean_over_questions():
    samples = [
        *[sample("a", "1"), sample("a", "1", "wrong", 1)],  # 1/2
        *[sample("b", "1"), sample("b", "1", "correct", 1), sample("b", "1", "correct", 2)],  # 1
        *[sample("a", "2", "wrong"), sample("b", "2", "wrong")],  # 0
        sample("another", "3"),
    ]
    found = bases.question_means(samples, ["a", "b"], bases.accuracy)
    assert found.mean == pytest.approx((0.75 + 0) / 2)
    assert (found.low, found.high) == (0, 0.75)


def options(tmp_path, **changes):
    return SimpleNamespace(
        **{"dry_run": False, "is_tiny": True, "jobs": 2, "runs_dir": tmp_path, **changes}
    )


def test_a_task_whose_result_stands_is_not_run_again(tmp_path):
    result = tmp_path / "result"
    code = f"open({str(result)!r}, 'a').write('x')"
    tasks = [bases.Task("one", ["-c", code], result)]
    bases.run_all(options(tmp_path), tasks)
    bases.run_all(options(tmp_path), tasks)
    assert result.read_text() == "x"


def test_a_task_that_fails_is_named_with_the_end_of_its_output(tmp_path):
    task = bases.Task("the third", ["-c", "raise SystemExit('no room')"], tmp_path / "result")
    with pytest.raises(click.ClickException, match="the third ended with 1:\nno room"):
        bases.run_all(options(tmp_path), [task])


def test_held_out_questions_are_of_one_level(tmp_path):
    path = bases.write_heldout(options(tmp_path), 1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 256
    assert set(rows[0]) == {"question", "answer"}
