r"""Continue the pretraining of a causal language model on text, packed into full sequences.

Liu et al. 2025, arXiv:2503.20783, section 3.4, teach Llama-3.2-3B mathematics before reinforcement
learning: two epochs of NuminaMath-1.5, each question joined to its answer, at learning rate 1e-5.

    accelerate launch examples/continue_pretrain.py --model meta-llama/Llama-3.2-3B \
        --text AI-MO/NuminaMath-1.5 --columns problem,solution --dtype bfloat16 --out numina-qa

Every document ends with the EOS, documents stand one after another in an order drawn from the seed,
and the stream is cut into sequences of one length. One seed gives one model on one machine, however
often the run was broken off: started again, it goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from lmrl_env import distributed
from lmrl_env.checkpoint import save_model
from lmrl_env.durable import whole_folder, write_text
from lmrl_env.errors import ConfigurationError, LmrlError, QuestionError
from lmrl_env.policy import load_model
from lmrl_env.questions.grammar import parse_set
from lmrl_env.questions.question_set import Drops
from lmrl_env.questions.sources import FILE_ENDINGS, Rows, read_file, read_folder, read_hub
from lmrl_env.tokenizer import load_tokenizer, model_path

Tokens = npt.NDArray[np.int32]


@dataclass
class Settings:
    """What is trained on what, and how; see the options for each of them."""

    model: str
    text: str
    columns: str
    separator: str
    out: Path
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    epochs: int
    lr: float
    warmup_steps: int
    schedule: str
    weight_decay: float
    seed: int
    dtype: str
    checkpoint_every: int


def read_documents(text: str, columns: Sequence[str], separator: str) -> tuple[list[str], int]:
    """Read a text set.

    Args:
        text: a ``.txt`` file whose documents stand between blank lines, another file, a folder or
            a hub id, with ``:config=...,split=...`` where there are several.
        columns: that are joined to a document.
        separator: between them.

    Returns:
        The documents, and how many rows were left out because a column of theirs is empty.

    Raises:
        QuestionError: if the set cannot be read, lacks a column, or holds no document.
    """
    if text.endswith(".txt"):
        try:
            parts = Path(text).read_text(encoding="utf-8").split("\n\n")
        except (OSError, UnicodeDecodeError) as error:
            raise QuestionError(f"cannot read {text!r} ({error}): expected a UTF-8 text") from error
        documents, left_out = [part.strip() for part in parts if part.strip()], 0
    else:
        documents, rows = [], list(_rows(text))
        for row in rows:
            if missing := [column for column in columns if column not in row]:
                raise QuestionError(
                    f"a row of {text!r} has no column {missing[0]!r}: its columns are "
                    f"{sorted(row)}; say which by --columns, as --columns problem,solution"
                )
            values = [row[column] for column in columns]
            if all(isinstance(value, str) and value.strip() for value in values):
                documents.append(separator.join(values))
        left_out = len(rows) - len(documents)
    if not documents:
        raise QuestionError(f"{text!r} holds no document in the columns {', '.join(columns)}")
    return documents, left_out


def _rows(text: str) -> Rows:
    name = parse_set(text)
    name.check_keys(("config", "split"))
    if name.source.endswith(FILE_ENDINGS):
        return read_file(Path(name.source), Drops())
    config, split = name.options.get("config"), name.options.get("split")
    if Path(name.source).is_dir():
        return read_folder(Path(name.source), config, split, (None, "train"))
    return read_hub(name.source, config, split or "train", "--text ")


def pack(rows: Sequence[Sequence[int]], eos: int, length: int, seed: int) -> Tokens:
    """Return documents as sequences of one length.

    Args:
        rows: token ids of each document.
        eos: that ends a document.
        length: of a sequence.
        seed: of the order of documents.

    Returns:
        Token ids, shape (sequences, length); what remains at the end is left out.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    stream = np.concatenate([np.array([*rows[i], eos], dtype=np.int32) for i in order])
    return stream[: len(stream) // length * length].reshape(-1, length)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Return the learning rate of a step, counted from 0."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "constant":
        return settings.lr * warm
    done = max(0, step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.lr * warm * (0.5 + 0.5 * math.cos(math.pi * done))


def schedule_batches(sequences: int, settings: Settings, ranks: int) -> npt.NDArray[np.int64]:
    """Return which sequences each optimiser step reads, shape (steps, batch_size).

    Raises:
        ConfigurationError: if there are too few, or a batch cannot be shared by the ranks.
    """
    size, share = settings.batch_size, settings.micro_batch_size * ranks
    if size % share:
        raise ConfigurationError(
            f"--batch-size {size}: expected a multiple of --micro-batch-size x ranks, "
            f"{settings.micro_batch_size} x {ranks} = {share}"
        )
    epochs = [
        np.random.default_rng([settings.seed, epoch]).permutation(sequences)
        for epoch in range(settings.epochs)
    ]
    order = np.concatenate(epochs)
    if len(order) < size:
        raise ConfigurationError(
            f"{settings.text!r} fills {sequences} sequences of {settings.sequence_length} tokens, "
            f"{len(order)} in all epochs, and an optimiser step takes {size}: give more text, a "
            "smaller --batch-size or a smaller --sequence-length"
        )
    return order[: len(order) // size * size].reshape(-1, size)


def optimise(
    accelerator: Accelerator, model: Any, optimizer: Any, rows: Tokens, settings: Settings
) -> float:
    """Take one optimiser step and return the mean loss, in nats a token.

    Args:
        accelerator: of this rank.
        model: as ``prepare`` returned it.
        optimizer: of it.
        rows: token ids of the whole batch, shape (batch_size, sequence_length).
        settings: of the run.
    """
    mine = torch.from_numpy(rows[accelerator.process_index :: accelerator.num_processes]).long()
    total, parts = 0.0, mine.to(accelerator.device).split(settings.micro_batch_size)
    for i, ids in enumerate(parts):
        with distributed.micro_step(accelerator, model, last=i == len(parts) - 1):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            loss = loss / (len(rows) * (rows.shape[1] - 1))
            distributed.backward(accelerator, loss)
            total += loss.item()
    distributed.clip_grad_norm(accelerator, model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(distributed.all_sum(accelerator, [total])[0])


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, sequences: Tokens, settings: Settings
) -> list[float]:
    """Train in place, from the last checkpoint on if there is one, and return all losses."""
    batches = schedule_batches(len(sequences), settings, accelerator.num_processes)
    losses: list[float] = []
    unfinished = last_checkpoint(accelerator, settings.out)
    record = json.dumps({**asdict(settings), "out": ""}, default=str)
    if (unfinished / "losses.json").exists():
        before, losses = json.loads((unfinished / "losses.json").read_text())
        if before != record:
            raise ConfigurationError(
                f"{unfinished} holds a run with other settings: {before}; expected {record}. "
                "Give those, or remove the folder"
            )
        accelerator.load_state(str(unfinished))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("pretrain", total=len(batches), completed=len(losses))
        for step in range(len(losses), len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(batches), settings)
            rows = sequences[batches[step]]
            losses.append(optimise(accelerator, model, optimizer, rows, settings))
            progress.update(task, advance=1, description=f"pretrain, loss {losses[-1]:.3f}")
            if settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0:
                save_checkpoint(accelerator, unfinished, json.dumps([record, losses]))
    return losses


def checkpoint_folder(out: Path) -> Path:
    """Return where an unfinished run keeps its last checkpoint."""
    return out.with_name(f"{out.name}.unfinished")


def last_checkpoint(accelerator: Accelerator, out: Path) -> Path:
    """Return where the last checkpoint is, if there is one, or shall be."""
    folder = checkpoint_folder(out)
    newer = folder.with_name(f"{folder.name}.partial")
    if accelerator.is_main_process and not folder.exists() and (newer / "losses.json").exists():
        newer.rename(folder)  # broken off after the old one was removed
    distributed.wait_for_everyone(accelerator)
    return folder


def save_checkpoint(accelerator: Accelerator, folder: Path, losses: str) -> None:
    """Replace the checkpoint; at every moment there is a whole one, once there was one."""
    partial = folder.with_name(f"{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    distributed.wait_for_everyone(accelerator)
    accelerator.save_state(str(partial))
    distributed.wait_for_everyone(accelerator)
    if accelerator.is_main_process:
        write_text(partial / "losses.json", losses)  # last: it says that the rest is whole
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    distributed.wait_for_everyone(accelerator)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base}---

# {name}

`{model}` after continued pretraining on `{text}`: {documents:,} documents of the columns
{columns}, {tokens:,} tokens in {sequences:,} sequences, {left_out:,} rows with an empty column left
out. The loss went from {first:.3f} to {last:.3f} nats a token (first and last tenth of the steps).

{recipe}

Made by `examples/continue_pretrain.py` of lmrl_env.
"""


def run(settings: Settings) -> None:
    """Train a model and write its folder."""
    if settings.out.exists():
        raise ConfigurationError(f"--out {settings.out} exists: name a new folder")
    documents, left_out = read_documents(
        settings.text, settings.columns.split(","), settings.separator
    )
    eos = load_tokenizer(settings.model).eos_token_ids[-1]
    tokenizer = AutoTokenizer.from_pretrained(model_path(settings.model))
    sequences = pack(
        tokenizer(documents)["input_ids"], eos, settings.sequence_length, settings.seed
    )
    accelerator = distributed.make_accelerator("auto", settings.dtype, None, str(settings.out))
    model = load_model(settings.model, attention="sdpa")
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    losses = train(accelerator, prepared, optimizer, sequences, settings)
    weights = accelerator.get_state_dict(prepared)
    if accelerator.is_main_process:
        tenth = max(1, len(losses) // 10)
        is_hub_id = settings.model != "tiny" and not Path(settings.model).exists()
        card = CARD.format(
            **{**asdict(settings), "columns": settings.columns.replace(",", " and ")},
            base=f"base_model: {settings.model}\n" if is_hub_id else "",
            name=settings.out.name, documents=len(documents), left_out=left_out,
            tokens=sequences.size, sequences=len(sequences),
            first=np.mean(losses[:tenth]), last=np.mean(losses[-tenth:]),
            recipe="\n".join(f"- {key}: {value}" for key, value in asdict(settings).items()),
        )  # fmt: skip
        with whole_folder(settings.out) as folder:
            save_model(folder, model, weights, settings.model)
            (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(checkpoint_folder(settings.out), ignore_errors=True)
        click.echo(f"{len(losses)} steps; the model is in {settings.out}")
    del prepared, optimizer
    distributed.shutdown(accelerator)


at_least_one = click.IntRange(min=1)


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option("--model", required=True, help="tiny, a folder or a hub id")
@click.option("--text", required=True, help="a .txt, .jsonl[.gz] or .parquet file or a hub id")
@click.option("--columns", default="text", help="one, or several that are joined: problem,solution")
@click.option("--separator", default="\n", help="between the columns")
@click.option("--out", required=True, type=Path, help="folder for the model, which must not exist")
@click.option("--sequence-length", default=2048, type=click.IntRange(min=2), help="in tokens")
@click.option("--batch-size", default=64, type=at_least_one, help="sequences an optimiser step")
@click.option("--micro-batch-size", default=1, type=at_least_one, help="sequences a forward pass")
@click.option("--epochs", default=2, type=at_least_one)
@click.option("--lr", default=1e-5, type=click.FloatRange(0, min_open=True))
@click.option("--warmup-steps", default=0, type=click.IntRange(min=0))
@click.option("--schedule", default="constant", type=click.Choice(["constant", "cosine"]))
@click.option("--weight-decay", default=0.0, type=click.FloatRange(0))
@click.option("--seed", default=0, type=click.IntRange(0))
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@click.option("--checkpoint-every", default=500, type=click.IntRange(0), help="steps; 0: never")
def main(**values: Any) -> None:
    """Continue the pretraining of a causal language model, and write its folder."""
    try:
        run(Settings(**values))
    except LmrlError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
