"""``lmrl export``: a trained model as a Transformers folder with a model card."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--step",
    default="last",
    show_default=True,
    metavar="N|best|last",
    help="which checkpoint; best is that of the highest held-out accuracy",
)
def export_command(run: Path, folder: Path, step: str) -> None:
    """Write a checkpoint as a Transformers folder with a model card.

    \b
      lmrl export runs/dr_grpo-MathR1-v0-s0-20260101-120000 my-model --step best
      lmrl export runs/RUN/checkpoints/step-100 my-model

    RUN is the folder of a training run, or of one of its checkpoints. Checksums are verified
    before, and the model is loaded after. What only a resumed run needs is left out.
    """
    from transformers.utils import logging as transformers_logging

    from lmrl_env.export import export

    transformers_logging.disable_progress_bar()
    source = export(run, folder, step)
    click.echo(f"{source} → {folder}")
    click.echo(f"evaluate it with: lmrl eval --model {folder} --suite arithmetic")
