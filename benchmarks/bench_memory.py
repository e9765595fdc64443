"""Peak memory of a training step: its logits in pieces or at once, its trunk checkpointed or not.

    python benchmarks/bench_memory.py

Writes `results/memory.json` and `results/memory.png`. A step is the forward and backward pass of
one micro-batch by a random Qwen2, entropies computed but not in the loss, as in all of `algos/`.
In pieces, at most `LOGITS_AT_ONCE` logits exist at a time. Each point is the step of a process of
its own, on one thread: the peak of its resident memory, less what it has before the step, model and
gradients included. Linux only.
"""

from __future__ import annotations

import multiprocessing
import operator
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
import record
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.progress import track
from transformers import AutoModelForCausalLM, Qwen2Config

import lmrl_env.policy
from lmrl_env.attention import use_packed_attention
from lmrl_env.policy import LOGITS_AT_ONCE, Policy, TokenBatch

MIB = 2**20
RESPONSES = 8
PROMPT = 64
VOCAB = 151_936  # Qwen2.5's
LENGTHS = (16, 32, 64, 128, 256, 512)
LENGTH = 128  # where the vocabulary varies
LONGEST_AT_ONCE = 128  # of LENGTHS: all its logits at once take 1.7 GiB
VOCABS = (1024, 16_384, 32_768, 65_536, 98_304, VOCAB)
TRUNK: dict[str, Any] = {"vocab": 1024, "layers": 8, "hidden": 256}
TRUNK_LENGTHS = (64, 256)


class Point(NamedTuple):
    length: int
    vocab: int = VOCAB
    in_pieces: bool = True
    layers: int = 1
    hidden: int = 64
    checkpointing: bool = False
    dtype: str = "float32"


