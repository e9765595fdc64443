"""``lmrl eval``: models on question sets."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmrl_env.cli.completion import complete_questions, complete_template, complete_verifier
from lmrl_env.cli.screen import print_json, print_table, warn

if TYPE_CHECKING:
    from lmrl_env.grading import Grader
    from lmrl_env.samples import Sample
    from lmrl_env.suite import EvalSettings, SuitePrompts
    from lmrl_env.tables import Table


@click.command("eval")
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    help="tiny, a folder such as a checkpoint, or a hub id; several to compare with the first",
)
@click.option(
    "--suite",
    shell_complete=complete_questions,
    required=True,
    help="question sets with commas between; lmrl questions",
)
@click.option(
    "--template",
    shell_complete=complete_template,
    default="r1",
    show_default=True,
    help="r1, qwen-math, none, chat (the model's own), or a text file with {question}",
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option(
    "--n", type=click.IntRange(min=1), default=1, show_default=True, help="samples per question"
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=3000, show_default=True)
@click.option(
    "--engine",
    type=click.Choice(["auto", "local", "vllm"]),
    default="auto",
    show_default=True,
    help="auto is vllm where it and a GPU are there",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True
)
@click.option(
    "--verifier",
    shell_complete=complete_verifier,
    help="name or module:function; by default the template's",
)
@click.option("--limit", type=click.IntRange(min=1), help="most questions of a set, a fixed choice")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), help="folder; by default evals/ and the time"
)
@click.option("--json", "as_json", is_flag=True, help="print summary.json instead of tables")
def eval_command(models: tuple[str, ...], output: Path | None, **options: Any) -> None:
    """Evaluate models on question sets.

    \b
      lmrl eval --model tiny --suite arithmetic --limit 200 --max-new-tokens 96
      lmrl eval --model Qwen/Qwen2.5-Math-1.5B --suite aime24,amc,math500,minerva,olympiad-bench \\
        --template qwen-math --temperature 0.6 --n 8
      lmrl eval --model tiny --model runs/RUN/checkpoints/step-100 --suite arithmetic --limit 500

    Shown for each set: accuracy as the mean over n samples (avg@n), unbiased pass@n, majority@n,
    95% bootstrap intervals over questions, the share of responses with an answer in the
    template's form, lengths of right and wrong responses, and how many the budget cut off, which
    earn 0 as in training. More than one model: differences from the first, on the same questions.

    The folder gets config.json, samples.jsonl (every response with its verdict, for lmrl
    regrade), summary.json and summary.md.
    """
    if options["n"] > 1 and options["temperature"] == 0:
        raise click.UsageError(
            f"--n {options['n']} at --temperature 0 would repeat one response: give a temperature "
            "such as 0.6, or --n 1"
        )
    if len(set(models)) < len(models):
        raise click.UsageError(f"--model {' --model '.join(models)}: expected each of them once")
    from lmrl_env.errors import ConfigurationError
    from lmrl_env.grading import Grader
    from lmrl_env.suite import EvalSettings, SuitePrompts, choose_template, load_suite
    from lmrl_env.verifiers import verifier_for

    folder = output or Path("evals") / time.strftime("%Y%m%d-%H%M%S")
    if (folder / "samples.jsonl").exists():
        raise ConfigurationError(
            f"--output {str(folder)!r} already holds an evaluation: name another folder"
        )
    as_json, suite_text, limit = options["as_json"], options["suite"], options["limit"]
    settings = EvalSettings(**{key: options[key] for key in EvalSettings._fields})
    suite = load_suite(suite_text, limit)
    prompts = [
        SuitePrompts.of(
            model, choose_template(options["template"], model), suite, settings.max_new_tokens
        )
        for model in models
    ]
    verifier = options["verifier"] or verifier_for(prompts[0].template.answer_format)
    with Grader(verifier) as grader:
        grader.start()
        config = _config(prompts, settings, suite_text, limit, grader.verifier)
        _begin(folder, config)
        by_model = {p.model: _run(p, settings, grader, folder / "samples.jsonl") for p in prompts}
    finish(folder, by_model, config, settings.seed, as_json)


def _config(
    prompts: list[SuitePrompts],
    settings: EvalSettings,
    suite: str,
    limit: int | None,
    verifier: str,
) -> dict[str, Any]:
    """Return the record of an evaluation."""
    from lmrl_env.provenance import provenance
    from lmrl_env.registration import resolve_engine

    return {
        "models": [p.model for p in prompts],
        "suite": suite,
        "limit": limit,
        "sets": {
            label: {
                "name": table.questions.name,
                "report": table.questions.report,
                "too_long": {p.model: p.tables[label].dropped for p in prompts},
            }
            for label, table in prompts[0].tables.items()
        },
        "templates": {p.model: p.template._asdict() for p in prompts},
        "verifier": verifier,
        **settings._asdict(),
        "engine_used": resolve_engine(settings.engine),
        **provenance(),
    }


def _begin(folder: Path, config: dict[str, Any]) -> None:
    """Write the record of an evaluation, and warn of questions that are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "samples.jsonl").touch()
    for label, record in config["sets"].items():
        for model, dropped in record["too_long"].items():
            if dropped:
                warn(
                    f"{label}: {dropped} questions are too long for the context of {model} with "
                    "this --max-new-tokens, and are left out"
                )


