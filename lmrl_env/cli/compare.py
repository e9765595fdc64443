"""``lmrl compare``: what algorithms do with one rollout batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from lmrl_env.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.table import Table

    from lmrl_env.algorithm_files import Algorithm
    from lmrl_env.policy import Policy
    from lmrl_env.rollout import Rollout

BATCH_ARGS = ("model", "temperature", "dtype", "prompts_per_step")


@click.command("compare")
@click.argument("batch", type=click.Path(path_type=Path))
@click.argument("algo_files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--model", help="whose gradients; by default the one that the batch's run began with")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="PNG to draw; all figures go beside it as .json; by default beside BATCH",
)
@click.option("--micro-batch-tokens", default=8192, show_default=True, help="of a forward pass")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
def compare_command(
    batch: Path,
    algo_files: tuple[Path, ...],
    model: str | None,
    output: Path | None,
    micro_batch_tokens: int,
    device: str,
) -> None:
    """Compare what algorithms do with one rollout batch, without training.

    BATCH is what --save-batch of a training run wrote. ALGO_FILES are any files with the functions
    compute_advantages and policy_loss; by default all of algos/. Shown are norms and cosines of
    their gradients, the weight of a token against the length of right and wrong answers (length
    bias), and the weight of a question against its pass rate (difficulty bias).

    \b
      python algos/dr_grpo.py --steps 1 --save-batch batch.safetensors
      lmrl compare batch.safetensors algos/grpo.py algos/dr_grpo.py
    """
    from lmrl_env.algorithm_files import checkout_files, load_algorithms
    from lmrl_env.analysis import report
    from lmrl_env.comparison import SAME_POLICY_GAP
    from lmrl_env.comparison import compare as compare_algorithms
    from lmrl_env.plotting import plot_comparison

    algorithms = load_algorithms(algo_files or checkout_files())
    rollout, group_size, args = load_batch(batch)
    output = output or batch.with_name(f"{batch.name.removesuffix('.safetensors')}.compare.png")
    if output.suffix != ".png":
        raise ConfigurationError(f"--output {str(output)!r}: expected a file name in .png")
    policy = _load_policy(model or args["model"], rollout, device)
    comparison = compare_algorithms(
        policy,
        rollout,
        group_size,
        algorithms,
        temperature=args["temperature"],
        same_policy_gap=SAME_POLICY_GAP[args["dtype"]],
        max_tokens=micro_batch_tokens,
        progress=True,
    )
    names = [algorithm.name for algorithm in algorithms]
    figures = {"batch": str(batch), "model": model or args["model"], "group_size": group_size}
    figures |= report(comparison, names, rollout, group_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    plot_comparison(figures, output, f"{batch.name}, gradients of {figures['model']}")
    _print(figures, algorithms)
    click.echo(f"{output}\n{output.with_suffix('.json')}")


def load_batch(path: Path) -> tuple[Rollout, int, dict[str, Any]]:
    """Read a batch that ``--save-batch`` wrote, of all ranks where there were several.

    Args:
        path: as it was given to ``--save-batch``.

    Returns:
        The batch, its group size, and the settings of its run.

    Raises:
        ConfigurationError: if there is no such batch, or it is not whole.
    """
    from lmrl_env.rollout import Rollout

    if match := re.fullmatch(r"(.+)\.rank\d+", path.name):
        raise ConfigurationError(
            f"{str(path)!r} is one rank's part of a batch: expected the whole; name it as "
            f"--save-batch did, {str(path.with_name(match[1]))!r}"
        )
    paths = [path]
    if not path.exists():
        paths = sorted(path.parent.glob(f"{path.name}.rank*"), key=lambda p: int(p.suffix[5:]))
    if not paths:
        raise ConfigurationError(
            f"there is no batch {str(path)!r}: expected a file that --save-batch wrote"
        )
    parts = [_read(part) for part in paths]
    batch = Rollout.concatenate([part for part, _ in parts])
    metadata = parts[0][1]
    group_size, args = metadata["group_size"], metadata["args"]
    if len(batch.rewards) % group_size or (
        np.diff(batch.question_ids.reshape(-1, group_size), axis=1).any()
    ):
        raise ConfigurationError(
            f"the {len(batch.rewards)} responses of {str(path)!r} do not form groups of "
            f"{group_size}: expected all responses to a question, adjacent"
        )
    questions = len(batch.rewards) // group_size
    if paths != [path] and questions != args["prompts_per_step"]:
        raise ConfigurationError(
            f"{[str(part) for part in paths]} hold {questions} questions: expected the "
            f"{args['prompts_per_step']} of one run; bring those of all its ranks, and no others"
        )
    return batch, group_size, args


def _read(path: Path) -> tuple[Rollout, dict[str, Any]]:
    from safetensors import SafetensorError

    from lmrl_env.comparison import SAME_POLICY_GAP
    from lmrl_env.rollout import Rollout

    try:
        batch, metadata = Rollout.load(path)
    except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{str(path)!r} is no rollout batch: expected a file that --save-batch wrote ({error})"
        ) from error
    lacking = {"group_size", "args"} - set(metadata) or set(BATCH_ARGS) - set(metadata["args"])
    if lacking:
        raise ConfigurationError(
            f"{str(path)!r} does not say {', '.join(sorted(lacking))}: expected what --save-batch "
            f"writes, Rollout.save with group_size and args, which has {', '.join(BATCH_ARGS)}"
        )
    if metadata["args"]["dtype"] not in SAME_POLICY_GAP:
        raise ConfigurationError(
            f"{str(path)!r} was made with dtype {metadata['args']['dtype']!r}: expected one of "
            f"{', '.join(SAME_POLICY_GAP)}"
        )
    return batch, metadata


def _load_policy(model: str, batch: Rollout, device: str) -> Policy:
    import torch
    from transformers.utils import logging as transformers_logging

    from lmrl_env.policy import Policy, load_model
    from lmrl_env.tokenizer import load_tokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: there is no GPU that torch can use; use cpu")
    vocab_size = load_tokenizer(model).vocab_size
    largest = int(max(batch.prompt_ids.max(), batch.response_ids.max()))
    if largest >= vocab_size:
        raise ConfigurationError(
            f"the batch has token {largest}, and the model {model!r} has {vocab_size} tokens: "
            "expected a model with the batch's tokenizer; name one with --model"
        )
    transformers_logging.disable_progress_bar()
    return Policy(load_model(model, device=device), vocab_size)


def _print(figures: dict[str, Any], algorithms: list[Algorithm]) -> None:
    from rich.console import Console

    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    outcomes = figures["responses"]["outcome"]
    counts = ", ".join(f"{outcomes.count(key)} {key}" for key in ("right", "wrong", "truncated"))
    say(f"{len(outcomes)} responses to {len(figures['pass_rates'])} questions: {counts}")
    gap = f"{figures['logprob_gap']:.2g} nats on average"
    if figures["on_policy"]:
        say(f"on-policy: log-probs of {figures['model']} are the batch's but for {gap}")
    else:
        say(
            f"off-policy: log-probs of {figures['model']} differ from the batch's by {gap}, so it "
            "is not the policy that sampled, and old log-probs are the batch's"
        )
    for algorithm in algorithms:
        if algorithm.has_critic:
            say(
                f"{algorithm.name}: the values of its critic, which is untrained, are 0; where "
                "γ = λ = 1 its advantage is the return"
            )
    say("\nGradients: norm, and cosine of the angle to the gradient of each file")
    console.print(_gradient_table(figures))
    say("\nLength bias: weight of a token ∝ |o|^α; weight by length, 1 at the mean length")
    console.print(_length_table(figures))
    say("\nDifficulty bias: weight of a question ∝ std^β; weight by pass rate, 1 at the mean std")
    console.print(_difficulty_table(figures))


def _table(*headings: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:z.{digits}f}"


def _gradient_table(figures: dict[str, Any]) -> Table:
    files = figures["files"]
    table = _table("", "norm", *(f"({i})" for i in range(1, len(files) + 1)))
    for i, file in enumerate(files, start=1):
        cosines = [_number(cosine, 3) for cosine in file["cosines"]]
        table.add_row(f"({i}) {file['name']}", f"{file['gradient_norm']:.3g}", *cosines)
    return table


def _length_table(figures: dict[str, Any]) -> Table:
    buckets = [f"≤{bound}" for bound in figures["length_buckets"]]
    table = _table("", "right α", *buckets, "wrong α", *buckets)
    for file in figures["files"]:
        cells = []
        for outcome in ("right", "wrong"):
            fit = file["length"][outcome]
            cells += [_number(fit["exponent"]), *(_number(weight) for weight in fit["buckets"])]
        table.add_row(file["name"], *cells)
    return table


def _difficulty_table(figures: dict[str, Any]) -> Table:
    table = _table("", "β", *(f"≤{bound:.0%}" for bound in figures["pass_rate_buckets"]))
    for file in figures["files"]:
        fit = file["difficulty"]
        weights = [_number(weight) for weight in fit["buckets"]]
        table.add_row(file["name"], _number(fit["exponent"]), *weights)
    return table
