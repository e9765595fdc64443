"""Renders `benchmarks/README.md` from the results that stand beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

NOT_MEASURED = "not measured here"
Figures = Mapping[str, Any]


class Goal(NamedTuple):
    """A line of the table of goals.

    Attributes:
        work: that is done.
        against: what it is compared with.
        goal: in words.
        result: name of the JSON that has the figures.
        measured: what it says.
        floor: the least that the work can take here, and how far from it we are.
    """

    work: str
    against: str
    goal: str
    result: str
    measured: Callable[[Figures], str]
    floor: Callable[[Figures], str] = lambda figures: ""


def times(value: float) -> str:
    return f"{value:.3g} ×"


def _beside_trl(setting: str) -> Callable[[Figures], str]:
    def measured(figures: Figures) -> str:
        row = figures[setting]
        low, high = row["wall_ratio_range"]
        seconds = row["wall_seconds"]
        return (
            f"**{times(row['wall_ratio'])}** ({low:.1f} to {high:.1f}), "
            f"{seconds['lmrl_env']:.2f} s against {seconds['trl']:.2f} s"
        )

    return measured


def _trl_floor(setting: str) -> Callable[[Figures], str]:
    return lambda figures: f"{figures[setting]['floor_share']:.0%} of the matmul rate"


def _share_at(width: str, key: str) -> Callable[[Figures], str]:
    return lambda figures: f"{figures['widths'][width][key]:.0%}"


def _step_measured(width: str) -> Callable[[Figures], str]:
    def measured(figures: Figures) -> str:
        row = figures["widths"][width]
        ours, onednn = row["share_of_torch_mm_rate"], row["share_of_onednn_rate"]
        return f"**{ours:.0%}** of torch.mm's rate, {onednn:.0%} of oneDNN's"

    return measured


def _memory_beside_trl(figures: Figures) -> str:
    sides = figures["R1 prompts"]["sides"]
    ours, theirs = (sides[name]["above_start_mib"] for name in ("lmrl_env", "trl"))
    return f"**{ours:,.0f} MiB** against {theirs:,.0f} MiB above the start"


def _default_run(figures: Figures) -> str:
    run = figures["runs"][0]
    before, after = run["accuracy_before"], run["accuracy_after"]
    measured = f"{run['seconds']:.0f} s, {before:.1%} → {after:.1%}"
    if (beside := figures.get("beside")) is not None:
        measured = f"**{times(beside['ratio'])}** as fast as {beside['commit']}, {measured}"
    return measured


GOALS = (
    Goal("Dr. GRPO step, R1 prompts (150 tokens), 64 responses × 32 tokens, 3 M parameters",
         "TRL's GRPOTrainer", "≥ 4 ×", "vs_trl", _beside_trl("R1 prompts"),
         _trl_floor("R1 prompts")),
    Goal("the same, 14-token prompts", "TRL's GRPOTrainer", "≥ 2 ×", "vs_trl",
         _beside_trl("14-token prompts"), _trl_floor("14-token prompts")),
    Goal("the same, R1 prompts, natural lengths", "TRL's GRPOTrainer", "≥ 3 ×", "vs_trl",
         _beside_trl("R1 prompts, natural lengths"), _trl_floor("R1 prompts, natural lengths")),
    Goal("peak memory of that step, R1 prompts", "TRL's GRPOTrainer", "", "vs_trl",
         _memory_beside_trl),
    Goal("sampling of the default job", "Transformers' `generate`", "≥ 2.5 ×", "local_engine",
         lambda f: f"**{times(f['wall_ratio_to_local']['generate'])}**",
         lambda f: f"{f['local_share_of_floor']:.0%} of the floor"),
    Goal("sampling of the default job", "vLLM on the CPU", "", "local_engine",
         lambda f: times(f["wall_ratio_to_local"]["vllm"])),
    Goal("environment, wrappers and verifier", "the rollout's wall time", "≤ 2%", "rollout_local",
         lambda f: f"**{f['share_outside_engine']['verifier_and_statistics']:.1%}**",
         lambda f: f"{f['ms_outside_engine']:.1f} ms; to copy what it writes takes "
                   f"{1000 * f['floor']['seconds']:.2f} ms"),
    Goal("single-token `step`, 1,024 slots, views", "`SyncVectorEnv` of `TokenEnv`", "≥ 100 ×",
         "env_step", lambda f: f"**{times(f['views_over_sync']['median'])}**",
         lambda f: f"{f['median_step_over_floor']:.1f} × the copy's time"),
    Goal("grading, 2 workers", "Math-Verify in one process", "≥ 1.8 ×", "verifier",
         lambda f: f"**{times(f['ratio'])}** ({f['ratio_min']:.1f} to {f['ratio_max']:.1f})"),
    Goal("training step, 0.85 M parameters", "its matrix products at torch.mm's rate", "≥ 45%",
         "train_step", _step_measured("128")),
    Goal("training step, 3 M parameters", "its matrix products at torch.mm's rate", "≥ 60%",
         "train_step", _step_measured("256")),
    Goal("training step, 0.85 M parameters", "a padded forward of every prompt and response", "",
         "train_step", lambda f: times(f["widths"]["128"]["padded_over_packed"])),
    Goal("default job, seed 0", "the same before the work on speed (24.2% → 80.1%)", "≥ 2 ×",
         "default_run_local", _default_run),
    Goal("weights to the engine, tiny model", "a copy of them", "", "weight_sync",
         lambda f: ", ".join(f"{kind} {1000 * s:.1f} ms"
                             for kind, s in f["tiny"]["update_seconds"].items()),
         lambda f: f"{1000 * f['tiny']['floor']['seconds']:.2f} ms a copy"),
)  # fmt: skip


def render(results: Path) -> str:
    """Return the page.

    Args:
        results: folder of the JSON files.
    """
    records = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    parts = [HEAD, _table(records), *(_section(results, records, *each) for each in SECTIONS)]
    return "\n\n".join(part.strip() for part in [*parts, _origins(records)]) + "\n"


def _cell(value: Callable[[Figures], str], record: Figures | None) -> str:
    """Return what a result says; results of an older form count as not measured."""
    if record is None:
        return NOT_MEASURED
    try:
        return value(record["figures"])
    except KeyError:
        return NOT_MEASURED


def _table(records: Mapping[str, Figures]) -> str:
    lines = ["| work | against | goal | measured | floor |", "|---|---|---|---|---|"]
    for goal in GOALS:
        record = records.get(goal.result)
        measured = _cell(goal.measured, record)
        floor = _cell(goal.floor, record) if measured != NOT_MEASURED else ""
        lines.append(f"| {goal.work} | {goal.against} | {goal.goal} | {measured} | {floor} |")
    return "\n".join(lines)


def _section(
    results: Path, records: Mapping[str, Figures], title: str, program: str, result: str, text: str
) -> str:
    lines = [f"## {title}", text.strip(), f"`python benchmarks/{program}.py`"]
    if result not in records:
        lines.append(f"({NOT_MEASURED})")
    if (results / f"{result}.png").exists():
        lines.append(f"![{title}](results/{result}.png)")
    return "\n\n".join(lines)


def _origins(records: Mapping[str, Figures]) -> str:
    lines = [
        "## Where the figures are from",
        "",
        "| result | date | commit | hardware | load at the start | torch | transformers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in sorted(records.items()):
        versions = record.get("versions", {})
        cells = [
            f"[{name}](results/{name}.json)", record.get("date"), record.get("commit"),
            record.get("hardware"), record.get("load_at_start", ""), versions.get("torch", ""),
            versions.get("transformers", ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


HEAD = """
# How fast it is, and why

