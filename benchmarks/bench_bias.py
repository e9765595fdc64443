"""The bias of each algorithm file, exactly: its expected gradient against ∇J, by enumeration.

    python benchmarks/bench_bias.py --policies 20

Writes `results/bias.json` and `results/bias.png`, and prints the README's table. Responses have up
to 3 tokens out of 3, one of which is EOS; groups have 4 of them, off-policy 3, and 8
where the weight of a question is measured. Truncated responses pay 0 where rewards are 0
and 1.
"""

from __future__ import annotations

import functools
import importlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import record
import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from lmrl_env.exact import (
    TabularPolicy,
    TokenMDP,
    TokenPolicy,
    enumerate_trajectories,
    expected_gradient,
    flat_gradient,
)
from lmrl_env.testing import bias_report
from lmrl_env.testing.unbiased import BiasReport

sys.path.insert(0, str(Path(__file__).parents[1]))

WHERE_FROM = {
    "dr_grpo": "None: the baseline and a constant divisor change the scale only.",
    "rloo": "None, nor of scale: the baseline is independent of the response.",
    "ppo": "None at λ = 1, whatever the critic says.",
    "ppo, λ = 0.95": "The critic, here a random one; none if it is exact.",
    "reinforce_pp": "The batch's std goes with the rewards and the mix of questions; "
    "for one question with rewards of 0 and 1 there is none.",
    "lite_ppo": "Tokens and std of the batch, its divisors, go with the rewards.",
    "dapo": "The number of tokens goes with the rewards, and 1/std weighs questions.",
    "cispo": "On-policy it is DAPO: the number of tokens and 1/std.",
    "grpo": "1/length favours short right and long wrong answers, 1/std weighs questions.",
    "gspo": "On-policy it is GRPO: 1/length and 1/std.",
}
GROUP_SIZE = 4
OFF_POLICY_GROUP_SIZE = 3
DISTANCE = 0.1  # nats: KL of a response, from the policy that samples to the one that learns
PASS_RATES = (0.02, 0.1, 0.3, 0.5)
UNCLIPPED = {"clip_eps_low": 1.0, "clip_eps_high": 1e9}
SETTINGS = ("one question", "two questions", "real-valued rewards")


def look_random(*key: Any) -> float:
    return random.Random(str(key)).random()


def zero_one(*shares: float, seed: int = 0) -> Callable[..., float]:
    """Pay 1 for a share of the responses to each question that end before the budget does."""
    return lambda question, tokens, terminated: float(
        terminated and look_random(seed, question, tokens) < shares[question]
    )


MDPS = {
    "one question": (TokenMDP(3, 3, zero_one(0.4), eos=2), 1),
    "two questions": (TokenMDP(3, 3, zero_one(0.15, 0.6), eos=2, question_probs=(0.5, 0.5)), 2),
    "real-valued rewards": (TokenMDP(3, 3, lambda *key: look_random(*key[:2]), eos=2), 1),
}
COMMITTED = TokenMDP(3, 4, lambda _, tokens, __: float(tokens[0] == 0), eos=2)
COIN = TokenMDP(2, 1, lambda _, tokens, __: float(tokens[0]))


class Committed(TabularPolicy):
    """Answers with its first token, right (0) or wrong (1), then goes on as it likes, and ends."""

    def forward(self, question: int, prefix: tuple[int, ...]) -> Tensor:
        never = torch.zeros(3, dtype=torch.float64)
        if not prefix:
            never[2] = -math.inf
        elif len(prefix) == 3:
            never[:2] = -math.inf
        return (self.logits[self.states[question, prefix]] + never).log_softmax(0)


def critic(question: int, prefix: tuple[int, ...]) -> float:
    return look_random("critic", question, prefix)


def estimator(name: str, group_size: int) -> tuple[tuple[Callable[..., Any], ...], dict[str, Any]]:
    """Return the two functions of a file, and what it takes to enumerate them."""
    module = importlib.import_module(f"algos.{name.split(',')[0]}")
    settings: dict[str, Any] = {"group_size": group_size}
    if module.__name__ == "algos.ppo":  # a sum over responses, one of which is enough
        gae_lambda = 0.95 if "λ" in name else 1.0
        settings = {"group_size": 1, "critic": critic, "questions": 1}
        settings["advantage_kwargs"] = {"gae_lambda": gae_lambda}
    return (module.compute_advantages, module.policy_loss), settings


def report(
    name: str, group_size: int, mdp: TokenMDP, policy: TabularPolicy, **settings: Any
) -> BiasReport:
    functions, own = estimator(name, group_size)
    return bias_report(*functions, mdp=mdp, policy=policy, **{**settings, **own})


