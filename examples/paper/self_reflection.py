"""Self-reflection is there before RL, and it does not make an answer more accurate.

Sections 2.3, appendices C, D and E, figures 3 right and 9 to 13, table 5 of Liu et al. 2025
(arXiv:2503.20783). Responses of the base model and of the trained one are searched for
self-reflection, by keywords and, where an OpenAI-compatible endpoint is given, by a judge:

    python examples/paper/self_reflection.py --judge http://localhost:8000/v1 --judge-model NAME

Then: what becomes of responses by difficulty before and after RL, how long they are, and how the
accuracy of responses with self-reflection compares with that of the others to the same question.
"""

from __future__ import annotations

from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import click
import matplotlib.pyplot as plt
import numpy as np
from claim import Interval, Job, Options, Verdict, algorithm, claim_options, interval, train, write
from matplotlib.figure import Figure
from reflection import (
    OUTCOMES,
    Detection,
    accuracy_differences,
    detect,
    lengths,
    outcome,
    outcomes_by_level,
    shares,
)

from lmrl_env.grading import Grader
from lmrl_env.samples import Sample, read_samples, to_line
from lmrl_env.suite import EvalSettings, SuitePrompts, choose_template, load_suite, sample_suite
from lmrl_env.verifiers import verifier_for

SHADES = {"correct": "C0", "wrong": "C1", "unformatted": "C7", "truncated": "C5"}


class Plan(NamedTuple):
    """Sizes of the experiment.

    Attributes:
        model: base.
        suite: questions to answer, whose rows have a level.
        limit: most of them.
        temperatures: of the base model's responses; the last is that of all others.
        many: responses to a question for the comparison with and without self-reflection.
        many_questions: most questions of that.
        flags: of the training runs.
    """

    model: str
    suite: str
    limit: int
    temperatures: tuple[float, ...]
    many: int
    many_questions: int
    flags: dict[str, Any]


TINY = Plan(
    "tiny", "arithmetic:size=240", 240, (0.2, 0.4, 0.6, 0.8, 1.0), 100, 60,
    {"steps": 40, "prompts_per_step": 12, "group_size": 8, "max_new_tokens": 96,
     "eval_every": 0, "eval_questions": 128, "checkpoint_every": 0},
)  # fmt: skip
PAPER = Plan(
    "Qwen/Qwen2.5-Math-1.5B", "math500", 500, tuple(n / 10 for n in range(1, 11)), 100, 500,
    {"steps": 150, "prompts_per_step": 128, "group_size": 8, "max_new_tokens": 3000,
     "updates_per_step": 8, "lr": 1e-6, "dtype": "bfloat16", "eval_every": 16,
     "eval_set": "math500", "questions": "math-12k"},
)  # fmt: skip
RESPONSES = 8


def runs(options: Options, plan: Plan) -> list[Job]:
    """Return the training runs: GRPO, as R1-Zero was trained, by seed."""
    given = {"questions": options.questions} if options.questions else {}
    flags = {"env": "MathR1-v0", "model": options.model or plan.model, **plan.flags, **given}
    return [
        Job(f"reflection-grpo-{options.scale}-s{seed}", algorithm("grpo"), {**flags, "seed": seed})
        for seed in range(options.seeds)
    ]


def respond(
    options: Options, plan: Plan, name: str, model: str, *, n: int, temperature: float, limit: int
) -> list[Sample]:
    """Sample and grade responses under the R1 template, or read those that stand there."""
    path = options.runs_dir / f"reflection-{options.scale}" / f"{name}.jsonl"
    if path.exists():
        return read_samples(path)
    engine = options.engine or ("local" if options.is_tiny else "vllm")
    settings = EvalSettings(n, temperature, plan.flags["max_new_tokens"], engine)
    template = choose_template("r1", model)
    suite = load_suite(plan.suite, limit)
    prompts = SuitePrompts.of(model, template, suite, settings.max_new_tokens)
    with Grader(verifier_for(template.answer_format)) as grader:
        samples = [s for batch in sample_suite(prompts, settings, grader) for s in batch]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(map(to_line, samples)), encoding="utf-8")
    part.replace(path)
    return samples


def share_figures(samples: list[Sample], detections: list[Detection]) -> dict[str, Any]:
    """Return shares of reflecting responses and questions by detector, with 95% intervals."""
    found = {"keyword": [d.keyword for d in detections]}
    if any(d.reply for d in detections):
        found["judge"] = [d.judge == 2 for d in detections]
        found["both"] = [d.both for d in detections]
    figures: dict[str, Any] = {
        name: {
            "responses": interval(shares(samples, flags).responses)._asdict(),
            "questions": interval(shares(samples, flags).questions)._asdict(),
        }
        for name, flags in found.items()
    }
    if "judge" in found:
        figures["categories"] = [sum(d.judge == c for d in detections) for c in range(4)]
        figures["unjudged"] = sum(d.judge is None for d in detections)
    return figures