`python benchmarks/run_all.py` measures everything of this page and writes it anew. Two sides are
always measured in turns within one run, and the ratio is the median over the turns, so that it
does not move with the machine's load; seconds do. A floor is the least that the work can take on
this machine: its operations at the measured rate of matrix products, or its bytes at the measured
rate of a copy. What stands as a goal was set beforehand.
Only the default job, which takes minutes, has a single turn: its ratio is good to a fifth.
"""

SECTIONS = (
    ("A training step beside TRL's", "bench_vs_trl", "vs_trl", """
Both train the same model on the same questions with the same number of sampled tokens, by their
own loops; the first batch's loss and gradient agree to 3e-6. The causes, in the order of their
size: a question's prompt is forwarded once for its eight responses, when sampling and when
training, and not eight times, and the template's instructions once for all questions; token-wise
layers see no padding but the up to 63 tokens that round a long row; linear layers multiply by
oneDNN, which reaches 2.3 times the rate of PyTorch's own float32 products on an AMD processor with
AVX-512; the sampler attends to what prompts have in common where it stands, and to long prompts
too, in decoding steps of fewer operations; logits exist for response tokens only, and in pieces.
With prompts of 14 tokens there is little to share, and the ratio shows what is left of it: the
products, short rows' attention by plain products, and the decoding step.
"""),
    ("Forward and backward", "bench_train_step", "train_step", """
One micro-batch of the default job's shape over the width of the model, as a share of the rate of
its matrix products alone, and its cost over response length, group size and number of groups. What
is missing to 100% is attention, norms, activations and the log-probabilities, which move memory
and multiply little: their share falls with the width. `torch.compile` of the layers, shapes
dynamic, was slower in a trial (0.77 of the speed at 0.85 M parameters and 0.68 at 3 M, in CPU time
of one thread; its first step took 161 s on a busy machine), so that there is no flag for it.
"""),
    ("Sampling", "bench_local_engine", "local_engine", """
The default job's batch: 16 questions × 8 responses of at most 96 tokens. `generate` forwards every
prompt once a response and goes on computing rows that have ended; its continuous batching
schedules every token in Python; vLLM is made for GPUs. The local engine forwards a prompt once and
the template's instructions once for all prompts, drops rows by eights as they end, and reads the
keys and values of the instructions, and of long prompts, once for all their rows.
"""),
    ("Cost over size", "bench_scaling", "scaling", """
Sampling over response length, group size and questions, with the line fitted to it, and whole
steps over the number of ranks, one thread each.
"""),
    ("The environment", "bench_env_step", "env_step", """
A single-token step of all slots, observations as views (`copy=False`, valid until the
next step) or as copies, against Gymnasium's `SyncVectorEnv` over one `TokenEnv` a slot. A whole
rollout's share outside the engine is in `results/rollout_local.json`.
"""),
    ("Weights to the engine", "bench_weight_sync", "weight_sync", """
The local engine samples from the trainer's own module, and copies nothing; vLLM gets every tensor
once, in its own process's memory.
"""),
    ("Verdicts", "bench_verifier", "verifier", """
Gradings a second against Math-Verify called as its documentation says, in one process.
"""),
    ("Memory", "bench_memory", "memory", """
Peak memory of a training step over response length and vocabulary, logits in pieces or at once,
with and without gradient checkpointing.
"""),
)  # fmt: skip
