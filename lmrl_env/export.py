"""A checkpoint as a model to publish: a Transformers folder with a card that says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lmrl_env.checkpoint import TRAINER, Checkpoints, accuracies, best_step
from lmrl_env.durable import CHECKSUMS, find_damage
from lmrl_env.errors import ConfigurationError, RunFolderError
from lmrl_env.policy import load_model
from lmrl_env.tokenizer import load_tokenizer

SETTINGS = (
    *("env", "questions", "eval_set", "engine", "steps", "prompts_per_step", "group_size"),
    *("max_new_tokens", "temperature", "lr", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("updates_per_step", "epochs", "tis_cap", "entropy_coef", "kl_coef", "clip_eps_low"),
    *("clip_eps_high", "dtype", "lora_rank", "seed"),
)
"""Settings that a card lists, where the run has them."""

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags:
- lmrl_env
- reinforcement-learning
- {algorithm}
---

# {title}

{model} after {step} steps of `{algorithm}` in `{env}`, on the questions `{questions}`.

| held-out accuracy, {asked} questions at temperature {temperature} | |
|---|---|
{accuracy}

## How it was trained

| | |
|---|---|
{settings}

Trained with lmrl_env at commit `{commit}` on {hardware}; {versions}.

## Citation

```bibtex
@software{{lmrl_env,
  title = {{lmrl_env: a Gymnasium environment and single-file RL algorithms for language models}},
  author = {{{{The lmrl_env developers}}}},
  version = {{{version}}}
}}

@article{{liu2025understanding,
  title = {{Understanding R1-Zero-Like Training: A Critical Perspective}},
  author = {{Liu, Zichen and Chen, Changyu and Li, Wenjun and Qi, Penghui and Pang, Tianyu and
            Du, Chao and Lee, Wee Sun and Lin, Min}},
  journal = {{arXiv preprint arXiv:2503.20783}},
  year = {{2025}}
}}
```
"""


def export(run: Path, folder: Path, step: str = "last") -> Path:
    """Write a checkpoint as a Transformers folder with a model card, and load it.

    Args:
        run: folder of a run, or of one of its checkpoints.
        folder: that shall appear.
        step: number of a step, ``best`` by held-out accuracy, or ``last``; of a run.

    Returns:
        The checkpoint.

    Raises:
        ConfigurationError: if there is no such checkpoint, or the folder is there already.
        RunFolderError: if the checkpoint is damaged.
        ModelError: if what was written cannot be loaded.
    """
    if folder.exists():
        raise ConfigurationError(f"{str(folder)!r} is there already: name a new folder")
    if (run / TRAINER).is_dir():
        run, checkpoint = run.resolve().parents[1], run
    else:
        checkpoint = _choose(run, step)
    if (damage := find_damage(checkpoint)) is not None:
        raise RunFolderError(
            f"{checkpoint} is damaged: {damage}; export another one with --step, of "
            f"{Checkpoints(checkpoint.parent).steps}"
        )
    config, rows = _read_run(run)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns(TRAINER, CHECKSUMS))
    number = int(checkpoint.resolve().name.removeprefix("step-"))
    (partial / "README.md").write_text(model_card(config, rows, number, folder.name))
    load_model(str(partial))
    load_tokenizer(str(partial))
    partial.rename(folder)
    return checkpoint


def _choose(run: Path, step: str) -> Path:
    checkpoints = Checkpoints(run / "checkpoints")
    steps = checkpoints.steps
    if step == "best":
        chosen = best_step(steps, accuracies(_read_run(run)[1]))
    elif step == "last":
        chosen = set(steps[-1:])
    else:
        chosen = {each for each in steps if str(each) == step}
    if not chosen:
        raise ConfigurationError(
            f"--step {step}: {str(run)!r} has no such checkpoint; expected a number of {steps}, "
            "last, or best where a step with a checkpoint was evaluated"
        )
    return checkpoints.folder(chosen.pop())


def _read_run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        config = json.loads((run / "config.json").read_text())
        lines = (run / "metrics.jsonl").read_text().split("\n")
        rows = [json.loads(line) for line in lines[:-1]]  # the last one may be half written
        _ = config["algorithm"]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"{str(run)!r} is no training run ({error!r}): expected a folder with config.json, "
            "metrics.jsonl and checkpoints, or one of its checkpoints"
        ) from error
    return config, rows


def model_card(config: dict[str, Any], rows: list[dict[str, Any]], step: int, title: str) -> str:
    """Return the text of a model card.

    Args:
        config: ``config.json`` of the run.
        rows: of its ``metrics.jsonl``.
        step: of the checkpoint.
        title: of the card.
    """
    measured = {at: value for at, value in accuracies(rows).items() if at <= step}
    shown = dict.fromkeys((min(measured), max(measured)) if measured else ())
    asked = max((row.get("eval/questions") or 0 for row in rows), default=0)
    versions = config.get("versions") or {}
    name, base_model = config["model"], ""
    if name == "tiny":
        model = "The tiny model that ships with lmrl_env"
    elif Path(name).exists():
        model = f"The model `{Path(name).name}`"
    else:
        model, base_model = f"`{name}`", f"base_model: {name}\n"
    return CARD.format(
        title=title,
        algorithm=config["algorithm"],
        model=model,
        base_model=base_model,
        step=step,
        env=config["env"],
        questions=config["questions"],
        asked=asked,
        temperature=config["temperature"],
        accuracy="\n".join(f"| step {at} | {measured[at]:.1%} |" for at in shown)
        or "| not measured | |",
        settings="\n".join(
            f"| `{name}` | {config[name]} |"
            for name in SETTINGS
            if config.get(name) not in (None, False)
        ),
        commit=config.get("commit") or "unknown",
        hardware=config.get("hardware"),
        versions=", ".join(f"{name} {value}" for name, value in versions.items() if value),
        version=versions.get("lmrl_env"),
    )
