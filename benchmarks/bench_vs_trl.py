"""One Dr. GRPO step, sampling and training, here and in TRL's GRPOTrainer.

    pip install 'lmrl_env[bench]'
    python benchmarks/bench_vs_trl.py

Both train the same random model of 3 M parameters on the same 8 questions × 8 responses, with the
same optimiser, learning rate and dtype. Their own training loops run in turns within one process,
a step here and a step there, so that the ratio does not move with the machine's load. Before
that, loss and gradient of one batch are compared. Peak memory is that of each in a process alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import gymnasium as gym
import numpy as np
import record
import torch
from datasets import Dataset
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


class Turns:
    """Two loops that take a step in turn, and what each step took."""

    def __init__(self, *names: str):
        self.names = names
        self.may_step = {name: threading.Semaphore(name == names[0]) for name in names}
        self.wall: dict[str, list[float]] = {name: [] for name in names}
        self.cpu: dict[str, list[float]] = {name: [] for name in names}

    def begin(self, name: str) -> None:
        if not self.may_step[name].acquire(timeout=600):
            raise TimeoutError(f"{name} waited 600 s for its turn: the other loop has stopped")
        self._started = time.perf_counter(), time.process_time()

    def end(self, name: str) -> None:
        self.wall[name].append(time.perf_counter() - self._started[0])
        self.cpu[name].append(time.process_time() - self._started[1])
        self.may_step[self.names[self.names.index(name) - 1]].release()


class StepClock(TrainerCallback):
    def __init__(self, turns: Turns):
        self.turns = turns

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns.begin(TRL)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.turns.end(TRL)


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


@contextlib.contextmanager
def our_steps_in_turn(turns: Turns) -> Iterator[None]:
    """Make every step of a run wait for its turn."""
    original = Run.steps

    def steps(run: Run) -> Iterator[int]:
        for step in original(run):
            turns.begin(OURS)
            yield step
            turns.end(OURS)

    Run.steps = steps
    try:
        yield
    finally:
        Run.steps = original


def measure(name: str, folder: Path, steps: int, dtype: str, only: str | None) -> dict[str, Any]:
    """Run both loops of a setting in turn, or one of them."""
    setting = SETTINGS[name]
    budget = setting["budget"]
    make_random_model(folder / "model", setting["eos_logit"])
    questions = write_questions(folder, setting["template"])
    args = our_args(folder, questions, setting, steps + 2, dtype)  # first and last do not count
    envs = gym.make_vec(
        args.env, QUESTIONS * GROUP_SIZE, model=args.model, questions=args.questions,
        group_size=GROUP_SIZE, max_new_tokens=budget, tokens_per_step=budget,
        autoreset_mode="Disabled",
    )  # fmt: skip
    table = unwrap(envs).prompts
    prompts = [unwrap(envs).template.render(q.question) for q in table.questions]
    reward = TrlCounts()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if only:
        if only == OURS:
            dr_grpo.main(args)
        else:
            trl_trainer(folder, prompts, budget, steps, reward, dtype).train()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_mib": after / 1024, "above_start_mib": (after - before) / 1024}

    trainer = trl_trainer(folder, prompts, budget, steps + 2, reward, dtype)
    batch = rollout(
        envs,
        make_engine("local", args.model, max_model_len=table.width + budget),
        question_ids=range(QUESTIONS),
        seeds=response_seeds(0, 0, QUESTIONS * GROUP_SIZE),
    )
    figures: dict[str, Any] = {
        "prompt_tokens": float(batch.prompt_lengths.mean()),
        "first_batch": compare_gradients(folder, trainer, batch, budget),
    }
    turns = Turns(TRL, OURS)  # ours last: its end resets the Accelerate that both share
    trainer.add_callback(StepClock(turns))
    OddLength.tokens, reward.tokens = 0, 0
    thread = threading.Thread(target=trainer.train, daemon=True)
    thread.start()
    with our_steps_in_turn(turns):
        dr_grpo.main(args)
    thread.join(timeout=600)
    for clock, seconds in (("wall", turns.wall), ("cpu", turns.cpu)):
        ours, theirs = seconds[OURS][1:-1], seconds[TRL][1:-1]
        figures[f"{clock}_seconds"] = {OURS: median(ours), TRL: median(theirs)}
        figures[f"{clock}_ratio"] = median(b / a for a, b in zip(ours, theirs, strict=True))
    figures["response_tokens_per_step"] = {
        OURS: OddLength.tokens / (steps + 2),
        TRL: reward.tokens / (steps + 2),
    }
    return figures


def measure_alone(name: str, side: str, steps: int, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, f"--steps={steps}", f"--dtype={dtype}"]
    output = subprocess.run(
        [*command, f"--setting={name}", f"--only={side}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return json.loads(output.splitlines()[-1])


@click.command()
@click.option("--steps", default=10, show_default=True, help="that count, of each side")
@click.option("--setting", "names", multiple=True, type=click.Choice(list(SETTINGS)))
@click.option("--dtype", default="float32", show_default=True)
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--memory/--no-memory", default=True, show_default=True)
@click.option("--only", type=click.Choice([OURS, TRL]), hidden=True)
def main(
    steps: int, names: tuple[str, ...], dtype: str, threads: int, memory: bool, only: str | None
) -> None:
    """Measure whole training steps, side by side."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    figures = {}
    for name in names or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(name, Path(folder), steps, dtype, only)
        if only:
            print(json.dumps(figures[name]))
            return
        print(name, json.dumps(figures[name], indent=2), flush=True)
        for side in (OURS, TRL) if memory else ():
            figures[name][f"memory_{side}"] = measure_alone(name, side, 3, dtype)
    record.write("vs_trl", {"steps": steps, "dtype": dtype, "threads": threads, **figures})


if __name__ == "__main__":
    main()