def _run(prompts: SuitePrompts, settings: EvalSettings, grader: Grader, path: Path) -> list[Sample]:
    """Sample one model, and append its samples to a file as they come."""
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging as transformers_logging

    from lmrl_env.samples import to_line
    from lmrl_env.suite import sample_suite

    transformers_logging.disable_progress_bar()
    samples: list[Sample] = []
    console = Console(stderr=True)
    with (
        path.open("a", encoding="utf-8") as file,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(prompts.model, total=len(prompts) * settings.n)
        for batch in sample_suite(prompts, settings, grader):
            file.writelines(map(to_line, batch))
            file.flush()
            samples += batch
            progress.update(task, completed=len(samples))
    return samples


def finish(
    folder: Path,
    by_model: dict[str, list[Sample]],
    config: Mapping[str, Any],
    seed: int,
    as_json: bool,
) -> dict[str, Any]:
    """Write ``summary.json`` and ``summary.md``, print either, and warn of failed grading.

    Args:
        folder: for the files.
        by_model: samples; the models after the first are compared with it.
        config: the record of the evaluation.
        seed: of the bootstrap.
        as_json: whether to print JSON instead of tables.
    """
    from lmrl_env.summary import compare, summarise
    from lmrl_env.tables import comparison_table, markdown, settings_line, summary_table

    base, *others = by_model
    summary: dict[str, Any] = {
        "models": {model: summarise(samples, seed) for model, samples in by_model.items()},
        "differences": [
            {"model": other, "from": base, "sets": compare(by_model[base], by_model[other], seed)}
            for other in others
        ],
    }
    tables: list[Table] = [
        summary_table(model, of_model) for model, of_model in summary["models"].items()
    ]
    for difference in summary["differences"]:
        title = f"{difference['model']} against {base}, percentage points of accuracy"
        tables.append(comparison_table(title, difference["sets"]))
    (folder / "summary.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "summary.md").write_text(
        f"{markdown(tables)}\n{settings_line(config)}", encoding="utf-8"
    )
    if as_json:
        print_json(summary)
    else:
        for table in tables:
            print_table(table)
        click.echo(f"in {folder}: " + ", ".join(sorted(p.name for p in folder.iterdir())))
    for model, samples in by_model.items():
        failed = [sample for sample in samples if sample.status in ("timeout", "crash")]
        if failed:
            warn(
                f"the verifier failed on {len(failed)} of {len(samples)} responses of {model}, "
                f"which count as wrong; the first: {failed[0].status} at {failed[0].set} "
                f"{failed[0].question_id}: {failed[0].detail}"
            )
    return summary
