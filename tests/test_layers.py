"""The layers of the package: a module imports from its own layer or from those before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("errors", "types"),
    (
        "memory",
        "ledger",
        "allocator",
        "waiting",
        "templates",
        "math_equality",
        "plain_formulas",
        "quantities",
        "sandbox",
        "sandbox_program",
        "verifiers",
        "tokenizer",
    ),
    ("questions", "engines.engine", "grading", "grading_process", "grading_worker"),
    (
        "prompts",
        "env",
        "token_env",
        "adapters",
        "attention",
        "linear",
        "prefix_attention",
        "packed_row",
        "rms_norm",
        "engines",
    ),
    (
        "wrappers",
        "kl",
        "groups",
        "rollout",
        "categorical",
        "policy",
        "critic",
        "batches",
        "sharding",
        "distributed",
        "updates",
        "batch_plan",
        "weight_sync",
        "importance",
    ),
    (
        "registration",
        "checkpoint",
        "options",
        "plotting",
        "profiling",
        "progress",
        "evaluation",
        "run",
        "run_folder",
        "run_setup",
        "sampling",
        "verifier_errors",
        "durable",
        "random_states",
        "resumption",
        "signals",
        "training_state",
        "settings",
        "manifest",
        "manifest_table",
        "model_size",
        "normaliser",
        "exact",
        "testing",
        "provenance",
        "scores",
        "samples",
        "suite",
        "summary",
        "tables",
        "algorithm_files",
        "comparison",
        "analysis",
        "cli",
        "gallery",
        "export",
        "__main__",
    ),
    ("",),
)
"""Modules of ``lmrl_env``, packages for all they hold; the last is the package itself."""

ENVIRONMENTS = ("prompts", "env", "token_env")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "lmrl_env").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer_of(module: str) -> int:
    for index, layer in enumerate(LAYERS):
        if any(module == name or (name and module.startswith(name + ".")) for name in layer):
            return index
    raise AssertionError(f"lmrl_env.{module} has no layer yet: give it one in {__file__}")


def imported_modules(path: Path) -> set[str]:
    """Return the modules of the package that a file names at run time."""
    tree = ast.parse(path.read_text())
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in hints and node.module:
            if node.module == "lmrl_env":
                found |= {f"lmrl_env.{alias.name}" for alias in node.names}
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


SOURCES = sorted((ROOT / "lmrl_env").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_import_points_upwards(path):
    module = module_name(path)
    for imported in imported_modules(path):
        if imported.startswith("lmrl_env."):
            target = imported.removeprefix("lmrl_env.")
            if not (ROOT / "lmrl_env" / target.replace(".", "/")).with_suffix(".py").exists() and (
                not (ROOT / "lmrl_env" / target.replace(".", "/") / "__init__.py").exists()
            ):
                continue  # a name of the package, not a module
            assert layer_of(target) <= layer_of(module), f"{module} imports {target}"
            samples = target.startswith("engines.") and target != "engines.engine"
            assert not (module in ENVIRONMENTS and samples), f"{module} imports {target}"
            assert not (module.startswith("engines") and target in ENVIRONMENTS)


def test_only_the_vllm_engines_import_vllm():
    users = {module_name(path) for path in SOURCES if "vllm" in imported_modules(path)}
    assert all(name.startswith("engines.vllm") for name in users)


def test_only_distributed_knows_accelerate():
    users = {module_name(path) for path in SOURCES if "accelerate" in imported_modules(path)}
    assert users == {"distributed"}


def test_algorithm_files_never_import_each_other():
    for path in (ROOT / "algos").glob("*.py"):
        assert not any(name.startswith("algos") for name in imported_modules(path))