def reflects(detections: list[Detection]) -> list[bool]:
    """Return whether each response reflects: by both detectors where a judge was asked."""
    judged = any(d.reply for d in detections)
    return [d.both if judged else d.keyword for d in detections]


def verdict(figures: dict[str, Any], options: Options) -> Verdict:
    """Say what the figures say."""
    detector = figures["detector"]
    base = figures["base"][-1]["shares"][detector]
    after = interval([run["shares"][detector]["responses"]["mean"] for run in figures["trained"]])
    before = Interval(**base["responses"])
    pooled = Interval(**figures["with_minus_without"]["trained"]["mean"])
    unhelped = figures["with_minus_without"]["trained"]["share_not_better"]
    longer = all(
        run["lengths"]["correct"] > figures["base"][-1]["lengths"]["correct"]
        and run["lengths"]["wrong"] > run["lengths"]["correct"]
        for run in figures["trained"]
    )
    parts = {
        "self-reflection before RL": before.low > 0,
        "more of it after RL": bool(after.low > before.high),
        "not more accurate with it": pooled.low <= 0,
        "right and wrong ones longer after RL, wrong ones most": longer,
    }
    said = "; ".join(f"{part}: {'yes' if held else 'no'}" for part, held in parts.items())
    return Verdict(
        section="§2.3, App. C-E, Fig. 3 right, 9-13, Table 5",
        claim="Base models reflect on their work before any RL. RL makes it more frequent and all "
        "responses longer, wrong ones most; but on nearly half of the questions the responses that "
        "reflect are no more accurate than the others.",
        measured=f"Share of responses that reflect, by {detector}, at temperature 1: {before} "
        f"before RL (at least one of 8: {Interval(**base['questions'])} of the questions), {after} "
        f"after. Accuracy with minus without self-reflection, mean over questions, after RL: "
        f"{pooled} ({Interval(**figures['with_minus_without']['trained']['mean_of_ended'])} among "
        f"responses that the budget did not cut off); reflecting responses are not "
        f"more accurate on {unhelped:.0%} of "
        f"{figures['with_minus_without']['trained']['questions']} questions. In short: {said}.",
        holds="holds" if all(parts.values()) else "partly" if any(parts.values()) else
        "does not hold",
        reason=REASON[options.scale],
        seeds=f"{options.seeds} runs of GRPO; {RESPONSES} responses a question, intervals over "
        "questions before RL and over runs after it",
    )  # fmt: skip


REASON = {
    "tiny": "The tiny base model reflects because its pretraining text does, in half of the "
    "solutions and after the result: what the paper supposes of large base models is known here. "
    "Such a sentence never revises the answer, so it cannot help; it can cost the answer, where "
    "the budget cuts the response off. What RL changes of it is how much its length is worth, "
    "which drifts apart by seed. Lengths go with the "
    "style: careful solutions are longer and right. No judge was asked at this scale (it "
    "takes a large model); its path is tested against a local server, and `--judge URL` asks one.",
    "paper": "",
}


def draw_all(figures: dict[str, Any], picture: Figure) -> None:
    """Draw shares by temperature, outcomes by level, lengths, and accuracy differences."""
    (top_left, top_right), (left, right) = picture.subplots(2, 2)
    draw_shares(top_left, figures["base"])
    before = figures["base"][-1]
    levels = list(before["outcomes"])
    for offset, group, hatch in ((-0.2, [before], ""), (0.2, figures["trained"], "//")):
        bottom = np.zeros(len(levels))
        for kind, color in SHADES.items():
            look = {"color": color, "hatch": hatch, "edgecolor": "white"}
            share = [np.mean([run["outcomes"][level][kind] for run in group]) for level in levels]
            x = np.arange(len(levels)) + offset
            top_right.bar(x, share, 0.36, bottom, label="" if hatch else kind, **look)
            bottom += share
            kept = [run["lengths"][kind] for run in group if run["lengths"][kind]]
            left.bar(OUTCOMES.index(kind) + offset, np.mean(kept) if kept else 0, 0.36, **look)
    top_right.set(xticks=range(len(levels)), xticklabels=levels, xlabel="level of the question",
                  ylabel="share of responses", ylim=(0, 1.25),
                  title="Outcome, before RL (plain) and after (hatched)")  # fmt: skip
    top_right.legend(ncol=2, loc="upper center")
    left.set(xticks=range(len(OUTCOMES)), xticklabels=OUTCOMES, ylabel="mean length (characters)",
             title="Length, before RL (plain) and after (hatched)")  # fmt: skip
    for name, color, label in (("base", "C7", "before RL"), ("trained", "C3", "after RL (GRPO)")):
        gaps = np.sort(figures["with_minus_without"][name]["differences"])
        right.plot(np.linspace(0, 1, len(gaps)), gaps, "o", ms=4, color=color, label=label)
    right.axhline(0, color="black", lw=0.8)
    right.set(xlabel="questions in ascending order (share)", title="Does self-reflection help?",
              ylabel="accuracy with minus without")  # fmt: skip
    right.legend()


