"""Templates and base models (sections 2.1 and 2.2, Table 1, Fig. 3 left).

A template makes a base model answer a question instead of continuing it; Qwen2.5-Math answers best
without any, and the paper supposes that it was pretrained on question-answer text. Here the
pretraining is known: ``qa`` read bare questions with their solutions right behind, ``text`` read
solutions in templates only and bare questions one after another, ``mixed`` is the shipped model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bases import (
    COLORS,
    PAPER_MODELS,
    PAPER_SUITE,
    Evaluation,
    Holds,
    accuracy,
    base_models,
    evaluate,
    example,
    holds,
    percent,
    question_means,
)
from claim import Interval, Options, Verdict, claim_options, write
from matplotlib.figure import Figure

from lmrl_env.grading import Grader
from lmrl_env.questions.arithmetic import problems
from lmrl_env.samples import Sample, grade
from lmrl_env.verifiers import llm_judge, verifier_for

TEMPLATES = ("four-shot", "r1", "qwen-math", "none")
STEP = re.compile(r"\d+ ?[-+*/] ?\d+ ?= ?\d+|\bit is:? \d+|result is \d+|\\boxed|<answer>")
"""What only a solution holds, in the texts of the tiny models."""
SHOTS = (
    ("What is the remainder when 47 is divided by 6?", "47 = 6 * 7 + 5, so it is \\boxed{5}."),
    ("Solve 3x - 4 = 11 for x.", "3x = 15, and so x = \\boxed{5}."),
    ("A rectangle has sides of 6 and 7. What is its area?", "6 * 7 = 42. It is \\boxed{42}."),
    ("How many ways are there to seat 4 people in a row?", "4! = 24. It is \\boxed{24}."),
)
"""Four solved examples for models of real size."""
JUDGE = (
    "A model was given this text:\n{question}\n\nIt went on with this, between the lines:\n"
    "====\n{response}\n====\n\nDoes it answer the question (CORRECT), rightly or not, or does it "
    "go on with the question or write something else (WRONG)? Reply with one word."
)


def four_shot(options: Options) -> str:
    """Return the text of a prompt with four solved examples, boxed as the verifier expects."""
    shots: Sequence[tuple[str, str]] = SHOTS
    if options.is_tiny:
        chain = problems("train", level=1, seed=4)
        sums = example("pretrain_tiny").write_sums
        shots = [
            (p.question, f"{sums(p.steps)}. \\boxed{{{p.answer}}}")
            for p, _ in zip(chain, range(4), strict=False)
        ]
    solved = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)
    return f"{solved}Question: {{question}}\nAnswer:"


def first_answer(samples: Sequence[Sample]) -> list[Sample]:
    """Return four-shot samples without the further questions that a model invents."""
    cut = []
    for sample in samples:
        own, further, _ = sample.response.partition("\n\nQuestion:")
        reason = "stop" if further else sample.finish_reason
        cut.append(sample._replace(response=own, finish_reason=reason))
    return cut


def is_answer(response: str) -> bool:
    """Return whether a response solves the question before it poses another one.

    >>> is_answer(" 3+4=7."), is_answer(" How many are left? 3+4=7."), is_answer(" Tom")
    (True, False, False)
    """
    found = STEP.search(response)
    return found is not None and "?" not in response[: found.start()]


def answering(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with score 1 where they answer, by a language model if there is one.

    OPENAI_BASE_URL names its endpoint; else a rule decides, which knows the tiny models' texts.
    """
    url = os.environ.get("OPENAI_BASE_URL")
    if url is None:
        return [sample._replace(score=float(is_answer(sample.response))) for sample in samples]
    ended = [sample._replace(finish_reason="stop") for sample in samples]
    with Grader(partial(llm_judge, base_url=url, prompt=JUDGE)) as grader:
        return grade(ended, grader)


def score(samples: Sequence[Sample]) -> float:
    """Return the mean score."""
    return float(np.mean([sample.score for sample in samples]))


