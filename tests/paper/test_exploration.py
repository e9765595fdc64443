import pytest
from paper.scripts import dry_run, load, parse

from lmrl_env.samples import Sample

exploration = load("paper/exploration")


def test_one_right_response_is_enough_for_a_question():
    right, wrong = (Sample("q", "?", "4", "", "stop", status=s) for s in ("correct", "wrong"))
    assert exploration.any_right([wrong, right, wrong]) == 1
    assert exploration.any_right([wrong, wrong]) == 0


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_the_commands_of_a_dry_run_parse(scale, tmp_path, monkeypatch):
    commands = dry_run(exploration, "--scale", scale, "--runs-dir", str(tmp_path))
    settings = [parse(command, monkeypatch) for command in commands]
    evaluations = [s for s in settings if "template" in s]
    assert {s["temperature"] for s in evaluations} == set(exploration.TEMPERATURES)
    assert all(s["n"] == 8 for s in evaluations)


def test_curves_have_a_line_for_each_base_model():
    value = exploration.Interval(0.5, 0.4, 0.6)
    curve = {t: {"pass@8": value, "accuracy": value} for t in exploration.TEMPERATURES}
    figure = exploration.draw_curves({"qa": curve, "text": curve})
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
