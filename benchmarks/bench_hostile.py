"""Responses made to break, stop or deceive a grader: what becomes of them, and of the workers.

    python benchmarks/bench_hostile.py

The responses are those of `tests/hostile.py`, one at a time, so that each has its own clock.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import click
import record
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile import CANARY, Item, any_verifier, hostile_items

from lmrl_env.grading import Grader
from lmrl_env.types import Question

HONEST = Item(
    "honest", r"\boxed{x+x}", "2x", Question("honest", "?", "2x", {"verifier": "boxed_math"})
)


class PeakMemory(threading.Thread):
    """Watches the resident memory of a grader's workers, in bytes."""

    def __init__(self, grader: Grader):
        super().__init__(daemon=True)
        self.grader = grader
        self.bytes = 0
        self.start()

    def run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self.grader.closed:
            for worker in list(self.grader._pool):
                try:
                    pages = Path(f"/proc/{worker._process.pid}/statm").read_text().split()[1]
                except (OSError, IndexError):
                    continue
                self.bytes = max(self.bytes, int(pages) * page)
            time.sleep(0.02)


@click.command()
@click.option("--count", default=2600, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--timeout", default=1.0, show_default=True, help="processor seconds an item")
@click.option("--memory-limit", default=2 * 2**30, show_default=True, help="bytes a worker")
def main(count: int, seed: int, timeout: float, memory_limit: int) -> None:
    """Grade every hostile response, and an honest one after each."""
    items = list(hostile_items(seed, count))
    os.chdir(tempfile.mkdtemp())
    statuses: dict[str, Counter[str]] = defaultdict(Counter)
    seconds, deceived, honest = [], [], 0
    with Grader(any_verifier, workers=1, timeout=timeout, memory_limit=memory_limit) as grader:
        peak = PeakMemory(grader)

        def grade(item: Item) -> str:
            return grader.grade([item.response], [item.gold], [item.row])[0].status

        for item in track(items, description="responses"):
            honest += grade(HONEST) == "correct"
            started = time.monotonic()
            status = grade(item)
            seconds.append(time.monotonic() - started)
            statuses[item.kind.partition(":")[0]][status] += 1
            if status == "correct":
                deceived.append((item.kind, item.response[:200]))
        alive = all(worker.alive for worker in grader._pool)
    seconds.sort()
    record.write(
        "hostile",
        {
            "responses": len(items),
            "distinct": len({(item.row.extra["verifier"], item.response) for item in items}),
            "megacharacters": sum(len(item.response) for item in items) / 1e6,
            "timeout_s": timeout,
            "false_correct": deceived,
            "statuses": {kind: dict(counts) for kind, counts in sorted(statuses.items())},
            "total": dict(sum(statuses.values(), Counter())),
            "honest_ones_between_them_right": honest / len(items),
            "seconds_median": seconds[len(seconds) // 2],
            "seconds_max": seconds[-1],
            "worker_peak_mib": peak.bytes / 2**20,
            "memory_limit_mib": memory_limit / 2**20,
            "workers_alive": alive,
            "files_made": [str(path) for path in Path().rglob(f"*{CANARY}*")],
        },
    )


if __name__ == "__main__":
    main()
