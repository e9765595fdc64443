"""The minimalist recipe of the paper's 7B model (section 1, appendix B), as one set of settings.

Oat-Zero-7B: Dr. GRPO on Qwen2.5-Math-7B, 27 hours on eight A100. `--scale paper --dry-run` prints
the commands: training under Accelerate, greedy evaluation of every checkpoint on the five sets, and
export. At tiny scale the recipe is checked as far as a laptop can: the plan of the whole run by
`--dry-run` on the 7B model's configuration, and one real step, with fewer and shorter responses, of
a random model of its architecture, head counts and vocabulary, whose memory is compared with what
the manifest predicts.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from claim import Options, Verdict, algorithm, claim_options, read_rows, write
from matplotlib.figure import Figure
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from lmrl_env.policy import LOGITS_AT_ONCE

RECIPE: dict[str, Any] = {
    "env": "MathQwen-v0",  # Qwen-Math template, Math-Verify, truncated responses earn 0
    "model": "Qwen/Qwen2.5-Math-7B",
    "questions": "math-lvl3to5",
    "eval_set": "math500",
    "steps": 320,  # five passes; the paper states hours, not steps
    "prompts_per_step": 128,
    "group_size": 8,
    "max_new_tokens": 3000,
    "temperature": 1.0,
    "updates_per_step": 8,
    "epochs": 1,
    "lr": 1e-6,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "eval_every": 16,
    "eval_questions": 500,
    "checkpoint_every": 16,
    "keep_checkpoints": 0,
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
}
SUITE = "aime24,amc,math500,minerva,olympiad-bench"
TABLE = """
| greedy, 3,000 tokens | AIME24 | AMC | MATH500 | Minerva | OlympiadBench | average |
|---|---|---|---|---|---|---|
| Qwen2.5-Math-7B, Qwen-Math template | 16.7 | 38.6 | 50.6 | 9.9 | 16.6 | 26.5 |
| Qwen2.5-Math-7B, no template | 20.0 | 45.8 | 69.0 | 21.3 | 34.7 | 38.2 |
| Oat-Zero-7B, by this recipe | 43.3 | 62.7 | 80.0 | 30.1 | 41.0 | 51.4 |
| yours: `evals/recipe/summary.md` | | | | | | |
"""
SEVEN_B: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
EMITTED = 151_665  # ids of its tokenizer; the embedding is padded to 152,064
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALL = {"hidden_size": 224, "intermediate_size": 1184, "num_hidden_layers": 2}
SCALED_DOWN = {
    "prompts_per_step": 8,
    "max_new_tokens": 40,
    "steps": 1,
    "eval_every": 0,
    "eval_questions": 8,
}
ANSWERS = range(2, 10)


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Return settings as the command line has them; True is a bare flag.

    >>> arguments({"group_size": 8, "dry_run": True})
    ['--group-size=8', '--dry-run']
    """
    return [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in flags.items()
    ]


def commands(runs_dir: Path, engine: str) -> dict[str, str]:
    """Return the recipe's commands by what they do."""
    run_dir = runs_dir / "recipe"
    launch = "accelerate launch --config_file examples/accelerate/fsdp2.yaml"
    flags = {"run_dir": run_dir, "engine": engine, **RECIPE}
    training = shlex.join(["algos/dr_grpo.py", *arguments(flags)])
    steps = range(RECIPE["eval_every"], RECIPE["steps"] + 1, RECIPE["eval_every"])
    checkpoints = " ".join(f"--model {run_dir}/checkpoints/step-{step}" for step in steps)
    return {
        "train": f"{launch} {training}",
        "evaluate": f"lmrl eval --model {RECIPE['model']} {checkpoints} --suite {SUITE} "
        "--template qwen-math --temperature 0 --max-new-tokens 3000 --dtype bfloat16 "
        "--output evals/recipe",
        "export": f"lmrl export {run_dir} oat-zero-7b --step best",
    }


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer as wide as Qwen2.5's: bytes, boxed answers, and words without meaning."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(rf"\boxed{{{answer}}}" for answer in ANSWERS)]
    words += [f"w{number}" for number in range(EMITTED - len(SPECIAL) - len(words))]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=SPECIAL[0], pad_token=SPECIAL[0]
    )
    tokenizer.save_pretrained(folder)


def make_model(folder: Path, seed: int = 0) -> None:
    """Write a small random model of the 7B one's vocabulary and heads, and its tokenizer.

    One direction of the residual stream is constant, and the head turns it into answers and ends:
    else, of 151,665 tokens, none that earns a reward would ever be sampled.
    """
    make_tokenizer(folder)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SEVEN_B | SMALL, eos_token_id=EMITTED - len(SPECIAL)))
    first = len(pre_tokenizers.ByteLevel.alphabet())
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0  # far above all that the blocks add
        state = SMALL["hidden_size"] ** 0.5  # of that direction, behind the last norm
        model.lm_head.weight[first : first + len(ANSWERS), 0] = 9.5 / state
        model.lm_head.weight[EMITTED - len(SPECIAL), 0] = 9.5 / state
    model.save_pretrained(folder)


def make_questions(path: Path) -> None:
    """Write sums of one digit, whose answers the random model can hit."""
    rows = [(a, b) for a in range(1, 9) for b in range(1, 9) if a + b in ANSWERS]
    text = [{"question": f"What is ${a} + {b}$?", "answer": str(a + b)} for a, b in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in text))


