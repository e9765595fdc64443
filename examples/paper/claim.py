"""What the scripts of this folder share: options, training runs, intervals, and a verdict.

A script states a claim of the paper, measures it, and writes three files beside each other:
`NAME.json` (all figures), `NAME.png` and `NAME.md` (the verdict). Training runs are the programs of
`algos/`, started by their command line. Runs that stand whole in the runs' folder are not repeated,
and one that was broken off goes on where it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import numpy as np
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmrl_env.provenance import provenance

try:
    from scipy import stats
except ModuleNotFoundError:
    sys.exit("the scripts of examples/paper need SciPy: pip install -e '.[paper]'")

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "paper"


@dataclass
class Options:
    """How a claim is tested.

    Attributes:
        scale: ``tiny``, in minutes on two cores, or ``paper``, the paper's own experiment.
        model: the base model, or None for the claim's own.
        engine: what samples at the paper's scale.
        questions: to train on, or None for the claim's own.
        seeds: of the main comparison; a script says where it takes fewer.
        jobs: training runs at one time, each with one thread at tiny scale.
        runs_dir: where runs and models are kept.
        out: where JSON, picture and verdict go.
        dry_run: whether to print the training runs and stop.
        started: when the script did, by ``time.perf_counter``.
        earlier_seconds: of training runs that stood there already when the script was started.
    """

    scale: Literal["tiny", "paper"]
    model: str | None
    engine: str | None
    questions: str | None
    seeds: int
    jobs: int
    runs_dir: Path
    out: Path
    dry_run: bool
    started: float = field(default_factory=time.perf_counter)
    earlier_seconds: float = 0.0

    @property
    def is_tiny(self) -> bool:
        """Whether this is to run on a laptop."""
        return self.scale == "tiny"


def claim_options(seeds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a script its command line.

    A ``click.option`` above this decorator is an option of that script alone, and an argument of
    its program besides the ``Options``.

    Args:
        seeds: by default.
    """

    def decorate(program: Callable[..., None]) -> Callable[..., None]:
        @click.command(help=program.__doc__)
        @click.option("--scale", type=click.Choice(["tiny", "paper"]), default="tiny",
                      show_default=True)  # fmt: skip
        @click.option("--model", help="Base model; by default the claim's own.")
        @click.option("--engine", type=click.Choice(["local", "vllm", "vllm_server"]))
        @click.option("--questions", help="Questions to train on; by default the claim's own.")
        @click.option("--seeds", default=seeds, show_default=True, type=click.IntRange(1))
        @click.option("--jobs", default=2, show_default=True, type=click.IntRange(1),
                      help="Runs at one time; at the paper's scale 1.")  # fmt: skip
        @click.option("--runs-dir", default="runs/paper", show_default=True, type=Path)
        @click.option("--out", default=RESULTS, type=Path, help="Folder of the results.")
        @click.option("--dry-run", is_flag=True, help="Print the training runs and stop.")
        @wraps(program)
        def command(**values: Any) -> None:
            common = [field.name for field in fields(Options) if field.name in values]
            program(Options(**{name: values.pop(name) for name in common}), **values)

        return command

    return decorate


class Job(NamedTuple):
    """A training run.

    Attributes:
        name: of its folder.
        program: an algorithm file.
        flags: as of the command line, without dashes; True is a bare flag, None is not given.
    """

    name: str
    program: Path
    flags: Mapping[str, Any]


def algorithm(name: str) -> Path:
    """Return the path of a file of ``algos/``, or of one beside this one."""
    beside = Path(__file__).with_name(f"{name}.py")
    return beside if beside.exists() else ROOT / "algos" / f"{name}.py"


def train(options: Options, jobs: Sequence[Job]) -> dict[str, Path]:
    """Train what has not been trained yet, several runs at one time.

    Args:
        options: of the script.
        jobs: with different names.

    Returns:
        The folder of each run by its name.

    Raises:
        ClickException: if a run fails, with the end of its output.
    """
    folders = {job.name: options.runs_dir / job.name for job in jobs}
    if options.dry_run:
        for job in jobs:
            click.echo(shlex.join(_command(job, folders[job.name], options)))
        raise SystemExit(0)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    parallel = options.jobs if options.is_tiny else 1
    options.earlier_seconds += sum(map(_seconds, folders.values())) / max(
        1, min(parallel, len(jobs))
    )
    with Progress(*columns) as progress, ThreadPoolExecutor(parallel) as pool:
        task = progress.add_task("training runs", total=len(jobs))
        running = {pool.submit(_run, job, folders[job.name], options): job for job in jobs}
        try:
            for n, done in enumerate(as_completed(running), start=1):
                done.result()
                progress.console.print(f"{n} of {len(jobs)} runs: {running[done].name}")
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return folders


def _command(job: Job, folder: Path, options: Options) -> list[str]:
    flags = {**job.flags, "engine": options.engine or ("local" if options.is_tiny else "vllm")}
    place = f"--resume={folder}" if (folder / "config.json").exists() else f"--run-dir={folder}"
    given = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in flags.items()
        if value is not None
    ]
    return [sys.executable, str(job.program), place, *given]


