"""Dividing by the length of a response makes wrong answers longer: section 3.1, figures 1, 5, 6, 8.

GRPO, Dr. GRPO and the two steps between them are trained on several seeds, the other algorithms on
two. Lengths of sampled answers are confounded by the mix of solution styles, which learning
changes, so that the tails behind committed results are measured by themselves (``tails.py``), and
beside them stands what enumeration says (``drift.py``). The control has free tails but a policy
that cannot tell right from wrong where it chooses them: its reward is a coin (``coin.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from claim import (
    Interval,
    Job,
    Options,
    Verdict,
    algorithm,
    claim_options,
    curves,
    interval,
    train,
    write,
)  # fmt: skip
from drift import WORLDS, drift
from optimisation_bias_picture import ENDS, OTHERS, STEPS_OF, Runs, efficiency, picture_of
from tails import over_training, prefixes

OTHER_SEEDS = 2
TINY: dict[str, Any] = {
    "model": "tiny", "questions": "arithmetic", "steps": 40, "prompts_per_step": 8, "group_size": 8,
    "max_new_tokens": 160, "lr": 1e-4, "eval_every": 20, "eval_questions": 256,
    "checkpoint_every": 10, "keep_checkpoints": 0,
}  # fmt: skip
PAPER: dict[str, Any] = {
    "model": "Qwen/Qwen2.5-Math-1.5B", "questions": "math-12k", "eval_set": "math500", "steps": 400,
    "prompts_per_step": 128, "group_size": 8, "updates_per_step": 8, "max_new_tokens": 3000,
    "lr": 1e-6, "eval_every": 16, "eval_questions": 500, "dtype": "bfloat16",
    "gradient_checkpointing": True,
}  # fmt: skip
COIN = "tails after wrong, control"
LAST = 10
"""Steps at the end over which lengths are averaged."""


def jobs(options: Options, condition: str, names: Sequence[str], seeds: int, **flags: Any) -> Any:
    """Return the training runs of a condition, by algorithm and seed."""
    given = {key: getattr(options, key) for key in ("model", "questions") if getattr(options, key)}
    settings = {**(TINY if options.is_tiny else PAPER), **given, **flags}
    return {
        name: [
            Job(f"optimisation_bias/{condition}/{name}-{seed}", algorithm(name),
                {**settings, "seed": seed})
            for seed in range(seeds)
        ]
        for name in names
    }  # fmt: skip


def folders_of(options: Options, planned: Mapping[str, Sequence[Job]]) -> Runs:
    """Train, and return the folders."""
    done = train(options, [job for of_name in planned.values() for job in of_name])
    return {name: [done[job.name] for job in of_name] for name, of_name in planned.items()}


def last(folders: Sequence[Path], key: str) -> list[float]:
    """Return a metric's mean over the last steps of each run."""
    steps, values = curves(folders, key)
    end = curves(folders, "length/mean")[0][-1]
    return np.nanmean(values[:, steps > end - LAST], axis=1).tolist()


def measures(folders: Sequence[Path]) -> dict[str, list[float]]:
    """Return the figures of an algorithm at the end of training, one a seed."""
    return {
        "held-out accuracy": curves(folders, "eval/accuracy")[1][:, -1].tolist(),
        "length": last(folders, "length/mean"),
        "length, right": last(folders, "length/correct"),
        "length, wrong": last(folders, "length/incorrect"),
        "truncated": last(folders, "length/truncated_fraction"),
        "right per 1,000 tokens": np.nanmean(efficiency(folders)[1][:, -LAST:], axis=1).tolist(),
    }


def add_tails(
    found: dict[str, dict[str, list[float]]], runs: Runs, base: str
) -> dict[str, dict[str, list[list[float]]]]:
    """Measure tails at each checkpoint, add those of the end to the figures, and return all."""
    rows = prefixes(base)
    steps = range(0, TINY["steps"] + 1, TINY["checkpoint_every"])
    tails: dict[str, dict[str, list[list[float]]]] = {}
    for name, folders in runs.items():
        each = [over_training(folder, base, steps, rows) for folder in folders]
        tails[name] = {kind: [one[kind] for one in each] for kind in each[0]}
        for kind in ("wrong", "right"):
            of_name = found.setdefault(name, {})
            of_name[f"tails after {kind}"] = [one[kind][-1] for one in each]
            of_name[f"hazard after {kind}"] = [one[f"hazard {kind}"][-1] for one in each]
    return tails


