"""``lmrl paper``: the paper's claims, measured and reported."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from lmrl_env.cli.screen import warn

if TYPE_CHECKING:
    from rich.progress import TaskID

CHECKOUT = Path(__file__).parents[2]
SCRIPTS = CHECKOUT / "examples" / "paper"
COMMITTED = CHECKOUT / "benchmarks" / "results" / "paper"
RUNS = Path("runs/paper")
REPORT = "report.html"
GUESSED_CORE_MINUTES = 10.0
"""Of a script that was never measured."""
_IS_CLAIM = re.compile(r"^@claim_options\(", re.MULTILINE)
_OUTPUT_END = 2000
_SECONDS_TO_STOP = 60.0
_IS_THERE = 0
"""No signal: only asks whether a process group exists."""


class Script(NamedTuple):
    """A script that measures a claim.

    Attributes:
        name: of the file.
        about: the first sentence of its docstring.
        core_minutes: that it takes.
        is_guess: whether that was never measured.
    """

    name: str
    about: str
    core_minutes: float
    is_guess: bool


@click.command("paper")
@click.option("--only", "only", multiple=True, metavar="NAME", help="a script; several if repeated")
@click.option("--again", is_flag=True, help="also those whose result stands in --out")
@click.option("--render", is_flag=True, help="run nothing: only build the report from --out")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    show_default="number of cores",
    help="cores to use",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=RUNS / "results",
    show_default=True,
    help="folder of the results and the report",
)
def paper_command(only: Sequence[str], again: bool, render: bool, jobs: int, out: Path) -> None:
    """Measure the paper's claims on this machine, and report them.

    In a checkout: runs the scripts of examples/paper/ at tiny scale, and writes report.html, one
    page with all verdicts, tables and figures. Ctrl-C breaks it off, and the same command goes on:
    results that stand in --out are kept, and training runs continue from their checkpoints in
    runs/paper/. To train anew, remove that folder.

    \b
      lmrl paper
      lmrl paper --only self_reflection
      lmrl paper --render --out benchmarks/results/paper

    The last line reports the committed results, and also writes the claims into README.md and
    examples/paper/README.md.
    """
    from lmrl_env.errors import UnknownNameError

    scripts = {script.name: script for script in find_scripts()}
    if unknown := sorted(set(only) - set(scripts)):
        raise UnknownNameError(
            f"--only {unknown[0]!r}: expected a script of examples/paper/, one of "
            f"{', '.join(sorted(scripts))}"
        )
    failed: dict[str, str] = {}
    if not render:
        wanted = [scripts[name] for name in only or scripts]
        failed = _measure(wanted, out, jobs, again)
    _report(list(scripts.values()), out)
    for name, output in failed.items():
        click.secho(f"\n{name} failed:", fg="red", bold=True, err=True)
        click.echo(output, err=True)
    if failed:
        raise click.ClickException(
            f"{len(failed)} of the scripts failed: {', '.join(failed)}; the same command tries "
            "them again, and the other results stand"
        )


def find_scripts() -> list[Script]:
    """Return the scripts of the checkout that this package lies in, the longest first.

    Raises:
        ConfigurationError: if the package is installed without them, or a record is broken.
    """
    from lmrl_env.errors import ConfigurationError
    from lmrl_env.gallery import read_claims

    if not (SCRIPTS / "claim.py").is_file():
        raise ConfigurationError(
            f"there are no scripts in {str(SCRIPTS)!r}, as the package is installed without them: "
            "lmrl paper works in a checkout, installed with pip install -e ."
        )
    known = {claim.name: claim.core_minutes for claim in read_claims(COMMITTED)}
    scripts = []
    for path in SCRIPTS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if _IS_CLAIM.search(text):
            about = (ast.get_docstring(ast.parse(text)) or path.stem).partition("\n")[0]
            minutes = known.get(path.stem, GUESSED_CORE_MINUTES)
            scripts.append(Script(path.stem, about, minutes, path.stem not in known))
    return sorted(scripts, key=lambda script: (-script.core_minutes, script.name))


def _measure(scripts: Sequence[Script], out: Path, jobs: int, again: bool) -> dict[str, str]:
    """Run what has no result yet, and return the end of the output of those that failed."""
    from lmrl_env.gallery import read_claims

    done = {claim.name for claim in read_claims(out) if claim.scale == "tiny"}
    todo = [script for script in scripts if again or script.name not in done]
    for script in scripts:
        about = "about" if script.is_guess else ""
        state = (
            f"{about} {max(1, script.core_minutes / jobs):.0f} min" if script in todo else "done"
        )
        click.echo(f"{script.name:24} {state.strip():>12}   {script.about}")
    total = sum(script.core_minutes for script in todo) / jobs
    click.echo(f"{len(todo)} to run, {total:.0f} minutes on {jobs} cores")
    return _run_all(todo, out, jobs)


class Running(NamedTuple):
    """A script at work.

    Attributes:
        process: of the script.
        cores: that it was given.
        log: of its output.
        row: of the progress bars.
    """

    process: subprocess.Popen[bytes]
    cores: int
    log: Path
    row: TaskID


def _run_all(todo: Sequence[Script], out: Path, jobs: int) -> dict[str, str]:
    """Run scripts over the cores, and return the end of the output of those that failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    waiting, running, failed = list(todo), dict[str, Running](), dict[str, str]()
    columns = (
        TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[said]}", markup=False),
    )  # fmt: skip
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        overall = progress.add_task("all", total=len(todo), said="")
        try:
            while waiting or running:
                free = jobs - sum(script.cores for script in running.values())
                while waiting and free:
                    cores = max(1, free // len(waiting))
                    name = waiting.pop(0).name
                    row = progress.add_task(name, total=1, said="")
                    running[name] = _start(name, out, cores, row)
                    free -= cores
                for name, script in list(running.items()):
                    progress.update(script.row, said=_last_line(script.log))
                    ended = script.process.poll()
                    if ended is None:
                        continue
                    del running[name]
                    progress.remove_task(script.row)
                    progress.advance(overall)
                    progress.console.print(f"{name}: {'failed' if ended else 'done'}")
                    if ended:
                        failed[name] = _output(script.log)[-_OUTPUT_END:]
                time.sleep(0.2)
        finally:
            for script in running.values():
                _stop(script.process)
            signal.signal(signal.SIGTERM, before)
    return failed


def _start(name: str, out: Path, cores: int, row: TaskID) -> Running:
    """Start a script in a process group of its own."""
    log = RUNS / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--scale=tiny"]
    command += [f"--jobs={cores}", f"--out={out}"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    return Running(process, cores, log, row)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a script and its training runs, which write a checkpoint first."""
    deadline = time.monotonic() + _SECONDS_TO_STOP
    number: int = signal.SIGTERM
    try:
        while True:
            os.killpg(process.pid, number)
            process.wait(_SECONDS_TO_STOP)
            time.sleep(0.2)
            number = signal.SIGKILL if time.monotonic() > deadline else _IS_THERE
    except ProcessLookupError:
        return


def _output(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _last_line(log: Path) -> str:
    """Return the last thing that a script said, at most 60 characters."""
    lines = [line.strip() for line in re.split(r"[\r\n]", _output(log)) if line.strip()]
    return lines[-1][:60] if lines else ""


def _report(scripts: Sequence[Script], out: Path) -> None:
    """Write the page, and for the committed results the two READMEs."""
    from lmrl_env.gallery import between_marks, claims_table, details, read_claims, report

    claims = read_claims(out)
    measured = {claim.name for claim in claims}
    missing = {script.name: script.about for script in scripts if script.name not in measured}
    for claim in claims:
        if claim.picture is None:
            warn(f"{claim.name}.png is missing in {out}: run {claim.command}")
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text(report(claims, missing), encoding="utf-8")
    click.echo(f"{len(claims)} claims in {out / REPORT}")
    if out.resolve() == COMMITTED:
        pictures = Path(os.path.relpath(COMMITTED, SCRIPTS)).as_posix()
        for page, content in (
            (SCRIPTS / "README.md", details(claims, pictures)),
            (CHECKOUT / "README.md", claims_table(claims, "examples/paper/README.md")),
        ):
            text = between_marks(page.read_text(encoding="utf-8"), content)
            page.write_text(text, encoding="utf-8")
            click.echo(str(page.relative_to(CHECKOUT)))
