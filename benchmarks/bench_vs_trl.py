"""One Dr. GRPO step, sampling and training, here and in TRL's GRPOTrainer.

    pip install 'lmrl_env[bench]'
    python benchmarks/bench_vs_trl.py

Both train the same random model of 3 M parameters on the same 8 questions × 8 responses, with the
same optimiser, learning rate and dtype, each by its own training loop in a process of its own. The
two take turns, a step here and a step there, while the other waits without using the processor, so
that the ratio of neighbouring steps does not move with the machine's load. Before that, loss and
gradient of one batch are compared. The floor is the matrix products of such a step alone, sampling
and training, real tokens only and prompts once, at the rate at which oneDNN multiplies here.

Writes `results/vs_trl.json` and `results/vs_trl.png`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from statistics import median
from typing import Any

import click
import floor
import gymnasium as gym
import numpy as np
import record
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from lmrl_env import load_questions
from lmrl_env.batches import micro_batches
from lmrl_env.env import unwrap
from lmrl_env.policy import Policy, load_model
from lmrl_env.registration import make_engine, make_token_vector_env
from lmrl_env.rollout import Rollout, response_seeds, rollout
from lmrl_env.run import Run
from lmrl_env.tokenizer import load_tokenizer, model_path
from lmrl_env.types import BatchTotals
from lmrl_env.wrappers import OutcomeReward

sys.path.insert(0, str(Path(__file__).parents[1] / "algos"))
import dr_grpo

QUESTIONS, GROUP_SIZE, LR = 8, 8, 1e-5
OURS, TRL = "lmrl_env", "trl"
SETTINGS: dict[str, dict[str, Any]] = {
    "R1 prompts": {"template": "r1", "budget": 32, "eos_logit": -30.0},
    "14-token prompts": {"template": "none", "budget": 32, "eos_logit": -30.0},
    "R1 prompts, natural lengths": {"template": "r1", "budget": 96, "eos_logit": 3.3},
}


def make_random_model(folder: Path, eos_logit: float) -> None:
    """Save a random model with the tiny one's tokenizer and shape, twice as wide.

    All tokens are about as likely as each other, but EOS, whose logit differs by ``eos_logit``:
    one channel of the embedding says so, which is the same for all other tokens.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    config = LlamaConfig.from_pretrained(model_path("tiny"))
    config.update(
        {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
        | {"num_key_value_heads": 4, "vocab_size": load_tokenizer("tiny").vocab_size}
        | {"initializer_range": 0.02}
    )
    model = LlamaForCausalLM(config)
    weights = model.model.embed_tokens.weight.data
    weights[:, 0] = 5.0  # the loudest channel by far: √H after the norm, whatever layers add
    model.model.norm.weight.data[0] = 1 / config.hidden_size**0.5
    weights[tokenizer.eos_token_id, 0] += eos_logit
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_questions(folder: Path, template: str) -> Path:
    """Write a file of which exactly 8 questions are in the training part."""
    if template == "none":
        texts = [f"What is {a} + {b}?" for a in range(111, 199, 3) for b in (227, 419)]
    else:
        texts = [question.question for question in load_questions("arithmetic:size=400")]
    for count in range(QUESTIONS, len(texts)):
        path = folder / f"questions-{count}.jsonl"
        rows = (json.dumps({"question": text, "answer": "1"}) for text in texts[:count])
        path.write_text("\n".join(rows) + "\n")
        if len(load_questions(str(path))) == QUESTIONS:
            return path
    raise AssertionError("no number of questions leaves 8 of them to train on")


class OddLength(OutcomeReward):
    """Pays 1 for a text of an odd number of characters: a random model earns it half the time."""

    tokens = 0

    def outcome_rewards(self, ended: Any, truncated: Any, info: dict[str, Any]) -> list[float]:
        if self.num_envs == QUESTIONS * GROUP_SIZE:  # evaluations have one slot
            OddLength.tokens += int(info["response_length"][ended].sum())
        return [len(response or "") % 2 for response in info["response"]]


def make_envs(num_envs: int = 1, **kwargs: Any) -> OddLength:
    return OddLength(make_token_vector_env(num_envs, **kwargs))


class Turn:
    """One side's part of two loops that take steps in turn."""

    def __init__(self, mine: Semaphore, others: Semaphore):
        self.mine, self.others = mine, others
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def begin(self) -> None:
        if not self.mine.acquire(timeout=600):
            raise TimeoutError("waited 600 s for a turn: the other loop has stopped")
        self._started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.wall.append(time.perf_counter() - self._started[0])
        self.cpu.append(time.process_time() - self._started[1])
        self.others.release()


class StepClock(TrainerCallback):
    def __init__(self, turn: Turn):
        self.turn = turn

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turn.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.turn.end()


class TrlCounts:
    """TRL's reward function: that of ``OddLength``; counts the tokens it is shown."""

    __name__ = "odd_length"

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        return [float(len(text) % 2) for text in completions]


def trl_trainer(
    folder: Path, prompts: list[str], budget: int, steps: int, reward: TrlCounts, dtype: str
) -> GRPOTrainer:
    """Build TRL's trainer with this project's settings in place of its own."""
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        epsilon=0.2,
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=QUESTIONS * GROUP_SIZE,
        gradient_accumulation_steps=1,
        max_completion_length=budget,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=steps,
        gradient_checkpointing=False,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        shuffle_dataset=False,
        logging_steps=10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )


