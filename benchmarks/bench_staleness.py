"""What the correction of samples that are one update old costs in bias and in variance, exactly.

    python benchmarks/bench_staleness.py --worlds 24

Writes `results/staleness.json` and `results/staleness.png`, and prints a table. In each world, an
MDP of two questions with responses of up to 6 tokens out of 3, one of which is EOS, and with
rewards of 0 and 1, the policy that samples makes one update by Dr. GRPO on 16 × 8 responses of its
own, SGD's and Adam's first step in turn, of such a size that KL(new‖old) of a response is as
stated. The estimate is that of Dr. GRPO, divided by its scale, for the new policy on responses of
the old one; all figures are relative to ∇J of the new one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import record
import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from algos.dr_grpo import compute_advantages
from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    enumerate_trajectories,
    exact_gradient,
    flat_gradient,
    leave_one_out_moments,
)
from lmrl_env.importance import Level

GROUP_SIZE = 8
BATCHES = (16, 128)  # groups
SIZES = (0.03, 0.1, 0.3, 1.0)  # nats
EOS = 2


class Correction(NamedTuple):
    level: Level
    cap: float | None

    @property
    def name(self) -> str:
        if self.cap is None:
            return "uncorrected"
        return f"{self.level}, " + ("no cap" if self.cap == math.inf else f"cap {self.cap:g}")


CORRECTIONS = (
    Correction("token", None),
    *(Correction("token", cap) for cap in (1.0, 2.0, 5.0, 10.0, math.inf)),
    *(Correction("sequence", cap) for cap in (1.0, 2.0, 5.0, 10.0, math.inf)),
)
DRAWN = {
    "uncorrected": ("C7", "-"),
    "token, cap 2": ("C1", "-"),
    "token, no cap": ("C1", ":"),
    "sequence, cap 1": ("C9", "-"),
    "sequence, cap 2": ("C2", "-"),
    "sequence, cap 5": ("C0", "-"),
    "sequence, no cap": ("C0", ":"),
}


def look_random(*key: Any) -> float:
    return random.Random(str(key)).random()


def worlds(number: int) -> Iterator[tuple[int, TokenMDP, TabularPolicy]]:
    """Yield MDPs with policies that solve each question sometimes, and not always."""
    seed = 0
    while number:
        shares = [0.15 + 0.5 * look_random("share", seed, question) for question in range(2)]

        def reward(
            question: int, tokens: tuple[int, ...], terminated: bool, seed: int = seed,
            shares: list[float] = shares,
        ) -> float:  # fmt: skip
            return float(terminated and look_random(seed, question, tokens) < shares[question])

        mdp = TokenMDP(3, 6, reward, eos=EOS, question_probs=(0.5, 0.5))
        policy = TabularPolicy(mdp, seed)
        policy.logits.data[:, EOS] -= 1
        responses = enumerate_trajectories(mdp, policy)
        solved = torch.zeros(2, dtype=torch.float64)
        solved.index_add_(0, responses.questions, responses.probs * responses.rewards)
        if solved.min() > 0.05 and solved.max() < 0.35:  # an update of 1 nat is possible
            number -= 1
            yield seed, mdp, policy
        seed += 1


def update_direction(mdp: TokenMDP, policy: TabularPolicy, seed: int, adam: bool) -> Tensor:
    """Return the step of one update by Dr. GRPO on a sampled batch, up to its size."""
    generator = torch.Generator().manual_seed(seed)
    responses = enumerate_trajectories(mdp, policy)
    asked = torch.randint(2, (BATCHES[0],), generator=generator)
    given_question = responses.probs * (responses.questions == asked[:, None])  # (groups, L)
    rows = given_question.multinomial(GROUP_SIZE, replacement=True, generator=generator).flatten()
    advantages = compute_advantages(responses.rewards[rows], GROUP_SIZE)
    logprobs = responses.logprobs(policy).sum(1)
    gradient = flat_gradient((advantages * logprobs[rows]).sum(), policy)
    return gradient.sign() if adam else gradient / gradient.norm()


def moved(mdp: TokenMDP, old: TabularPolicy, direction: Tensor, size: float) -> TabularPolicy:
    """Return the policy that lies so far in a direction that KL(new‖old) is the size, in nats."""
    responses = enumerate_trajectories(mdp, old)
    asked = torch.tensor(mdp.question_probs, dtype=torch.float64)[responses.questions]
    new = TabularPolicy(mdp)

    @torch.no_grad()
    def divergence(length: float) -> float:
        new.logits.data = old.logits.data + length * direction.view_as(old.logits)
        logprobs = responses.logprobs(new).sum(1)
        gap = logprobs - responses.logprobs(old).sum(1)
        return (asked * logprobs.exp() * gap).sum().item()

    low, high = 0.0, 1.0
    while divergence(high) < size:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) < size else (low, middle)
    return new


def measure(
    mdp: TokenMDP, policy: TabularPolicy, stale: TabularPolicy
) -> dict[str, dict[str, float]]:
    """Return the figures of each correction."""
    exact = exact_gradient(mdp, policy)
    unit = exact.square().sum().item()
    figures = {}
    for correction in CORRECTIONS:
        moments = leave_one_out_moments(
            mdp, policy, group_size=GROUP_SIZE, sampling_policy=stale,
            tis_cap=correction.cap, tis_level=correction.level,
        )  # fmt: skip
        along = (moments.mean @ exact) / unit * exact
        sine, cosine = (moments.mean - along).norm(), moments.mean @ exact / exact.norm()
        figures[correction.name] = {
            "degrees": math.degrees(math.atan2(sine, cosine)),
            "relative_error": (moments.mean - exact).norm().item() / math.sqrt(unit),
            "variance_of_a_group": moments.variance / unit,
        } | {
            f"squared_error_{groups}x{GROUP_SIZE}": moments.squared_error(exact, groups) / unit
            for groups in BATCHES
        }
    return figures


def summarize(measured: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return median and range over the worlds, and in how many an error is below uncorrected's."""
    summary: dict[str, Any] = {}
    for correction in CORRECTIONS:
        own = [figures[correction.name] for figures in measured]
        summary[correction.name] = {
            key: {
                "median": median(values := [figures[key] for figures in own]),
                "min": min(values),
                "max": max(values),
            }
            for key in own[0]
        }
        for key in (f"squared_error_{groups}x{GROUP_SIZE}" for groups in BATCHES):
            better = [f[correction.name][key] < f["uncorrected"][key] for f in measured]
            summary[correction.name][key]["share_below_uncorrected"] = sum(better) / len(better)
    return summary


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw medians against the size of the update."""
    panels = {
        "degrees": "angle of the expected gradient to ∇J, degrees",
        "variance_of_a_group": "variance of one group / ‖∇J‖²",
        **{
            f"squared_error_{groups}x{GROUP_SIZE}": f"squared error / ‖∇J‖², {groups} × 8 responses"
            for groups in BATCHES
        },
    }
    figure = Figure(figsize=(14, 4), layout="constrained")
    figure.suptitle("Samples that are one update old: exact medians over random MDPs")
    for axes, (key, title) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        for name, (color, style) in DRAWN.items():
            medians = [figures[str(size)][name][key]["median"] for size in SIZES]
            axes.plot(SIZES, medians, style, color=color, marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        axes.set_xlabel("size of the update: nats a response")
        axes.set_yscale("linear" if key == "degrees" else "log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def table(figures: dict[str, Any]) -> str:
    """Return medians, and in brackets the largest angle."""
    lines = [
        "| nats | correction | angle to ∇J | relative error | variance of a group "
        "| squared error, 16 × 8 | 128 × 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, rows in figures.items():
        for name, row in rows.items():
            degrees = row["degrees"]
            angle = f"{degrees['median']:.1f}° ({degrees['max']:.1f}°)"
            cells = [
                f"{row[key]['median']:.3f}"
                for key in ("relative_error", "variance_of_a_group",
                            "squared_error_16x8", "squared_error_128x8")
            ]  # fmt: skip
            lines.append(f"| {size} | {name} | {angle} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--worlds", "number", default=24, show_default=True, help="Random MDPs.")
def main(number: int) -> None:
    """Measure bias and variance of every correction, for updates of several sizes."""
    measured: dict[str, list[dict[str, dict[str, float]]]] = {str(size): [] for size in SIZES}
    with Progress() as progress:
        drawn = progress.track(worlds(number), total=number, description="enumerating")
        for seed, mdp, old in drawn:
            for adam in (False, True):
                direction = update_direction(mdp, old, seed, adam)
                for size in SIZES:
                    new = moved(mdp, old, direction, size)
                    measured[str(size)].append(measure(mdp, new, old))
    by_size = {size: summarize(found) for size, found in measured.items()}
    record.RESULTS.mkdir(exist_ok=True)
    plot(by_size, record.RESULTS / "staleness.png")
    record.write(
        "staleness",
        {"group_size": GROUP_SIZE, "worlds": number, "updates": 2 * number, "by_nats": by_size},
    )
    print(table(by_size))


if __name__ == "__main__":
    main()
