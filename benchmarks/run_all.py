"""Run the benchmarks one after another, and render `benchmarks/README.md` from what they wrote.

    python benchmarks/run_all.py                  # those of speed and memory
    python benchmarks/run_all.py --only train_step --only vs_trl
    python benchmarks/run_all.py --render         # the page alone

Times mean something on a machine that does nothing else: a higher load is warned of, and the load
at the start stands in every result.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click
from page import render
from record import RESULTS
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
CALM = 0.5


class Benchmark(NamedTuple):
    """A program of this folder.

    Attributes:
        name: of the file, without ``bench_``.
        minutes: that it takes on two cores.
        packages: that it cannot run without.
        flags: of its command line.
    """

    name: str
    minutes: float
    packages: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark("train_step", 2),
    Benchmark("vs_trl", 4, ("trl",)),
    Benchmark("local_engine", 2),
    Benchmark("rollout", 0.5),
    Benchmark("env_step", 0.5),
    Benchmark("scaling", 2),
    Benchmark("weight_sync", 1),
    Benchmark("verifier", 2),
    Benchmark("memory", 2),
    Benchmark("default_run", 5, flags=("--seeds=0", "--beside=6f10d7d")),
)


def run(benchmark: Benchmark) -> str | None:
    """Run a benchmark, and return why it has no result, or None."""
    missing = [name for name in benchmark.packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: pip install 'lmrl_env[bench]'"
    log = RESULTS / f"{benchmark.name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, str(HERE / f"bench_{benchmark.name}.py"), *benchmark.flags],
            stdout=output, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    text = log.read_text()
    log.unlink()
    if done.returncode:
        return f"ended with {done.returncode}:\n{text[-2000:]}"
    return None


def wait_until_calm(limit: float = 120.0) -> None:
    """Wait a while for the load to fall, and warn if it does not."""
    deadline = time.monotonic() + limit
    while os.getloadavg()[0] > CALM and time.monotonic() < deadline:
        time.sleep(5)
    if (load := os.getloadavg()[0]) > CALM:
        click.echo(
            f"warning: the load is {load:.1f}: times of a busy machine mean little", err=True
        )


@click.command()
@click.option("--only", multiple=True, type=click.Choice([b.name for b in BENCHMARKS]))
@click.option("--render", "only_render", is_flag=True, help="write the page alone")
def main(only: tuple[str, ...], only_render: bool) -> None:
    """Measure, and write the page."""
    chosen = [b for b in BENCHMARKS if not only_render and (not only or b.name in only)]
    if chosen:
        click.echo(f"about {sum(b.minutes for b in chosen):.0f} minutes on two cores")
        wait_until_calm()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    failures: dict[str, str] = {}
    with Progress(*columns) as progress:
        task = progress.add_task("benchmarks", total=len(chosen))
        for benchmark in chosen:
            progress.update(task, description=benchmark.name)
            if reason := run(benchmark):
                failures[benchmark.name] = reason
            progress.advance(task)
    (HERE / "README.md").write_text(render(RESULTS))
    for name, reason in failures.items():
        click.echo(f"{name}: {reason}", err=True)
    click.echo(HERE / "README.md")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