@functools.cache
def neighbours(seed: int) -> tuple[TabularPolicy, TabularPolicy]:
    """Return two policies for one question, KL(second‖first) of a response as stated."""
    mdp, _ = MDPS["one question"]
    policy = TabularPolicy(mdp, seed)
    direction = TabularPolicy(mdp, seed + 10_000).logits.data

    def at(size: float) -> TabularPolicy:
        other = TabularPolicy(mdp)
        other.logits.data = policy.logits.data + size * direction
        return other

    low, high = 0.0, 8.0
    for _ in range(25):
        middle = (low + high) / 2
        is_near = divergence(mdp, at(middle), policy) < DISTANCE
        low, high = (middle, high) if is_near else (low, middle)
    return policy, at(low)


@torch.no_grad()
def divergence(mdp: TokenMDP, first: TokenPolicy, second: TokenPolicy) -> float:
    trajectories = enumerate_trajectories(mdp, first)
    gap = (trajectories.logprobs(first) - trajectories.logprobs(second)).sum(1)
    return (trajectories.probs * gap).sum().item()


def length_drift(name: str, mdp: TokenMDP, policy: TabularPolicy) -> float:
    """Return the derivative of E[length | wrong, ended] along the update, per unit of its norm."""
    functions, own = estimator(name, GROUP_SIZE)
    own.setdefault("collapsed", "critic" not in own)
    update = expected_gradient(*functions, mdp, policy, **own)
    trajectories = enumerate_trajectories(mdp, policy)
    meant = (trajectories.rewards == 0) & trajectories.terminated
    probs = trajectories.logprobs(policy).sum(1).exp() * meant
    mean_length = (probs * trajectories.lengths).sum() / probs.sum()
    return (flat_gradient(mean_length, policy) @ update / update.norm()).item()


def random_mdps(number: int) -> Iterator[tuple[TokenMDP, TabularPolicy]]:
    """Yield random 0/1 rewards, under which some ended responses are wrong, and some right."""
    seed = 0
    while number:
        mdp = TokenMDP(3, 3, zero_one(0.5, seed=seed), eos=2)
        policy = TabularPolicy(mdp, seed)
        ended = enumerate_trajectories(mdp, policy)
        rewards = set(ended.rewards[ended.terminated].tolist())
        seed += 1
        if len(rewards) == 2:
            number -= 1
            yield mdp, policy


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def angles(reports: list[BiasReport]) -> dict[str, Any]:
    return {
        "cosine": spread([r.cosine for r in reports]),
        "degrees": spread([r.degrees for r in reports]),
    }


def weight(name: str, p: float) -> float:
    """Return E[A·score] / p(1-p) in groups of eight, one question a batch."""
    policy = TabularPolicy(COIN, scale=0)
    policy.logits.data[0, 1] = math.log(p / (1 - p))
    return report(name, 8, COIN, policy, questions=1).scale


def on_policy(name: str, policies: int) -> dict[str, Any]:
    figures = {}
    for setting, (mdp, questions) in MDPS.items():
        collapsed = name.split(",")[0] != "ppo"
        reports = [
            report(name, GROUP_SIZE, mdp, policy, questions=questions, collapsed=collapsed)
            for policy in (TabularPolicy(mdp, seed) for seed in range(policies))
        ]
        figures[setting] = angles(reports) | {
            "scale": spread([r.scale for r in reports]),
            "all_degrees": [r.degrees for r in reports],
        }
    return figures


def off_policy(name: str, policies: int) -> dict[str, Any]:
    """Return angles where another policy samples: the old one, or an engine unlike the trainer."""
    mdp, _ = MDPS["one question"]
    cases: dict[str, list[BiasReport]] = {}
    for seed in range(policies):
        policy, other = neighbours(seed)
        for case, settings in {
            "old policy": {"old_policy": other, "loss_kwargs": UNCLIPPED},
            "old policy, default clip": {"old_policy": other},
            "engine": {"sampling_policy": other},
            "engine, tis_cap 2": {"sampling_policy": other, "tis_cap": 2.0},
            "engine, no cap": {"sampling_policy": other, "tis_cap": math.inf},
        }.items():
            found = report(name, OFF_POLICY_GROUP_SIZE, mdp, policy, questions=1, **settings)
            cases.setdefault(case, []).append(found)
    return {case: angles(reports) for case, reports in cases.items()}