def measure(
    samples: Mapping[str, Sequence[Sample]], models: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return answering rate and accuracy by base model and template, the latter by seed too."""
    table: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in models}
    for template, rows in samples.items():
        marked = answering(rows)
        for name, seeds in models.items():
            table[name][template] = {
                "answering": question_means(marked, seeds, score),
                "accuracy": question_means(rows, seeds, accuracy),
                "accuracy_by_seed": [question_means(rows, [s], accuracy).mean for s in seeds],
            }
    return table


def conclude(
    table: Mapping[str, Mapping[str, Mapping[str, Interval]]], joined: str, apart: str
) -> tuple[str, Holds, str]:
    """Return what was measured, the verdict and its reason.

    Args:
        table: by base model and template.
        joined: the base that read questions and answers joined, or is supposed to have.
        apart: the base that did not.
    """
    best = {
        name: max(of, key=lambda template: of[template]["accuracy"].mean)
        for name, of in table.items()
    }
    measured = "; ".join(
        f"{name}: answers {percent(of['none']['answering'])} of bare questions and "
        f"{percent(of['r1']['answering'])} under R1, is right most often under {best[name]} "
        f"({percent(of[best[name]]['accuracy'])})"
        for name, of in table.items()
    )
    bare, shots = table[joined]["none"], table[joined]["four-shot"]
    parts = {
        f"{joined} answers more than 95% of bare questions": bare["answering"].mean > 0.95,
        f"{joined} is right most often without a template": best[joined] == "none",
        "and more often than with four examples": bare["accuracy"].low > shots["accuracy"].high,
        f"R1 makes {apart} answer more often": table[apart]["r1"]["answering"].low
        > table[apart]["none"]["answering"].high,
    }
    found = "; ".join(f"{part}: {'yes' if is_so else 'no'}" for part, is_so in parts.items())
    return measured, holds(list(parts.values())), f"{found[0].upper()}{found[1:]}."


CONSTRUCTED = (
    " By construction: qa read solutions right behind bare questions and text only in templates, "
    "so the first and the last part nearly must hold. Measured: how nearly, and what a template or "
    "four examples that a diet never had cost. If qa shows the pattern of Qwen2.5-Math, the "
    "hypothesis suffices for it; that Qwen2.5 was so trained does not follow."
    " Limits: four examples make no tiny model better, as no diet has prompts of that kind and "
    "length, so that part says little; qa never read an <answer> tag, so its 0% under R1 was "
    "nearly certain; mixed was trained longer and on all levels, so its accuracy does not compare."
)
"""Which parts of the verdict the diets decide."""


def draw_table(table: Mapping[str, Mapping[str, Mapping[str, Interval]]]) -> Figure:
    """Draw answering rate and accuracy as bars."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("answering", "accuracy"), strict=True):
        for i, (name, of) in enumerate(table.items()):
            values = [of[template][key] for template in TEMPLATES]
            means = np.array([value.mean for value in values])
            ends = np.array([(v.mean - v.low, v.high - v.mean) for v in values]).T
            places = np.arange(len(TEMPLATES)) + (i - (len(table) - 1) / 2) * 0.8 / len(table)
            axes.bar(
                places, means, 0.75 / len(table), yerr=ends, capsize=3, label=name,
                color=COLORS.get(name, f"C{i}"),
            )  # fmt: skip
        axes.set_xticks(range(len(TEMPLATES)), TEMPLATES)
        axes.set(xlabel="template", ylim=(0, 1.05 if key == "answering" else None))
    figure.axes[0].set_ylabel("share of responses that answer")
    figure.axes[1].set_ylabel("share of responses that are right")
    figure.axes[1].legend(title="base model")
    return figure


@claim_options(seeds=2)
def main(options: Options) -> None:
    """Measure answering rate and accuracy of base models under four prompts."""
    if options.is_tiny:
        models = {**base_models(options), "mixed": [options.model or "tiny"]}
        flags = {"suite": "arithmetic:level=1", "limit": 128, "n": 4, "temperature": 1.0}
        flags["max_new_tokens"] = 96
    else:
        names = [options.model] if options.model else PAPER_MODELS
        models = {name: [name] for name in names}
        flags = {"suite": PAPER_SUITE, "max_new_tokens": 3000, "dtype": "bfloat16"}
    shots: Path = options.runs_dir / "four-shot.txt"
    shots.parent.mkdir(parents=True, exist_ok=True)
    shots.write_text(four_shot(options), encoding="utf-8")
    asked = [model for seeds in models.values() for model in seeds]
    evaluations = [
        Evaluation(
            f"templates-{options.scale}-{template}",
            asked,
            {**flags, "template": str(shots) if template == "four-shot" else template},
        )
        for template in TEMPLATES
    ]
    found = evaluate(options, evaluations)
    if options.dry_run:
        return
    samples = {t: found[e.name] for t, e in zip(TEMPLATES, evaluations, strict=True)}
    with Grader(verifier_for("either")) as grader:
        samples["four-shot"] = grade(first_answer(samples["four-shot"]), grader)
    table = measure(samples, models)
    roles = ("qa", "text") if options.is_tiny else (PAPER_MODELS[0], "meta-llama/Llama-3.1-8B")
    joined, apart = (role if role in table else asked[0] for role in roles)
    measured, outcome, reason = conclude(table, joined, apart)
    if options.is_tiny:
        reason += CONSTRUCTED
    lines = ["| base model | template | answers | right |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {template} | {percent(row['answering'])} | {percent(row['accuracy'])} |"
        for name, of in table.items()
        for template, row in of.items()
    ]
    verdict = Verdict(
        "sections 2.1 and 2.2, Table 1, Fig. 3 left",
        "A template makes base models answer instead of continue the question; Qwen2.5-Math "
        "answers every question without one, and best so, which question-answer text in its "
        "pretraining would explain.",
        measured, outcome, reason,
        f"{options.seeds} pretraining seeds of qa and text, one of mixed; 95% intervals by "
        "bootstrap over 128 questions, 4 responses each" if options.is_tiny else "greedy",
    )  # fmt: skip
    write(options, "templates", "Templates and base models", verdict, {"table": table},
          draw_table(table), "\n".join(lines))  # fmt: skip


if __name__ == "__main__":
    main()
