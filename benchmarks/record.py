"""Writes a benchmark's figures beside the commit, hardware and versions they belong to."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("gymnasium", "lmrl_env", "numpy", "torch", "transformers")
LOAD_AT_START = os.getloadavg()[0]


def processor() -> str:
    """Return the processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """Return the commit, with ``-dirty`` if any file but the results differs from it."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=RESULTS.parents[1], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!benchmarks/*.md")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def write(name: str, figures: dict[str, Any]) -> None:
    """Print the figures, and write ``results/NAME.json``."""
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": f"{processor()}, {os.cpu_count()} cores, {platform.machine()}",
        "load_at_start": round(LOAD_AT_START, 2),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "figures": figures,
    }
    text = json.dumps(record, indent=2)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