def resident(name: str) -> int:
    """Return bytes of resident memory: ``VmRSS`` now, ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}: expected a Linux kernel")


def random_policy(point: Point) -> Policy:
    config = Qwen2Config(
        vocab_size=point.vocab, hidden_size=point.hidden, intermediate_size=4 * point.hidden,
        num_hidden_layers=point.layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=PROMPT + max(LENGTHS),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, point.dtype))
    use_packed_attention(model)
    if point.checkpointing:
        model.gradient_checkpointing_enable()
    return Policy(model, point.vocab).train()


def step(policy: Policy, length: int) -> None:
    batch = TokenBatch(
        prompt_ids=torch.randint(policy.vocab_size, (1, PROMPT)),
        prompt_lengths=torch.tensor([PROMPT]),
        prompt_index=torch.zeros(RESPONSES, dtype=torch.int64),
        response_ids=torch.randint(policy.vocab_size, (RESPONSES, length)),
        response_lengths=torch.full((RESPONSES,), length),
    )
    logprobs, _ = policy(batch, temperature=1.0, with_entropy=True)
    (logprobs.sum() / logprobs.numel()).backward()


def peak(point: Point) -> int:
    """Return the peak of a step in bytes, above what the process has before."""
    torch.set_num_threads(1)
    policy = random_policy(point)
    if not point.in_pieces:
        lmrl_env.policy.LOGITS_AT_ONCE = RESPONSES * point.length * point.vocab
    step(policy, 1)  # makes the gradients, which stay
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = resident("VmRSS")
    step(policy, point.length)
    return resident("VmHWM") - before


def expected(point: Point) -> int:
    """Return bytes of logits, and of the head's gradient, at the peak of a step.

    Three tensors of float32 as large as the logits are there in the backward pass: logits,
    log-probabilities, and probabilities, which become the gradient of the logits. In pieces the
    gradients of the head's weight, (V, H), are summed over them: two tensors.
    """
    logits = RESPONSES * point.length * point.vocab
    if not point.in_pieces:
        return 4 * 3 * logits
    return 4 * (3 * min(logits, LOGITS_AT_ONCE) + 2 * point.vocab * point.hidden)


def points() -> list[Point]:
    lengths = [Point(n) for n in LENGTHS]
    vocabs = [Point(LENGTH, vocab) for vocab in VOCABS]
    at_once = [p._replace(in_pieces=False) for p in lengths + vocabs if p.length <= LONGEST_AT_ONCE]
    trunks = [
        Point(n, **TRUNK, checkpointing=checkpointing, dtype=dtype)
        for n in TRUNK_LENGTHS
        for checkpointing in (False, True)
        for dtype in ("float32", "bfloat16")
    ]
    return list(dict.fromkeys(lengths + vocabs + at_once + trunks))


def measure() -> list[dict[str, Any]]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # what is larger goes back when it is freed
    context = multiprocessing.get_context("spawn")
    rows = []
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for point in track(points(), description="measuring"):
            rows.append({**point._asdict(), "peak_mib": pool.submit(peak, point).result() / MIB})
            if point.layers == 1:
                rows[-1]["expected_mib"] = expected(point) / MIB
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw peaks as dots, and as lines what is expected of the logits and of their head."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle("Peak memory of a training step, MiB above model and gradients")
    by_length, by_vocab, of_trunk = figure.subplots(1, 3)
    head = [row for row in rows if row["layers"] == 1]
    for axes, key, chosen in (
        (by_length, "length", [row for row in head if row["vocab"] == VOCAB]),
        (by_vocab, "vocab", [row for row in head if row["length"] == LENGTH]),
    ):
        for in_pieces, color in ((False, "C1"), (True, "C0")):
            own = [row for row in chosen if row["in_pieces"] == in_pieces]
            own.sort(key=operator.itemgetter(key))
            x = [row[key] for row in own]
            axes.plot(x, [row["expected_mib"] for row in own], color=color)
            label = "logits in pieces" if in_pieces else "logits at once"
            axes.plot(x, [row["peak_mib"] for row in own], "o", color=color, label=label)
    by_length.set_xlabel(f"tokens of each of {RESPONSES} responses, V = {VOCAB:,}")
    by_vocab.set_xlabel(f"vocabulary, {RESPONSES} responses of {LENGTH} tokens")
    for checkpointing in (False, True):
        for dtype, style in (("float32", "o-"), ("bfloat16", "o:")):
            own = [
                row for row in rows
                if row["layers"] > 1 and row["checkpointing"] == checkpointing
                and row["dtype"] == dtype
            ]  # fmt: skip
            label = f"{dtype}, checkpointed" if checkpointing else dtype
            x, y = [row["length"] for row in own], [row["peak_mib"] for row in own]
            of_trunk.plot(x, y, style, color="C0" if checkpointing else "C1", label=label)
    of_trunk.set_xlabel(f"tokens of each response, {TRUNK['layers']} layers of {TRUNK['hidden']}")
    by_vocab.xaxis.set_major_formatter(EngFormatter())
    for axes in (by_length, by_vocab, of_trunk):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    """Return all points, with the ratio of at once to in pieces where both are there."""
    at_once = {
        (row["length"], row["vocab"]): row["peak_mib"] for row in rows if not row["in_pieces"]
    }
    lines = [
        "| length | vocabulary | trunk | logits | peak, MiB | expected | at once / in pieces |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        other = at_once.get((row["length"], row["vocab"])) if row["in_pieces"] else None
        trunk = f"{row['layers']} × {row['hidden']}, {row['dtype']}"
        cells = [
            str(row["length"]),
            str(row["vocab"]),
            trunk + (", checkpointed" if row["checkpointing"] else ""),
            "in pieces" if row["in_pieces"] else "at once",
            f"{row['peak_mib']:.0f}",
            f"{row['expected_mib']:.0f}" if "expected_mib" in row else "",
            f"{other / row['peak_mib']:.1f}" if other and row["layers"] == 1 else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
def main() -> None:
    """Measure a step's peak against response length, vocabulary and size of the trunk."""
    rows = measure()
    record.RESULTS.mkdir(exist_ok=True)
    plot(rows, record.RESULTS / "memory.png")
    record.write("memory", {"responses": RESPONSES, "prompt_tokens": PROMPT, "points": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