def difference(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Return the mean difference of two algorithms over the seeds that both have."""
    return interval([a - b for a, b in zip(one, other, strict=False)])


def table(found: Mapping[str, Mapping[str, Sequence[float]]], paired: bool) -> str:
    """Return means as Markdown, or differences to Dr. GRPO paired by seed; two have no interval."""
    keys = list(found["dr_grpo"])
    lines = [f"| | seeds | {' | '.join(keys)} |", "|---|" + "---|" * (len(keys) + 1)]
    for name, of_name in found.items():
        if paired and name == "dr_grpo":
            continue
        seeds = len(of_name[keys[0]])
        cells = [str(seeds)]
        for key in keys:
            there = found["dr_grpo"][key]
            value = difference(of_name[key], there) if paired else interval(of_name[key])
            cells.append(str(value) if seeds > 2 else f"{value.mean:.3g}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def excludes_zero(value: Interval) -> bool:
    """Return whether zero is outside."""
    return value.low > 0 or value.high < 0


def judge(effects: Mapping[str, Interval]) -> Literal["holds", "partly", "does not hold"]:
    """Return the verdict from the differences between GRPO and Dr. GRPO, paired by seed.

    Wrong answers have to be longer, tails after wrong results too where they are known, accuracy
    the same, and the control without a difference.
    """
    keys = ("length, wrong", "tails after wrong")
    longer = [effects[key].low > 0 for key in keys if key in effects]
    same = ("held-out accuracy", COIN)
    if not any(longer):
        return "does not hold"
    is_clean = not any(excludes_zero(effects[key]) for key in same if key in effects)
    return "holds" if all(longer) and is_clean else "partly"


def verdict_of(effects: Mapping[str, Interval], reason: str, seeds: int) -> Verdict:
    """Return what became of the claim."""
    measured = "; ".join(f"{key} {value}" for key, value in effects.items())
    return Verdict(
        section="§3.1, 3.2, fig. 1, 5, 6, 8",
        claim="GRPO's 1/|o| and 1/std bias it: wrong answers grow long without need; Dr. GRPO, "
        "without the two, is as accurate and its wrong answers stay shorter.",
        measured=f"GRPO less Dr. GRPO at the end, paired by seed: {measured}.",
        holds=judge(effects),
        reason=reason,
        seeds=f"{seeds} seeds; {min(OTHER_SEEDS, seeds)} of the other seven algorithms",
    )


def reason_of(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Return why, by the half-steps, the enumeration and the control."""
    after = {name: of_name["tails after wrong"] for name, of_name in found.items()}
    half = {name: difference(after[name], after["dr_grpo"]) for name in STEPS_OF[1:3]}
    told = difference(after["grpo"], found["grpo"]["tails after right"])
    return (
        "It is the length normaliser: without it alone the tails after wrong results differ from "
        f"Dr. GRPO's by {half['grpo_without_length']} sentences, without the std alone by "
        f"{half['grpo_without_std']}. Enumeration says the same: where the policy can tell right "
        "from wrong results, 1/|o| makes tails longer after wrong and shorter after right ones; "
        "where it cannot and wrong solutions are the shorter ones, longer after both; where it "
        "cannot and lengths are equal it does nothing. The net, which shares parameters between "
        "the two, may lie between the first and the second: under GRPO, tails after wrong results "
        f"are longer than after right ones by {told} sentences. The third is what the "
        "control tests. Answers that the budget cut off are counted apart: they earn 0, "
        "which makes tails shorter without any bias."
    )


def control(options: Options, base: str) -> tuple[dict[str, Any], Interval]:
    """Pay by a coin; return the tails, and how those after wrong results come to differ."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    flags = {"env": "coin:Coin-v0", "eval_every": 0, "eval_questions": 64}
    planned = jobs(options, "coin", ENDS, options.seeds, **flags)
    found: dict[str, dict[str, list[float]]] = {}
    tails = add_tails(found, folders_of(options, planned), base)
    ends = [found[name]["tails after wrong"] for name in ("grpo", "dr_grpo")]
    return tails, difference(*ends)


@claim_options(seeds=5)
def main(options: Options) -> None:
    """Compare GRPO, Dr. GRPO, the two steps between them, and the other seven algorithms."""
    names = STEPS_OF + OTHERS
    planned = jobs(options, options.scale, STEPS_OF, options.seeds)
    planned |= jobs(options, options.scale, OTHERS, min(OTHER_SEEDS, options.seeds))
    runs = folders_of(options, planned)
    found = {name: measures(folders) for name, folders in runs.items()}
    exact = {world: {name: drift(algorithm(name), world) for name in names} for world in WORLDS}
    tails: dict[str, Any] = {}
    of_control: dict[str, Interval] = {}
    reason = "Tails are measured at tiny scale alone."
    if options.is_tiny:
        base = options.model or TINY["model"]
        tails["tiny"] = add_tails(found, runs, base)
        tails["coin"], of_control[COIN] = control(options, base)
        reason = reason_of(found)
    pairs = {key: (found["grpo"][key], there) for key, there in found["dr_grpo"].items()}
    effects = {key: difference(*pair) for key, pair in pairs.items()} | of_control
    figures = {"measures": found, "tails": tails, "exact drift": exact,
               "grpo less dr_grpo": effects}  # fmt: skip
    verdict = verdict_of(effects, reason, options.seeds)
    tables = f"{table(found, False)}\n\nLess Dr. GRPO, paired by seed:\n\n{table(found, True)}"
    steps, others = ({name: runs[name] for name in chosen} for chosen in (STEPS_OF, OTHERS))
    picture = picture_of(steps, others, tails, exact)
    write(options, "optimisation_bias", "The optimisation bias", verdict, figures, picture, tables)


if __name__ == "__main__":
    main()
