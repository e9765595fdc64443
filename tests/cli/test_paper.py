"""``lmrl paper``: handmade results and scripts in a checkout of their own."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmrl_env.cli import main, paper
from lmrl_env.errors import ConfigurationError
from lmrl_env.gallery import anchor, between_marks, claims_table, read_claims, report

ROOT = Path(__file__).parents[2]
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TABLE = "| a | b |\n|---|---|\n| 1 | 2 |"


def save(folder, name, section="§3.1", holds="holds", tables=TABLE, picture=True, **changes):
    """Write what a script writes."""
    record = {
        "name": name,
        "title": f"Title of {name}",
        "scale": "tiny",
        "date": "2026-01-02",
        "command": f"python examples/paper/{name}.py --scale tiny",
        "commit": "abc123",
        "hardware": "x86_64, 2 cores, no GPU",
        "minutes": 4.0,
        "verdict": {
            "section": section,
            "claim": "It is *so*.",
            "measured": "1 < 2",
            "holds": holds,
            "reason": "Because of `this`.",
            "seeds": "3 seeds",
        },
        "figures": {},
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record))
    lines = [f"## {record['title']}", f"**Verdict: {holds}.** {record['verdict']['reason']}"]
    lines += [tables] if tables else []
    lines += [f"![{record['title']}]({name}.png)", f"`{record['command']}`"]
    (folder / f"{name}.md").write_text("\n\n".join(lines) + "\n")
    if picture:
        (folder / f"{name}.png").write_bytes(PNG)


class Page(HTMLParser):
    """The text and the tags of a page, which must be closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.attributes = [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with two scripts, one of which fails, in which lmrl paper is at work."""
    scripts = tmp_path / "examples" / "paper"
    scripts.mkdir(parents=True)
    (scripts / "claim.py").write_text("def claim_options(seeds): ...\n")
    (scripts / "README.md").write_text("<!-- claims: begin -->\n<!-- claims: end -->\n")
    write_script(scripts, "good", "sys.path.insert(0, TESTS)\nimport test_paper\n"
                 "test_paper.save(out, 'good', command=' '.join(sys.argv[1:]))")  # fmt: skip
    write_script(scripts, "bad", "print('I am about to fail')\nsys.exit('no luck today')")
    (tmp_path / "README.md").write_text(
        "# x\n<!-- claims: begin -->\nstale\n<!-- claims: end -->\n"
    )
    monkeypatch.setattr(paper, "CHECKOUT", tmp_path)
    monkeypatch.setattr(paper, "SCRIPTS", scripts)
    monkeypatch.setattr(paper, "COMMITTED", tmp_path / "benchmarks" / "results" / "paper")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_script(folder, name, body):
    (folder / f"{name}.py").write_text(
        f'"""About {name}."""\nimport sys\nfrom pathlib import Path\n'
        f"TESTS = {str(Path(__file__).parent)!r}\n"
        "def claim_options(seeds): return lambda program: program\n"
        "out = Path(next(a for a in sys.argv if a.startswith('--out='))[6:])\n"
        f"@claim_options(seeds=1)\ndef main(): ...\n{body}\n"
    )


def lmrl_paper(*args):
    return CliRunner().invoke(main, ["paper", *map(str, args)])


def test_a_failing_script_is_named_with_its_output_and_the_others_go_on(checkout):
    result = lmrl_paper("--jobs", 2)
    assert result.exit_code == 1
    assert "bad failed:\nI am about to fail\nno luck today" in result.stderr
    assert "1 of the scripts failed: bad" in result.stderr
    assert "2 to run, 10 minutes on 2 cores" in result.stdout
    page = Page((checkout / "runs/paper/results/report.html").read_text())
    assert "Title of good" in page.text
    assert "About bad." in page.text and "not run yet: 1" in page.text


def test_a_result_that_stands_is_not_measured_again_unless_asked(checkout):
    out = checkout / "results"
    save(out, "good", command="by hand")
    assert lmrl_paper("--only", "good", "--out", out).exit_code == 0
    assert read_claims(out)[0].command == "by hand"
    assert lmrl_paper("--only", "good", "--out", out, "--again", "--jobs", 3).exit_code == 0
    assert read_claims(out)[0].command == f"--scale=tiny --jobs=3 --out={out}"


def test_a_result_of_the_papers_scale_is_no_result_at_tiny_scale(checkout):
    save(checkout / "results", "good", scale="paper")
    assert "1 to run" in lmrl_paper("--only", "good", "--out", "results").stdout


def test_scripts_share_the_cores_and_the_longest_comes_first(checkout):
    save(checkout / "benchmarks/results/paper", "good", minutes=30, jobs=2)
    result = lmrl_paper("--jobs", 4)
    first, second, total, *_ = result.stdout.splitlines()
    assert first.split()[:3] == ["good", "15", "min"]
    assert second.split()[:4] == ["bad", "about", "2", "min"]
    assert total == "2 to run, 18 minutes on 4 cores"  # (2 * 30 + 10) / 4 = 17.5
    assert read_claims(checkout / "runs/paper/results")[0].command.split()[1] == "--jobs=2"


def test_an_unknown_script_is_refused_with_the_names(checkout):
    result = lmrl_paper("--only", "ugly")
    assert result.exit_code == 1
    assert "--only 'ugly': expected a script of examples/paper/, one of bad, good" in result.output


def test_outside_of_a_checkout_it_says_where_it_works(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "SCRIPTS", tmp_path)
    result = lmrl_paper()
    assert result.exit_code == 1
    assert "lmrl paper works in a checkout" in result.output


def test_rendering_the_committed_results_writes_the_two_readmes(checkout):
    out = checkout / "benchmarks/results/paper"
    save(out, "good")
    assert lmrl_paper("--render", "--out", out).exit_code == 0
    row = "| §3.1 | [Title of good](examples/paper/README.md#title-of-good) | **holds** | 4 min |"
    assert row in (checkout / "README.md").read_text()
    assert "stale" not in (checkout / "README.md").read_text()
    details = (checkout / "examples/paper/README.md").read_text()
    assert "![Title of good](../../benchmarks/results/paper/good.png)" in details
    assert TABLE in details
    assert (checkout / details.split("](../../")[1].partition(")")[0]).is_file()


def test_rendering_elsewhere_leaves_the_readmes_alone(checkout):
    before = (checkout / "README.md").read_text()
    save(checkout / "results", "good")
    assert lmrl_paper("--render", "--out", "results").exit_code == 0
    assert (checkout / "README.md").read_text() == before


def test_an_interrupted_command_ends_its_scripts(checkout):
    write_script(
        checkout / "examples/paper", "good",
        "import os, subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "Path('pids').write_text(f'{os.getpid()} {child.pid}')\ntime.sleep(60)",
    )  # fmt: skip
    program = (
        "from pathlib import Path\nfrom lmrl_env.cli import main, paper\n"
        "paper.CHECKOUT = Path('.').resolve()\n"
        "paper.SCRIPTS = paper.CHECKOUT / 'examples/paper'\n"
        "paper.COMMITTED = paper.CHECKOUT / 'none'\n"
        "main(['paper', '--only', 'good'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    wait_for(lambda: (checkout / "pids").exists() and (checkout / "pids").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    for pid in (checkout / "pids").read_text().split():
        wait_for(lambda pid=pid: not is_running(pid))


def is_running(pid):
    """Whether a process is there and no zombie that its parent, an init, has yet to collect."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_page_holds_pictures_and_tables_and_needs_nothing_else(tmp_path):
    save(tmp_path, "one")
    html = report(read_claims(tmp_path), {})
    page = Page(html)
    assert "<script" not in html
    assert ("img", "src", f"data:image/png;base64,{base64.b64encode(PNG).decode()}") in (
        page.attributes
    )
    assert "<td>1</td>" in html and "<em>so</em>" in html and "<code>this</code>" in html
    outside = [v for _, key, v in page.attributes if key in ("src", "href") and ":" in v]
    assert {v.partition(":")[0] for v in outside} == {"data", "https"}
    assert [v for v in outside if v.startswith("https")] == ["https://arxiv.org/abs/2503.20783"]
    for fact in ("3 seeds", "4 min", "abc123", "2 cores, no GPU", "2026-01-02", "one.py --scale"):
        assert fact in page.text


def test_text_of_a_result_is_escaped(tmp_path):
    evil = "<script>alert(1)</script> & <b>"
    save(tmp_path, "one", title=evil, tables=f"| {evil} |\n|---|\n| 1 |", commit=evil)
    html = report(read_claims(tmp_path), {evil: evil})
    assert "<script" not in html and "<b>" not in html
    assert (
        Page(html).text.count("<script>alert(1)</script> & <b>") == 7
    )  # 3 titles, table, commit, 2 missing


def test_a_missing_picture_or_table_is_no_error(tmp_path):
    save(tmp_path, "one", picture=False)
    (tmp_path / "one.md").unlink()
    (claim,) = read_claims(tmp_path)
    assert claim.picture is None and claim.tables == ""
    assert "The picture one.png is missing" in report([claim], {})


@pytest.mark.parametrize("reason", ["", "It ends with a blank. ", "One.\n\nTwo paragraphs."])
def test_tables_are_found_behind_any_reason(tmp_path, reason):
    verdict = {"section": "§1", "claim": "", "measured": "", "holds": "partly", "reason": reason}
    save(tmp_path, "one", holds="partly", verdict=verdict | {"seeds": "1"})
    assert read_claims(tmp_path)[0].tables == TABLE


def test_claims_stand_in_the_order_of_the_paper(tmp_path):
    for name, section in (
        ("d", "DAPO, §2"),
        ("c", "§10"),
        ("b", "§3.1-3.2"),
        ("a", "sections 2.3, 3"),
    ):
        save(tmp_path, name, section)
    assert [claim.name for claim in read_claims(tmp_path)] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minutes": "many"}, "could not convert"),
        ({"verdict": {"holds": "holds"}}, "KeyError: 'section'"),
        ({"verdict": {"holds": "perhaps"}}, "'perhaps', not one of holds, partly, does not hold"),
        ({"verdict": []}, "TypeError"),
    ],
)
def test_a_broken_record_is_named(tmp_path, change, said):
    save(tmp_path, "one")
    path = tmp_path / "one.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigurationError, match=said) as error:
        read_claims(tmp_path)
    assert "one.json' is no record of a claim" in str(error.value)