def draw_shares(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw how often responses and questions reflect, by detector, against the temperature."""
    for name, color in (("keyword", "C0"), ("judge", "C4"), ("both", "C2")):
        if name not in rows[0]["shares"]:
            continue
        for part, style in (("questions", "--"), ("responses", "-")):
            y, low, high = np.transpose([list(r["shares"][name][part].values()) for r in rows])
            axes.errorbar([row["temperature"] for row in rows], y, [y - low, high - y],
                          color=color, ls=style, marker="o",
                          label=f"{part}, by {name}")  # fmt: skip
    axes.set(xlabel="temperature", ylabel="share that reflects", ylim=(0, 1.02),
             title="Before RL: how often self-reflection shows")  # fmt: skip
    axes.legend()


def tables(figures: dict[str, Any]) -> str:
    """Return Table 5, and the shares by temperature, as Markdown."""
    lines = ["| mean characters | before RL | after RL |", "|---|---|---|"]
    for kind in OUTCOMES:
        before = figures["base"][-1]["lengths"][kind]
        after = [run["lengths"][kind] for run in figures["trained"] if run["lengths"][kind]]
        cells = [f"{before:.1f}" if before else "–", str(interval(after)) if after else "–"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    detector = figures["detector"]
    lines += ["", "| temperature | responses that reflect | questions | accuracy |",
              "|---|---|---|---|"]  # fmt: skip
    for row in figures["base"]:
        share = row["shares"][detector]
        lines.append(
            f"| {row['temperature']} | {Interval(**share['responses'])} | "
            f"{Interval(**share['questions'])} | {row['accuracy']:.3f} |"
        )
    return "\n".join(lines)


@click.option("--judge", "judge_url", help="Address of an OpenAI-compatible endpoint.")
@click.option("--judge-model", default="", help="Name of the judge there.")
@claim_options(seeds=3)
def main(options: Options, judge_url: str | None, judge_model: str) -> None:
    """Look for self-reflection before and after RL, and whether it helps."""
    plan = TINY if options.is_tiny else PAPER
    base = options.model or plan.model
    folders = train(options, runs(options, plan))

    def measure(name: str, model: str, temperature: float) -> dict[str, Any]:
        samples = respond(options, plan, name, model, n=RESPONSES, temperature=temperature,
                          limit=plan.limit)  # fmt: skip
        found = detect(samples, judge_url=judge_url, judge_model=judge_model)
        return {
            "model": name,
            "temperature": temperature,
            "accuracy": float(np.mean([sample.status == "correct" for sample in samples])),
            "shares": share_figures(samples, found),
            "outcomes": outcomes_by_level(samples),
            "lengths": lengths(samples),
        }

    def compare(name: str, model: str) -> dict[str, Any]:
        samples = respond(options, plan, f"{name}-many", model, n=plan.many,
                          temperature=plan.temperatures[-1], limit=plan.many_questions)  # fmt: skip
        found = reflects(detect(samples, judge_url=judge_url, judge_model=judge_model))
        differences = accuracy_differences(samples, found)
        ended = [outcome(sample) != "truncated" for sample in samples]
        of_ended = accuracy_differences(
            list(compress(samples, ended)), list(compress(found, ended))
        )
        return {
            "mean_of_ended": interval(of_ended)._asdict(),
            "questions": len(differences),
            "mean": interval(differences)._asdict(),
            "share_not_better": float(np.mean(differences <= 0)),
            "differences": differences.tolist(),
        }

    trained = {name: str(last_checkpoint(folder)) for name, folder in folders.items()}
    first = next(iter(trained))
    figures = {
        "detector": "keyword" if judge_url is None else "both",
        "base": [measure(f"base-t{t}", base, t) for t in plan.temperatures],
        "trained": [measure(name, m, plan.temperatures[-1]) for name, m in trained.items()],
        "with_minus_without": {
            "base": compare("base", base), "trained": compare(first, trained[first]),
        },
    }  # fmt: skip
    picture = plt.figure(figsize=(12, 8.5), layout="constrained")
    draw_all(figures, picture)
    write(options, "self_reflection", "Self-reflection before RL", verdict(figures, options),
          figures, picture, tables(figures))  # fmt: skip


def last_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return max(folder.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))


if __name__ == "__main__":
    main()