def run(arguments: Sequence[str], runs_dir: Path) -> tuple[str, int]:
    """Run a program.

    Returns:
        What it printed, and the most bytes of memory that it ever had.

    Raises:
        ClickException: if it fails.
    """
    log = runs_dir / "recipe.log"
    with log.open("w") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(arguments, stdout=out, stderr=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{shlex.join(arguments)}:\n{log.read_text()[-2000:]}")
    return log.read_text(), 1024 * usage.ru_maxrss


def check(options: Options) -> dict[str, Any]:
    """Return what the recipe's plan says, and what its step on a random model is."""
    folder = options.runs_dir / "recipe-check"
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    make_tokenizer(folder / "seven-b")
    Qwen2Config(architectures=["Qwen2ForCausalLM"], **SEVEN_B).save_pretrained(folder / "seven-b")
    make_questions(folder / "questions.jsonl")
    questions = options.questions or str(folder / "questions.jsonl")
    local = {"questions": questions, "eval_set": str(folder / "questions.jsonl")}
    program = [sys.executable, str(algorithm("dr_grpo")), "--engine=local"]
    whole = RECIPE | local | {"model": folder / "seven-b", "dry_run": True}
    plan, _ = run([*program, *arguments(whole)], folder)
    local["questions"] = str(folder / "questions.jsonl")
    flags = RECIPE | local | {"model": folder / "model"} | SCALED_DOWN
    place = folder / f"step-{os.getpid()}"
    _, before = run([*program, *arguments(flags | {"dry_run": True})], folder)
    _, peak = run([*program, *arguments(flags | {"run_dir": place})], folder)
    manifest = json.loads((place / "manifest.json").read_text())
    row = read_rows(place)[-1]
    return {
        "plan": plan,
        "peak_bytes": peak,
        "bytes_before": before,
        "predicted": manifest["memory_of_a_rank"],
        "model": manifest["model"],
        "response_tokens_of_an_update": manifest["optimizer_step"]["response_tokens_at_most"],
        "tokens_whose_logits_exist_at_once": LOGITS_AT_ONCE // EMITTED,
        "row": row,
    }


def judge(figures: Mapping[str, Any]) -> Verdict:
    """Return the verdict: a finite step that changes the model, in the memory predicted."""
    row = figures["row"]
    used = figures["peak_bytes"] - figures["bytes_before"]
    ratio = used / figures["predicted"]["bytes"]
    norm = row["policy/grad_norm"]
    finite = 0 < norm < float("inf") and not row.get("policy/skipped_updates")
    return Verdict(
        "§1, App. B, Tables 1 and 4",
        "Dr. GRPO with few settings makes a 7B model of 51.4% on average, in 27 hours on 8 A100.",
        "The accuracy cannot be measured without GPUs. The plan of the whole run passes, and a "
        f"random Qwen2 of the same vocabulary ({EMITTED:,} of {SEVEN_B['vocab_size']:,}) and heads "
        f"({figures['model']['parameters']:,} parameters) takes one step of 8 updates in bfloat16 "
        f"with checkpointing: gradient norm {norm:.3g}, reward {row['reward/mean']:.3g}, logits of "
        f"{figures['tokens_whose_logits_exist_at_once']} of "
        f"{figures['response_tokens_of_an_update']} tokens at one time, {used / 2**30:.2f} GiB of "
        f"memory against {figures['predicted']['bytes'] / 2**30:.2f} GiB predicted.",
        "partly" if finite and 0.5 < ratio < 1.5 else "does not hold",  # never the accuracy itself
        "The recipe runs as it is written; whether it makes such a model is not tested here. What "
        "our flags do not say: evaluation in training has the sampling temperature, so the "
        "greedy one is `lmrl eval` on the checkpoints, one every 16 steps; a tenth of the set is "
        "held out by a hash and not trained on; prompts are limited by the context (4,096 - "
        "3,000 tokens), not to 1,024; weights are sharded by FSDP2 where the paper has ZeRO-2.",
        "one step",
    )


def plot(figures: Mapping[str, Any]) -> Figure:
    """Draw predicted and measured memory of the step."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for number, item in enumerate(figures["predicted"]["items"]):
        size = item["bytes"] / 2**30
        axes.barh(1, size, left=left, color=f"C{number}", label=item["name"])
        left += size
    used = (figures["peak_bytes"] - figures["bytes_before"]) / 2**30
    axes.barh(0, used, color="0.6", label="measured: peak less a dry run's")
    axes.set_yticks([0, 1], ["measured", "manifest"])
    axes.set_xlabel("GiB")
    axes.set_title("a step of the recipe on a random model with Qwen2.5's vocabulary")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure


@claim_options(seeds=1)
def main(options: Options) -> None:
    """Print the paper's 7B recipe as commands, or check it on a random model."""
    lines = commands(Path("runs"), options.engine or "vllm")
    if not options.is_tiny or options.dry_run:
        for what, line in lines.items():
            click.echo(f"# {what}\n{line}")
        click.echo(TABLE)
        return
    figures = check(options)
    printed = "\n\n".join(f"{what}:\n\n```bash\n{line}\n```" for what, line in lines.items())
    write(options, "recipe", "The minimalist recipe", judge(figures), figures, plot(figures),
          f"{TABLE}\n{printed}")  # fmt: skip


if __name__ == "__main__":
    main()