def our_args(
    folder: Path, questions: Path, setting: dict[str, Any], steps: int, dtype: str
) -> dr_grpo.Args:
    env_id = f"OddLength{setting['template'].title()}-v0"
    kwargs = {"template": setting["template"]}
    gym.register(env_id, vector_entry_point=make_envs, kwargs=kwargs)
    return dr_grpo.Args(
        env=env_id,
        model=str(folder / "model"),
        engine="local",
        questions=str(questions),
        eval_set=str(questions),
        steps=steps,
        prompts_per_step=QUESTIONS,
        group_size=GROUP_SIZE,
        max_new_tokens=setting["budget"],
        lr=LR,
        eval_every=0,
        eval_questions=1,
        checkpoint_every=0,
        run_dir=str(folder / "run"),
        device="cpu",
        dtype=dtype,
    )


def compare_gradients(
    folder: Path, trainer: GRPOTrainer, batch: Rollout, budget: int
) -> dict[str, float]:
    """Return how far losses and gradients of the two are apart on one sampled batch."""
    advantages = dr_grpo.compute_advantages(torch.from_numpy(batch.rewards).float(), GROUP_SIZE)
    model = load_model(str(folder / "model"))
    policy = Policy(model, load_tokenizer(str(folder / "model")).vocab_size)
    rows = np.arange(len(batch.rewards))
    (micro,) = micro_batches(batch, [rows], GROUP_SIZE, "cpu")
    logprobs, _ = policy(micro.tokens, temperature=1.0)
    totals = BatchTotals(len(rows), int(batch.mask.sum()), budget)
    loss, _ = dr_grpo.policy_loss(logprobs, logprobs.detach(), advantages, micro.mask, totals)
    loss.backward()

    width = int(batch.prompt_lengths.max())
    prompt_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    prompt_mask = torch.zeros_like(prompt_ids)
    for i, length in enumerate(batch.prompt_lengths):
        prompt_ids[i, width - length :] = torch.from_numpy(batch.prompt_ids[i, :length].copy())
        prompt_mask[i, width - length :] = 1
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": micro.tokens.response_ids,
            "completion_mask": micro.mask.long(),
            "advantages": advantages,
            "num_items_in_batch": micro.mask.sum(),
        },
    )
    theirs.backward()
    pairs = zip(model.named_parameters(), trainer.model.named_parameters(), strict=True)
    flat = [(a.grad.flatten(), b.grad.flatten()) for (_, a), (_, b) in pairs]
    ours, others = (torch.cat(list(grads)) for grads in zip(*flat, strict=True))
    trainer.model.zero_grad()
    return {
        "loss": loss.item(),
        "loss_trl": theirs.item(),
        "gradient_norm": ours.norm().item(),
        "gradient_difference_relative": ((ours - others).norm() / others.norm()).item(),
    }


def train_here(turn: Turn, args: dr_grpo.Args) -> int:
    """Train by our loop, every step in its turn, and return the number of sampled tokens."""
    original = Run.steps

    def steps(run: Run) -> Iterator[int]:
        for step in original(run):
            turn.begin()
            yield step
            turn.end()

    Run.steps = steps  # type: ignore[method-assign]
    dr_grpo.main(args)
    return OddLength.tokens


def train_by_trl(turn: Turn, trainer: GRPOTrainer, reward: TrlCounts) -> int:
    """Train by TRL's loop, every step in its turn, and return the number of sampled tokens."""
    trainer.add_callback(StepClock(turn))
    trainer.train()
    return reward.tokens


def peak_mib() -> float:
    """Return the most memory that this process had at one time (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def side(
    name: str, setting_name: str, folder: Path, questions: Path, prompts: list[str], steps: int,
    dtype: str, threads: int, mine: Semaphore, others: Semaphore, results: Queue[Any],
) -> None:  # fmt: skip
    """Run one side's loop in this process, and hand over what its steps took."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    setting = SETTINGS[setting_name]
    turn, before = Turn(mine, others), peak_mib()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        if name == OURS:
            tokens = train_here(turn, our_args(folder, questions, setting, steps, dtype))
        else:
            reward = TrlCounts()
            trainer = trl_trainer(folder, prompts, setting["budget"], steps, reward, dtype)
            tokens = train_by_trl(turn, trainer, reward)
    results.put(
        (name, {
            "wall": turn.wall,
            "cpu": turn.cpu,
            "response_tokens_per_step": tokens / steps,
            "peak_mib": peak_mib(),
            "above_start_mib": peak_mib() - before,
        })
    )  # fmt: skip


