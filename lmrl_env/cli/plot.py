"""``lmrl plot``: curves of training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lmrl_env.cli.screen import warn


@click.command("plot")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="curves.png",
    show_default=True,
    help="PNG to draw",
)
def plot_command(runs: tuple[Path, ...], output: Path) -> None:
    """Draw the curves of several training runs into one picture.

    \b
      lmrl plot runs/dr_grpo-* runs/grpo-* --output length_bias.png

    RUNS are folders of training runs. Those of one algorithm are one line, their mean, with a
    band from the least to the greatest.
    """
    from lmrl_env.errors import ConfigurationError
    from lmrl_env.plotting import plot_runs

    if output.suffix != ".png":
        raise ConfigurationError(f"--output {str(output)!r}: expected a file name in .png")
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    configs: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        config, rows = read_run(run)
        groups.setdefault(config["algorithm"], []).append(rows)
        configs.setdefault(config["algorithm"], []).append(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    plot_runs(groups, output)
    for algorithm, of_group in sorted(groups.items()):
        last = min(rows[-1]["step"] for rows in of_group)
        click.echo(f"{algorithm}: {len(of_group)} run{'s' * (len(of_group) > 1)}, to step {last}")
        _warn_of_settings(algorithm, configs[algorithm])
    click.echo(str(output))


NO_SETTINGS = (
    "seed",
    "steps",
    "run_dir",
    "resume",
    "save_batch",
    "profile",
    "tracker",
    "command",
    "commit",
    "hardware",
    "used",
    "python",
    "versions",
    "run_id",
    "resumed",
)
"""Keys of ``config.json`` in which runs of one line may differ."""


def _warn_of_settings(algorithm: str, configs: list[dict[str, Any]]) -> None:
    for key in sorted(set().union(*configs) - set(NO_SETTINGS)):
        values = list(dict.fromkeys(str(config.get(key)) for config in configs))
        if len(values) > 1:
            warn(f"the runs of {algorithm} are one line but differ in {key}: {', '.join(values)}")


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return ``config.json`` of a training run, and the rows of its ``metrics.jsonl``.

    Raises:
        ConfigurationError: if the folder holds no run, or the run has no row yet.
    """
    from lmrl_env.errors import ConfigurationError

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _ = config["algorithm"]
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines[:-1]]  # the last one may be half written
    except (OSError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"{str(folder)!r} is no training run ({error!r}): expected a folder with config.json "
            "and metrics.jsonl, such as runs/dr_grpo-..."
        ) from error
    if not rows:
        raise ConfigurationError(
            f"the run {str(folder)!r} has no metrics yet: expected at least one row; wait for its "
            "first evaluation"
        )
    return config, rows