def test_times_are_those_on_two_cores(tmp_path):
    save(tmp_path, "one", minutes=30.0, jobs=1)
    save(tmp_path, "two", minutes=1.0, jobs=4)
    save(tmp_path, "three", minutes=0.5, jobs=2)
    claims = read_claims(tmp_path)
    assert {claim.name: claim.duration for claim in claims} == {
        "one": "15 min", "two": "2 min", "three": "< 1 min",
    }  # fmt: skip
    assert claims_table(claims).endswith("\n\nTogether 18 minutes on two cores.")  # 17.5


def test_a_pipe_in_a_title_does_not_break_the_table(tmp_path):
    save(tmp_path, "one", title="a | b")
    assert "[a \\| b](#a--b)" in claims_table(read_claims(tmp_path))


def test_a_page_without_marks_is_refused():
    with pytest.raises(ConfigurationError, match="has no marks"):
        between_marks("text <!-- claims: begin -->", "new")


def test_the_readmes_have_the_committed_verdicts():
    claims = read_claims(ROOT / "benchmarks/results/paper")
    assert claims_table(claims, "examples/paper/README.md") in (ROOT / "README.md").read_text()
    collected = (ROOT / "examples/paper/README.md").read_text()
    assert claims_table(claims) in collected
    for claim in claims:
        assert f"## {claim.title}\n" in collected and claim.measured in collected
        assert anchor(claim.title)
        assert claim.picture and f"results/paper/{claim.name}.png)" in collected
