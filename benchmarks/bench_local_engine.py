"""The local engine beside Transformers' `generate`, its continuous batching, and vLLM.

    python benchmarks/bench_local_engine.py

All sample the default job's batch: the tiny model, 16 questions in the R1 template × 8 responses of
at most 96 tokens, until EOS. They take turns within one process; a ratio is that of their seconds
per sampled token in the same round. An engine that cannot run here is listed with the reason.

The floor is the model's FLOPs for these prompts, once each, and these responses, or, if that takes
longer, the bytes of weights, keys and values that every decode step reads, at the measured rates.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import click
import floor
import gymnasium as gym
import numpy as np
import record
import torch
from rich.progress import track
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from lmrl_env import make_engine
from lmrl_env.env import unwrap
from lmrl_env.rollout import response_seeds
from lmrl_env.tokenizer import model_path
from lmrl_env.types import Sampling

PAGE_SIZE, PREFILL_TOKENS = 64, 8192

Sampler = Callable[[list[list[int]], int], list[int]]
"""Samples a group of responses to each prompt, in a round, and returns their lengths in tokens."""


def of_engine(name: str, group_size: int, budget: int, max_model_len: int) -> Sampler:
    engine = make_engine(name, "tiny", max_model_len=max_model_len)

    def sample(prompts: list[list[int]], turn: int) -> list[int]:
        seeds = response_seeds(0, turn, len(prompts) * group_size).tolist()
        completions = engine.generate(prompts, Sampling(budget), group_size, seeds)
        return [len(completion.token_ids) for completion in completions]

    return sample


def of_transformers(group_size: int, budget: int, continuous: bool) -> Sampler:
    model = AutoModelForCausalLM.from_pretrained(model_path("tiny"), dtype=torch.float32).eval()
    eos = model.config.eos_token_id
    config = GenerationConfig(
        do_sample=True, max_new_tokens=budget, top_k=0, top_p=1.0,
        eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip

    def sample(prompts: list[list[int]], turn: int) -> list[int]:
        torch.manual_seed(turn)
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        if continuous:
            # Room for every row at once: by default it takes most of the machine's memory.
            blocks = sum(-(-(len(row) + budget) // PAGE_SIZE) for row in rows)
            outputs = model.generate_batch(
                rows,
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE_SIZE, num_blocks=blocks, max_batch_tokens=PREFILL_TOKENS
                ),
                progress_bar=False,
            )
            return [len(output.generated_tokens) for output in outputs.values()]
        width = max(map(len, rows))
        ids = torch.tensor([[eos] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        is_eos = (output[:, width:] == eos).numpy()
        length = np.where(is_eos.any(axis=1), is_eos.argmax(axis=1) + 1, is_eos.shape[1])
        return length.tolist()

    return sample


def least_work(prompts: list[list[int]], lengths: list[int]) -> dict[str, float]:
    """Return FLOPs and bytes of a batch whose prompts are forwarded once a group."""
    config = AutoConfig.from_pretrained(model_path("tiny"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = config.vocab_size * config.hidden_size
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    per_place = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    group = len(lengths) // len(prompts)
    flops = moved = 0.0
    for i, prompt in enumerate(prompts):
        p = len(prompt)
        flops += 2 * (blocks * p + head) + per_pair * p * (p + 1) / 2
        fed = [length - 1 for length in lengths[i * group : (i + 1) * group]]
        for k in fed:  # the last token of a response is not fed
            flops += 2 * (blocks + head) * k + per_pair * (p * k + k * (k + 1) / 2)
            moved += per_place * k * (k + 1) / 2
        moved += per_place * p * max(fed)
    moved += 4 * (blocks + head) * max(lengths)
    return {"flops": flops, "moved_bytes": moved}


def make_samplers(
    group_size: int, budget: int, max_model_len: int, names: tuple[str, ...]
) -> tuple[dict[str, Sampler], dict[str, str]]:
    """Return the engines that sample here, warmed up, and why others do not."""
    local = of_engine("local", group_size, budget, max_model_len)
    local([[1, 2, 3]], 0)
    samplers, absent = {"local": local}, {}
    makers: dict[str, Callable[[], Sampler]] = {
        "generate": lambda: of_transformers(group_size, budget, continuous=False),
        "generate_batch": lambda: of_transformers(group_size, budget, continuous=True),
        "vllm": lambda: of_engine("vllm", group_size, budget, max_model_len),
    }
    for name in names or makers:
        if name == "vllm" and importlib.util.find_spec("vllm") is None:
            absent[name] = "vLLM is not installed"
            continue
        try:
            sampler = makers[name]()
            sampler([[1, 2, 3]], 0)
        except Exception as error:  # whatever another project raises is the result
            absent[name] = f"{type(error).__name__}: {error}"[:300]
        else:
            samplers[name] = sampler
    return samplers, absent


@click.command()
@click.option("--prompts", "count", default=16, show_default=True)
@click.option("--group-size", default=8, show_default=True)
@click.option("--budget", default=96, show_default=True, help="max_new_tokens")
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--engine", "names", multiple=True, help="beside the local one; by default all")
def main(
    count: int, group_size: int, budget: int, rounds: int, threads: int, names: tuple[str, ...]
) -> None:
    """Measure sampled tokens a second, side by side."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    table = unwrap(gym.make_vec("MathR1-v0", 1, max_new_tokens=budget)).prompts
    samplers, absent = make_samplers(group_size, budget, table.width + budget, names)
    clocks: dict[str, Callable[[], float]] = {
        "wall": time.perf_counter,
        "cpu": time.process_time,
    }
    seconds: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in samplers} for clock in clocks
    }
    tokens: dict[str, list[int]] = {name: [] for name in samplers}
    work: list[dict[str, float]] = []
    for turn in track(range(rounds), description="rounds"):
        prompts = [table[turn * count + i].tolist() for i in range(count)]
        for name, sample in samplers.items():
            started = {clock: now() for clock, now in clocks.items()}
            lengths = sample(prompts, turn)
            tokens[name].append(sum(lengths))
            for clock, now in clocks.items():
                seconds[clock][name].append((now() - started[clock]) / tokens[name][-1])
            if name == "local":
                work.append(least_work(prompts, lengths))
    figures: dict[str, Any] = {
        "responses": count * group_size,
        "max_new_tokens": budget,
        "threads": threads,
        "tokens_per_batch": {name: median(values) for name, values in tokens.items()},
    }
    for clock, per_token in seconds.items():
        figures[f"{clock}_tokens_per_s"] = {n: 1 / median(v) for n, v in per_token.items()}
        figures[f"{clock}_ratio_to_local"] = {
            name: median(b / a for a, b in zip(per_token["local"], values, strict=True))
            for name, values in per_token.items()
        }
    least = floor.of_work(
        "a batch of the local engine, median of the rounds",
        flops=median(each["flops"] for each in work),
        moved_bytes=median(each["moved_bytes"] for each in work),
    )
    batch_seconds = median(
        s * n for s, n in zip(seconds["wall"]["local"], tokens["local"], strict=True)
    )
    figures |= {"floor": least, "local_share_of_floor": least["seconds"] / batch_seconds}
    record.write("local_engine", {**figures, "absent": absent})


if __name__ == "__main__":
    main()