def in_turns(
    setting_name: str, folder: Path, questions: Path, prompts: list[str], steps: int, dtype: str,
    threads: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run both loops, step by step in turn, and return what each took."""
    context = multiprocessing.get_context("spawn")
    first, second = context.Semaphore(1), context.Semaphore(0)
    results = context.Queue()
    processes = [
        context.Process(
            target=side,
            args=(name, setting_name, folder, questions, prompts, steps, dtype, threads, mine,
                  others, results),
            daemon=False,
        )
        for name, mine, others in ((TRL, first, second), (OURS, second, first))
    ]  # fmt: skip
    for process in processes:
        process.start()
    try:
        return dict(results.get(timeout=900) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=60)
            process.kill()


def floor_seconds(folder: Path, prompts: list[str], response_tokens: float) -> float:
    """Return the time of a step's matrix products, forward 2 operations a weight and token."""
    model = load_model(str(folder / "model"))
    tokenizer = load_tokenizer(str(folder / "model"))
    head = model.get_output_embeddings().weight
    trunk = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p is not head)
    prompt_tokens = sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    once = 2.0 * ((prompt_tokens + response_tokens) * trunk + response_tokens * head.numel())
    return 4 * once / floor.matmul_flops_per_s()


def measure(name: str, folder: Path, steps: int, dtype: str, threads: int) -> dict[str, Any]:
    """Compare first losses and gradients, then run both loops of a setting in turn."""
    setting = SETTINGS[name]
    budget = setting["budget"]
    make_random_model(folder / "model", setting["eos_logit"])
    questions = write_questions(folder, setting["template"])
    args = our_args(folder, questions, setting, 1, "float32")
    envs = gym.make_vec(
        args.env, QUESTIONS * GROUP_SIZE, model=args.model, questions=args.questions,
        group_size=GROUP_SIZE, max_new_tokens=budget, tokens_per_step=budget,
        autoreset_mode="Disabled",
    )  # fmt: skip
    table = unwrap(envs).prompts
    prompts = [unwrap(envs).template.render(q.question) for q in table.questions]
    batch = rollout(
        envs,
        make_engine("local", args.model, max_model_len=table.width + budget),
        question_ids=range(QUESTIONS),
        seeds=response_seeds(0, 0, QUESTIONS * GROUP_SIZE),
    )
    trainer = trl_trainer(folder, prompts, budget, 1, TrlCounts(), "float32")
    figures: dict[str, Any] = {
        "prompt_tokens": float(batch.prompt_lengths.mean()),
        "first_batch": compare_gradients(folder, trainer, batch, budget),
    }
    sides = in_turns(name, folder, questions, prompts, steps + 3, dtype, threads)
    for clock in ("wall", "cpu"):
        taken = {key: value.pop(clock)[2:-1] for key, value in sides.items()}
        figures[f"{clock}_seconds"] = {key: median(times) for key, times in taken.items()}
        ratios = [b / a for a, b in zip(taken[OURS], taken[TRL], strict=True)]
        figures[f"{clock}_ratio"] = median(ratios)
        figures[f"{clock}_ratio_range"] = [min(ratios), max(ratios)]
    least = floor_seconds(folder, prompts, sides[OURS]["response_tokens_per_step"])
    share = least / figures["wall_seconds"][OURS]
    return {**figures, "sides": sides, "floor_seconds": least, "floor_share": share}


def draw(figures: dict[str, dict[str, Any]]) -> None:
    """Draw seconds a step, ours beside TRL's, with our floor as a line."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(figures.values()):
        for j, (key, color) in enumerate(((OURS, "C0"), (TRL, "C1"))):
            seconds = row["wall_seconds"][key]
            axes.barh(i + 0.38 * j, seconds, 0.36, color=color, label=key if i == 0 else None)
            ratio = f"  {row['wall_ratio']:.1f} ×" if key == TRL else ""
            axes.text(seconds, i + 0.38 * j, f" {seconds:.2f} s{ratio}", va="center", fontsize=8)
        least = row["floor_seconds"]
        axes.plot([least, least], [i - 0.18, i + 0.18], color="k", lw=1.5,
                  label="floor of ours" if i == 0 else None)  # fmt: skip
    axes.set_yticks([i + 0.19 for i in range(len(figures))], list(figures))
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step, sampling and training")
    axes.margins(x=0.18)
    axes.legend(fontsize=8)
    figure.savefig(record.RESULTS / "vs_trl.png", dpi=120)


@click.command()
@click.option("--steps", default=10, show_default=True, help="that count, of each side")
@click.option("--setting", "names", multiple=True, type=click.Choice(list(SETTINGS)))
@click.option("--dtype", default="float32", show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
def main(steps: int, names: tuple[str, ...], dtype: str, threads: int) -> None:
    """Measure whole training steps, side by side."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    figures = {}
    for name in names or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(name, Path(folder), steps, dtype, threads)
        print(name, json.dumps(figures[name], indent=2), flush=True)
    suffix = "" if dtype == "float32" else f"_{dtype}"
    if not suffix:
        draw(figures)
    record.write(f"vs_trl{suffix}", {"steps": steps, "dtype": dtype, "threads": threads, **figures})


if __name__ == "__main__":
    main()
