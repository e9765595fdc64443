"""The training step's forward and backward: beside a plain padded one, and beside its floor.

    python benchmarks/bench_train_step.py

A micro-batch of the default job's shape, R1 prompts of 150 tokens and 16 × 8 responses of varied
lengths, through `Policy` and through a plain forward of every padded prompt with its response. The
floor is the time of the matrix products alone: 6 operations a weight and token, over the rate at
which one of the model's layers is multiplied in the same round, forward and backward. There are two
such rates, that of `torch.mm` and that of oneDNN, which the linear layers of a loaded model use.

Writes `results/train_step.json` and `results/train_step.png`: the share of the floor over the
model's width, and seconds over response length, group size and number of groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import click
import matplotlib
import numpy as np
import record
import torch
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lmrl_env.attention import use_packed_attention
from lmrl_env.linear import linear, use_onednn
from lmrl_env.policy import Policy, TokenBatch
from lmrl_env.rms_norm import use_fused_norms
from lmrl_env.tokenizer import model_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTHS = (64, 128, 192, 256, 384)
TINY_WIDTH, WIDTH_OF_3M = 128, 256
PROMPT = 150
VOCABULARY = 480


def random_model(width: int) -> PreTrainedModel:
    """Return a random model of the tiny one's shape, at a width."""
    config = LlamaConfig.from_pretrained(model_path("tiny"))
    config.update(
        {"hidden_size": width, "intermediate_size": 3 * width, "initializer_range": 0.02}
        | {"num_attention_heads": width // 32, "num_key_value_heads": width // 64}
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def random_batch(
    groups: int, group_size: int, mean_length: int, prompt: int = PROMPT
) -> TokenBatch:
    """Return prompts of one length and responses whose lengths vary twofold around a mean."""
    rng = np.random.default_rng(0)
    n = groups * group_size
    lengths = rng.integers(mean_length // 2, mean_length * 3 // 2, n, endpoint=True)
    ids = rng.integers(1, VOCABULARY, (n, lengths.max()))
    ids[np.arange(ids.shape[1]) >= lengths[:, None]] = 0
    return TokenBatch(
        torch.from_numpy(rng.integers(1, VOCABULARY, (groups, prompt))),
        torch.full((groups,), prompt),
        torch.arange(groups).repeat_interleave(group_size),
        torch.from_numpy(ids),
        torch.from_numpy(lengths),
    )


def policy_step(model: PreTrainedModel, batch: TokenBatch) -> Callable[[], Tensor]:
    policy = Policy(model, VOCABULARY)

    def step() -> Tensor:
        logprobs, _ = policy(batch, temperature=1.0, with_entropy=True)
        logprobs.mean().backward()
        return logprobs

    return step


def padded_step(model: PreTrainedModel, batch: TokenBatch) -> Callable[[], Tensor]:
    """Return the step that most trainers do: left-padded prompts, every row a prompt of its own."""
    rows = torch.cat([batch.prompt_ids[batch.prompt_index], batch.response_ids], dim=1)
    length = batch.response_ids.shape[1]
    mask = torch.arange(length) < batch.response_lengths[:, None]
    attended = torch.cat([torch.ones(len(rows), rows.shape[1] - length) > 0, mask], dim=1).long()

    def step() -> Tensor:
        logits = model(input_ids=rows, attention_mask=attended, logits_to_keep=length + 1).logits
        logits = logits[:, :-1, :VOCABULARY]
        taken = logits.log_softmax(-1).gather(-1, batch.response_ids[..., None])[..., 0]
        logprobs = taken * mask
        logprobs.mean().backward()
        return logprobs

    return step


def operations(model: PreTrainedModel, batch: TokenBatch) -> float:
    """Return the floating-point operations of the matrix products with weights, none padded."""
    head = model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p is not head)
    tokens = int(batch.prompt_lengths.sum() + (batch.response_lengths - 1).sum())
    return 6.0 * (tokens * weights + int(batch.response_lengths.sum()) * VOCABULARY * head.shape[1])


def matmul(width: int, tokens: int) -> Callable[[], float]:
    """Return one layer's products, forward and backward, which return their operations."""
    x, weight, gradient = (
        torch.randn(shape) for shape in ((tokens, width), (3 * width, width), (tokens, 3 * width))
    )
    y, x_grad, weight_grad = (torch.empty_like(z) for z in (gradient, x, weight))

    def products() -> float:
        torch.mm(x, weight.T, out=y)
        torch.mm(gradient, weight, out=x_grad)
        torch.mm(gradient.T, x, out=weight_grad)
        return 6.0 * x.numel() * 3 * width

    return products


def onednn_matmul(width: int, tokens: int) -> Callable[[], float]:
    """Return the same products by oneDNN."""
    x = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(3 * width, width, requires_grad=True)
    gradient = torch.randn(tokens, 3 * width)

    def products() -> float:
        torch.autograd.grad(linear(x, weight), (x, weight), gradient)
        return 6.0 * x.numel() * 3 * width

    return products


def seconds(step: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    step()
    return clock() - started


def at_width(width: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the times of a width: packed, padded, and the floor."""
    batch = random_batch(16, 8, 38)
    plain, packed = random_model(width), random_model(width)
    for use in (use_packed_attention, use_onednn, use_fused_norms):  # as load_model does
        use(packed)
    ours, theirs = policy_step(packed, batch), padded_step(plain, batch)
    tokens = int(batch.prompt_lengths.sum() + batch.response_lengths.sum())
    products = {"torch_mm": matmul(width, tokens), "onednn": onednn_matmul(width, tokens)}
    apart = (ours() - theirs()).detach().abs().max().item()
    total = operations(packed, batch)
    shares: dict[str, list[float]] = {name: [] for name in products}
    ratios, times = [], []
    for _ in range(rounds):
        own, other = seconds(ours, clock), seconds(theirs, clock)
        for name, product in products.items():
            floor = total * median(seconds(product, clock) for _ in range(5)) / product()
            shares[name].append(floor / own)
        ratios.append(other / own)
        times.append(own)
        for model in (plain, packed):
            model.zero_grad()
    return {
        "parameters": sum(p.numel() for p in packed.parameters()),
        "seconds": median(times),
        **{f"share_of_{name}_rate": median(shares[name]) for name in shares},
        "padded_over_packed": median(ratios),
        "logprobs_apart": apart,
    }


def over(
    values: tuple[int, ...], batch_of: Callable[[int], TokenBatch], rounds: int,
    clock: Callable[[], float],
) -> dict[int, float]:  # fmt: skip
    """Return the seconds of a step of the tiny width for batches of several sizes, in turn."""
    model = random_model(TINY_WIDTH)
    for use in (use_packed_attention, use_onednn, use_fused_norms):
        use(model)
    steps = {value: policy_step(model, batch_of(value)) for value in values}
    times: dict[int, list[float]] = {value: [] for value in values}
    for turn in range(rounds + 1):
        for value, step in steps.items():
            elapsed = seconds(step, clock)
            if turn:
                times[value].append(elapsed)
    return {value: median(measured) for value, measured in times.items()}


def draw(figures: dict[str, Any], sweeps: dict[str, dict[int, float]]) -> None:
    figure, axes = plt.subplots(1, 1 + len(sweeps), figsize=(16, 3.6), constrained_layout=True)
    widths = figures["widths"]
    for name in ("torch_mm", "onednn"):
        share = [100 * row[f"share_of_{name}_rate"] for row in widths.values()]
        axes[0].plot(list(widths), share, "o-", label=name)
    axes[0].set(xlabel="hidden size", ylabel="% of the measured matmul rate", ylim=(0, None))
    axes[0].legend()
    for axis, (name, times) in zip(axes[1:], sweeps.items(), strict=True):
        x, y = np.array(list(times)), np.array(list(times.values()))
        axis.plot(x, y, "o")
        slope, start = np.polyfit(x, y, 1)
        line = np.array([0, x.max()])
        axis.plot(line, start + slope * line, "--", lw=1, color="grey")
        axis.set(xlabel=name, ylabel="seconds a step", ylim=(0, None), xlim=(0, None))
    figure.savefig(record.RESULTS / "train_step.png", dpi=120)


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--clock", "name", type=click.Choice(["wall", "cpu"]), default="wall",
              show_default=True, help="cpu for one thread on a busy machine")  # fmt: skip
def main(rounds: int, threads: int, name: str) -> None:
    """Measure the training step's forward and backward."""
    torch.set_num_threads(threads)
    clock = time.perf_counter if name == "wall" else time.process_time
    widths = {w: at_width(w, rounds, clock) for w in track(WIDTHS, description="widths")}
    sweeps = {
        "mean response length": over(
            (24, 48, 96, 144, 192), lambda k: random_batch(4, 8, k), rounds, clock
        ),
        "group size": over((4, 8, 16, 24, 32), lambda g: random_batch(4, g, 38), rounds, clock),
        "groups": over((2, 4, 8, 12, 16), lambda q: random_batch(q, 8, 38), rounds, clock),
    }
    figures = {"threads": threads, "clock": name, "widths": widths, "seconds_over": sweeps}
    draw(figures, sweeps)
    record.write("train_step", figures)


if __name__ == "__main__":
    main()
