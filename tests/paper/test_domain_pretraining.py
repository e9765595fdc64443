import json

import pytest
from paper.scripts import dry_run, load, parse

domain = load("paper/domain_pretraining")


def test_the_texts_are_sums_alone_or_questions_with_solutions(tmp_path, monkeypatch):
    monkeypatch.setattr(domain, "DOCUMENTS", {"sums": 50, "qa": 50})
    for kind in ("sums", "qa"):
        path = domain.write_text(tmp_path, kind, seed=1)
        documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        assert len(documents) == 50
        assert all(("boxed" in d) == ("?" in d) == (kind == "qa") for d in documents)


def row(start, end, length=30.0):
    interval = domain.interval
    return {
        "accuracy_start": interval([start, start]),
        "accuracy_end": interval([end, end]),
        "length_start": interval([25.0, 25.0]),
        "length_end": interval([length, length]),
    }


def bases(plain, sums, qa, longer=40.0):
    ends = {"plain": plain, "+ sums": sums, "+ QA": qa}
    return {
        name: {"dr_grpo": row(0.1, end), "grpo": row(0.1, end, longer)}
        for name, end in ends.items()
    }


def test_the_verdict_follows_the_figures():
    assert domain.conclude(bases(0.2, 0.4, 0.6))[1] == "holds"
    assert domain.conclude(bases(0.2, 0.4, 0.6, longer=20.0))[1] == "partly"
    assert domain.conclude(bases(0.6, 0.4, 0.2, longer=20.0))[1] == "does not hold"


def test_runs_without_a_template_are_told_beside_the_starts_with_one():
    table = bases(0.2, 0.4, 0.6)
    for of in table.values():
        of[domain.NO_TEMPLATE] = row(0.3, 0.7)
    text = domain.forgotten(table)
    assert "(plain 10.0%, + sums 10.0%, + QA 10.0%)" in text
    assert "takes plain from 30.0% to 70.0%, + sums from 30.0% to 70.0%" in text


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_the_commands_of_a_dry_run_parse(scale, tmp_path, monkeypatch):
    commands = dry_run(domain, "--scale", scale, "--runs-dir", str(tmp_path), "--seeds", "1")
    settings = [parse(command, monkeypatch) for command in commands]
    runs = [s for s in settings if "env" in s]
    assert len(runs) == (9 if scale == "tiny" else 6)
    assert sum(s["env"] == "MathPlain-v0" for s in runs) == (3 if scale == "tiny" else 0)
    (text, *_) = [s for s in settings if "text" in s]
    if scale == "paper":
        assert (text["epochs"], text["lr"], text["columns"]) == (2, 1e-5, "problem,solution")
        assert runs[-1]["model"] == str(text["out"])