def _run(job: Job, folder: Path, options: Options) -> None:
    with alone(folder):
        rows = read_rows(folder)
        if rows and rows[-1]["step"] >= job.flags["steps"]:
            return
        threads = {"OMP_NUM_THREADS": "1"} if options.is_tiny else {}
        earlier, started = _seconds(folder), time.perf_counter()
        done = subprocess.run(
            _command(job, folder, options),
            env={**os.environ, **threads},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if folder.is_dir():
            seconds = earlier + time.perf_counter() - started
            (folder / "seconds.json").write_text(f"{seconds:.1f}\n")
    if done.returncode:
        raise click.ClickException(
            f"the run {job.name!r} ended with {done.returncode}:\n{done.stdout[-2000:]}\n"
            "start this script again to go on with it"
        )


@contextmanager
def alone(folder: Path, seconds: float = 3600.0) -> Iterator[None]:
    """Keep other scripts from a run or a model, as long as this one makes it.

    Scripts that run side by side share some of them: the second one waits, and finds it made.

    Args:
        folder: of the run or the model; it need not exist.
        seconds: to wait for another script.

    Raises:
        ClickException: if another script has it still.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise click.ClickException(
                        f"another script has been making {folder} for {seconds:.0f} s: start "
                        "this one again when it is there"
                    ) from None
                time.sleep(0.2)
        yield


def _seconds(folder: Path) -> float:
    """Return how long a training run has taken so far."""
    path = folder / "seconds.json"
    return float(path.read_text()) if path.exists() else 0.0


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``; none if there is no such file."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curves(folders: Sequence[Path], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a metric over training.

    Args:
        folders: of runs of the same length, one a seed.
        key: of ``metrics.jsonl``.

    Returns:
        The steps that have it, shape (steps,), and its values, shape (seeds, steps); nan where a
        run lacks it.
    """
    runs = [{row["step"]: row.get(key) for row in read_rows(folder)} for folder in folders]
    steps = sorted({step for run in runs for step, value in run.items() if value is not None})
    values = [[np.nan if run.get(s) is None else run[s] for s in steps] for run in runs]
    return np.array(steps), np.array(values, dtype=float)


class Interval(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean over seeds and its 95% interval by Student's t; nan for one seed.

    >>> print(interval([1.0, 2.0, 3.0]))
    2 [-0.484, 4.48]
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Interval(float(x.mean()), float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def draw(axes: Any, steps: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    """Draw the mean over seeds and a band from the least to the greatest.

    Args:
        axes: of Matplotlib.
        steps: shape (steps,).
        values: shape (seeds, steps).
        label: of the line.
        color: of line and band.
    """
    axes.plot(steps, np.nanmean(values, axis=0), color=color, label=label)
    axes.fill_between(
        steps, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=color, alpha=0.2, lw=0
    )


class Verdict(NamedTuple):
    """What became of a claim.

    Attributes:
        section: of the paper, with its figures and tables.
        claim: in a sentence.
        measured: in a sentence or two, with figures and intervals.
        holds: ``holds``, ``partly`` or ``does not hold``, at this scale.
        reason: why it came out so, and what was done to test that.
        seeds: how many, of which part.
    """

    section: str
    claim: str
    measured: str
    holds: Literal["holds", "partly", "does not hold"]
    reason: str
    seeds: str


def write(
    options: Options, name: str, title: str, verdict: Verdict, figures: Mapping[str, Any],
    picture: Figure, tables: str = "",
) -> None:  # fmt: skip
    """Write ``NAME.json``, ``NAME.png`` and ``NAME.md``, and print the verdict.

    Args:
        options: of the script.
        name: of the script.
        title: of the claim, a few words.
        verdict: on it.
        figures: everything that was measured.
        picture: at most 14 inches wide.
        tables: Markdown that stands below the verdict.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    picture.savefig(options.out / f"{name}.png", dpi=120)
    minutes = (options.earlier_seconds + time.perf_counter() - options.started) / 60
    record = {
        "name": name,
        "title": title,
        "scale": options.scale,
        "date": time.strftime("%Y-%m-%d"),
        **provenance(),
        "minutes": round(minutes, 1),
        "jobs": options.jobs,
        "verdict": verdict._asdict(),
        "figures": figures,
    }
    record["command"] = f"python examples/paper/{name}.py --scale {options.scale}"
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        f"## {title}",
        f"**The paper ({verdict.section}):** {verdict.claim}",
        f"**Measured, {options.scale} scale ({verdict.seeds}):** {verdict.measured}",
        f"**Verdict: {verdict.holds}.** {verdict.reason}",
        *([tables.strip()] if tables else []),
        f"![{title}]({name}.png)",
        f"`{record['command']}`",
    ]
    (options.out / f"{name}.md").write_text("\n\n".join(lines) + "\n")
    click.echo("\n\n".join(lines))