def sequence_ratio(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, totals: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = ((logprobs - old_logprobs) * mask).sum(1).exp()
    return -(ratio * advantages).sum() / totals.responses, {}


def sequence_ratio_angles(policies: int) -> dict[str, Any]:
    """Return those of RLOO's advantages times the ratio of the whole response."""
    mdp, _ = MDPS["one question"]
    (compute_advantages, _), own = estimator("rloo", OFF_POLICY_GROUP_SIZE)
    reports = []
    for seed in range(policies):
        policy, old = neighbours(seed)
        got = bias_report(compute_advantages, sequence_ratio, mdp=mdp, policy=policy,
                          questions=1, old_policy=old, **own)  # fmt: skip
        reports.append(got)
    return angles(reports)


def length_bias(name: str, number: int) -> dict[str, list[float]]:
    committed = [(COMMITTED, Committed(COMMITTED, seed)) for seed in range(number)]
    worlds = {"first token commits": committed, "random": list(random_mdps(number))}
    return {key: [length_drift(name, *world) for world in pairs] for key, pairs in worlds.items()}


def length_summary(drifts: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return medians for each file, and how often GRPO's exceeds Dr. GRPO's."""
    summary: dict[str, Any] = {}
    for world, of_dr_grpo in drifts["dr_grpo"].items():
        pairs = zip(drifts["grpo"][world], of_dr_grpo, strict=True)
        summary[world] = {
            "mdps": len(of_dr_grpo),
            "share_grpo_above_dr_grpo": sum(a > b + 1e-12 for a, b in pairs) / len(of_dr_grpo),
            "drift": {name: spread(values[world]) for name, values in drifts.items()},
        }
    return summary


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw the angle to ∇J of each policy as a dot, their median as a bar."""
    names = list(reversed(figures))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle("Angle between the expected gradient, on-policy, and ∇J (a dot a policy)")
    for axes, setting in zip(figure.subplots(1, 3, sharey=True), SETTINGS, strict=True):
        for row, name in enumerate(names):
            degrees = figures[name][setting]["all_degrees"]
            axes.scatter(degrees, [row] * len(degrees), s=14, alpha=0.4, color="C0", linewidths=0)
            axes.plot([median(degrees)] * 2, [row - 0.35, row + 0.35], color="C1", linewidth=2)
        axes.set_title(setting, fontsize=11)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(left=-0.5)
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("degrees (bar: median)")
    figure.savefig(path, dpi=120)


def cell(report: dict[str, Any]) -> str:
    """Return the median and the largest angle; 0 where rounding errors alone are left."""
    degrees = report["degrees"]
    return "0" if degrees["max"] < 1e-6 else f"{degrees['median']:.2g}° ({degrees['max']:.2g}°)"


def table(figures: dict[str, Any]) -> str:
    """Return the README's table: median and largest angles to ∇J, drifts and weights."""
    lines = [
        "| | one question | two questions | real-valued | off-policy | wrong answers' length "
        "| weight at p = .02 / .5 | where the bias comes from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    drift = figures["length"]["first token commits"]["drift"]
    for name, source in WHERE_FROM.items():
        file, *variant = name.split(", ")
        cells = [cell(figures["on_policy"][name][setting]) for setting in SETTINGS]
        cells.append(cell(figures["off_policy"][name]["old policy"]))
        cells.append(f"{drift[name]['median']:+.3f}" if abs(drift[name]["median"]) > 1e-9 else "0")
        weights = figures["difficulty_weight"][name]
        cells += [f"{weights['0.02']:.3g} / {weights['0.5']:.3g}", source]
        lines.append(f"| {', '.join([f'`{file}`', *variant])} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--policies", default=20, show_default=True, help="Random policies of each setting.")
@click.option("--mdps", default=100, show_default=True, help="Of each kind, for the length bias.")
def main(policies: int, mdps: int) -> None:
    """Measure the bias of the nine files, of PPO with a random critic at two λ."""
    figures: dict[str, Any] = {
        "group_size": GROUP_SIZE,
        "off_policy_group_size": OFF_POLICY_GROUP_SIZE,
        "policies": policies,
        "off_policy_kl": DISTANCE,
        **{key: {} for key in ("on_policy", "off_policy", "difficulty_weight")},
    }
    drifts = {}
    with Progress() as progress:
        for name in progress.track(WHERE_FROM, description="enumerating"):
            figures["on_policy"][name] = on_policy(name, policies)
            figures["off_policy"][name] = off_policy(name, policies)
            figures["difficulty_weight"][name] = {str(p): weight(name, p) for p in PASS_RATES}
            drifts[name] = length_bias(name, mdps)
    figures["off_policy"]["sequence ratio"] = {"old policy": sequence_ratio_angles(policies)}
    figures["length"] = length_summary(drifts)
    record.RESULTS.mkdir(exist_ok=True)
    plot(figures["on_policy"], record.RESULTS / "bias.png")
    for settings in figures["on_policy"].values():
        for setting in settings.values():
            del setting["all_degrees"]
    record.write("bias", figures)
    print(table(figures))


if __name__ == "__main__":
    main()
