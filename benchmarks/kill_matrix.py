"""Whether anything is lost: runs that are killed, stopped, starved of disk space or damaged.

Each of them is resumed, and must end as the uninterrupted run: the same final checkpoint, random
states included, the same rows apart from times, no sample twice.

    python benchmarks/kill_matrix.py            # as root also with a full tmpfs
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import write

ROOT = Path(__file__).parents[1]
STEPS = 5
FLAGS = (
    *("--questions=arithmetic:size=40", "--prompts-per-step=2", "--group-size=4"),
    *("--max-new-tokens=48", "--eval-questions=8", "--eval-every=2", f"--steps={STEPS}"),
    *("--checkpoint-every=2", "--keep-checkpoints=2", "--lr=1e-3", "--device=cpu"),
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "dr_grpo": ("dr_grpo",),
    "dr_grpo --async-depth 1": ("dr_grpo", "--async-depth=1"),
    "ppo": ("ppo",),
}
KILLS = 20
PHASES = ("sampling", "grading", "training", "checkpoint")
SECONDS = 400
"""Most that a run may take on a busy machine."""

PLACES = (  # what a stack holds, innermost meaning first
    ("plot_curves", "curves"),
    ("in save_checkpoint", "checkpoint"),
    ("in prune", "checkpoint"),
    ("in gather", "checkpoint"),
    ("grading.py", "grading"),
    ("evaluation.py", "evaluation"),
    ("weight_sync.py", "weight sync"),
    ("engines/local.py", "sampling"),
    ("in append_", "logging"),
    ("updates.py", "training"),
    ("policy.py", "training"),
    ("critic.py", "training"),
)


def run_program(
    program: list[str], said: str, file_limit: int, environment: dict[str, str]
) -> None:
    """Be a command line, in a forked process whose libraries are imported already.

    It tells where it is when SIGUSR1 asks: the library has no hook for that.
    """
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


def ranks_environment(ranks: int) -> list[dict[str, str]]:
    """Return what torchrun would tell each of several processes; nothing to a single one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


class Job:
    """A training run in a process of its own, or in one for each rank.

    It goes on with the run in the folder, or begins it where the folder holds none.

    Args:
        variant: key of ``VARIANTS``.
        folder: of the run.
        more: further flags.
        ranks: number of processes.
        file_limit: most bytes of a file that it writes.
    """

    def __init__(
        self,
        variant: str,
        folder: Path,
        *more: str,
        ranks: int = 1,
        file_limit: int = resource.RLIM_INFINITY,
    ):
        self.folder = folder
        algorithm, *own = VARIANTS[variant]
        resumed = (folder / "config.json").exists()
        settings = [f"--resume={folder}"] if resumed else [*FLAGS, *own, f"--run-dir={folder}"]
        program = [str(ROOT / "algos" / f"{algorithm}.py"), *settings, *more]
        handle, name = tempfile.mkstemp(suffix=".txt")
        os.close(handle)
        self.said = Path(name)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"algos.{own[0]}" for own in VARIANTS.values()])
        self.processes = [
            context.Process(target=run_program, args=(program, name, file_limit, environment))
            for environment in ranks_environment(ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def running(self) -> bool:
        """Whether all of its processes are alive."""
        return all(process.is_alive() for process in self.processes)

    def send(self, number: int) -> None:
        """Send a signal to all of its processes."""
        for process in self.processes:
            os.kill(process.pid, number)

    @property
    def steps(self) -> int:
        """Number of steps that were logged."""
        file = self.folder / "metrics.jsonl"
        return max(0, file.read_text().count("\n") - 1) if file.exists() else 0

    def place(self) -> str:
        """Return what the process is doing."""
        if not (self.folder / "config.json").exists():
            return "start"
        before = self.said.stat().st_size
        self.send(signal.SIGUSR1)
        deadline, stacks = time.monotonic() + 10, ""
        while "algos/" not in stacks and time.monotonic() < deadline:
            stacks = self.said.read_bytes()[before:].decode(errors="replace")
        return next((name for text, name in PLACES if text in stacks), "other")

    def signal_at(self, wanted: str, after: int, number: int, chance: random.Random) -> str:
        """Send a signal when the process is at a place, and return where that was."""
        deadline = time.monotonic() + SECONDS
        while self.running and time.monotonic() < deadline:
            writing = any(self.folder.glob("checkpoints/*.partial"))
            if self.steps >= after and (writing or wanted != "checkpoint"):
                if writing:
                    time.sleep(chance.uniform(0, 0.2))
                if (place := self.place()) == wanted or wanted == "any":
                    self.send(number)
                    return place
            time.sleep(chance.uniform(0, 0.02))
        return "nowhere"  # it ended before it was seen at that place

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and what was said."""
        for process in self.processes:
            process.join(SECONDS)
        said = self.said.read_text(errors="replace")
        self.said.unlink()
        return max((process.exitcode for process in self.processes), key=abs), said


def outcome(folder: Path) -> dict[str, Any]:
    """Return what must be the same at the end of a run."""
    clock = ("time/", "throughput/")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    final = folder / "checkpoints" / f"step-{STEPS}"
    return {
        "sha256": json.loads((final / "checksums.json").read_text()),
        "rows": [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows],
        "samples": (folder / "samples.jsonl").read_text(),
    }


def finish(variant: str, folder: Path, expected: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """Resume a run to its end, and compare it with the uninterrupted one."""
    status, said = Job(variant, folder, ranks=ranks).end()
    source = [line for line in said.splitlines() if line.startswith("going on from")]
    found = outcome(folder) if status == 0 else {}
    left = [path.name for path in folder.rglob("*.partial")]
    return {
        "resumed": source[0].removeprefix("going on from ").replace(f"{folder}/", "")
        if source
        else "as a new run",
        "exit_status": status,
        **{f"same_{key}": found.get(key) == expected[key] for key in expected},
        "nothing_half_written_left": not left,
        "said": said if status else "",
    }


def is_well(record: dict[str, Any]) -> bool:
    return record["exit_status"] == 0 and all(
        value for key, value in record.items() if key.startswith(("same_", "nothing_"))
    )


def kill(work: Path, expected: dict[str, dict[str, Any]], index: int) -> dict[str, Any]:
    """Kill a run at a random moment, every fifth twice, and resume it."""
    chance = random.Random(index)
    variant = list(VARIANTS)[index % len(VARIANTS)]
    wanted = PHASES[index % len(PHASES)] if index % 10 != 9 else "any"
    after = chance.randrange(STEPS - 1) if wanted != "any" else 0
    folder, moments = work / f"kill-{index}", []
    for _ in range(2 if index % 5 == 4 else 1):
        job = Job(variant, folder)
        if wanted == "any":
            time.sleep(chance.uniform(0, 10))
        place = job.signal_at(wanted, after, signal.SIGKILL, chance)
        job.end()
        if place == "nowhere":  # no kill: again, anywhere
            shutil.rmtree(folder)
            job = Job(variant, folder)
            place = job.signal_at("any", 1, signal.SIGKILL, chance)
            job.end()
        partial = [path.name for path in folder.rglob("*.partial")]
        moments.append({"place": place, "steps_done": job.steps, "half_written": partial})
        wanted, after = "any", 0
    return {"variant": variant, "kills": moments, **finish(variant, folder, expected[variant])}


def kills(work: Path, expected: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda index: kill(work, expected, index), range(KILLS))


def terminations(work: Path, expected: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Send SIGTERM, which must end the run with exit status 0 and no work lost."""
    chance = random.Random(1)
    cases = [("other", 0), ("evaluation", 0), ("sampling", 2), ("training", 1), ("checkpoint", 1)]
    for index, (wanted, after) in enumerate(cases):
        variant = list(VARIANTS)[index % len(VARIANTS)]
        folder = work / f"term-{index}"
        job = Job(variant, folder)
        place = job.signal_at(wanted, after, signal.SIGTERM, chance)
        began = time.monotonic()
        status, said = job.end()
        last = job.steps
        kept = last == 0 or (folder / "checkpoints" / f"step-{last}").is_dir()
        yield {
            "variant": variant,
            "place": place,
            "status_after_signal": status,
            "seconds_to_the_end": round(time.monotonic() - began, 1),
            "same_step_as_checkpoint": kept and status == 0 and "Traceback" not in said,
            **finish(variant, folder, expected[variant]),
        }


def two_ranks(work: Path) -> Iterator[dict[str, Any]]:
    """SIGTERM to two ranks; resumed by two, and by one."""
    Job("dr_grpo", work / "two-reference", ranks=2).end()
    expected = outcome(work / "two-reference")
    job = Job("dr_grpo", work / "two", ranks=2)
    while job.steps < 2 and job.running:
        time.sleep(0.05)
    for process in job.processes:  # the second one hears of it later
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.3)
    job.end()
    last = job.steps
    kept = (work / "two" / "checkpoints" / f"step-{last}").is_dir()
    shutil.copytree(work / "two", work / "one")
    record = {"case": "SIGTERM to two ranks", "steps_done": last, "same_step_as_checkpoint": kept}
    yield {**record, **finish("dr_grpo", work / "two", expected, ranks=2)}
    status, said = Job("dr_grpo", work / "one").end()
    named = "ranks 2 → 1" in said
    yield {"case": "resumed by one rank", "exit_status": status, "same_ranks_named": named}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a tmpfs, and give a function that changes its size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    subprocess.run([*mount, f"size={megabytes}m"], check=True)
    try:
        yield lambda size: subprocess.run([*mount, f"remount,size={size}m"], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def told(status: int, said: str) -> dict[str, Any]:
    """Return how a run ended that could not write."""
    message = [line for line in said.splitlines() if line.startswith("Error: cannot write")]
    named = status == 1 and bool(message) and "Traceback" not in said
    return {"same_error_named": named, "message": message[:1]}


def full_disks(work: Path, expected: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Let the disk fill up while a checkpoint or a row is written, make room, and resume."""
    for variant in ("dr_grpo", "ppo"):
        folder = work / f"limit-{variant}"
        ended = told(*Job(variant, folder, file_limit=5_000_000).end())
        record = {"case": "file size limit", "variant": variant, **ended}
        yield {**record, **finish(variant, folder, expected[variant])}
    if os.geteuid() != 0:
        return
    with small_disk(work / "disk", 16) as resize:
        folder = work / "disk" / "run"
        ended = told(*Job("dr_grpo", folder).end())
        kept = [path.name for path in (folder / "checkpoints").iterdir()]
        resize(200)
        record = {"case": "tmpfs full at the second checkpoint", "kept": kept, **ended}
        yield {**record, **finish("dr_grpo", folder, expected["dr_grpo"])}
    with small_disk(work / "rows", 60) as _:
        folder = work / "rows" / "run"
        job = Job("dr_grpo", folder, "--checkpoint-every=1")
        while job.steps < 2 and job.running:
            time.sleep(0.01)
        with contextlib.suppress(OSError), (work / "rows" / "filler").open("wb") as file:
            while True:
                file.write(bytes(4096))
        ended = told(*job.end())
        (work / "rows" / "filler").unlink(missing_ok=True)
        record = {"case": "tmpfs filled up by another program", **ended}
        yield {**record, **finish("dr_grpo", folder, expected["dr_grpo"])}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damages(
    work: Path, finished: Path, expected: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Damage a file of the newest checkpoint; the one before is taken, and the file named."""
    files = ("model.safetensors", "trainer/optimizer.safetensors", "trainer/state.json")
    cases = [*zip((truncate,) * 3, files, strict=True), *zip((flip_a_bit,) * 3, files, strict=True)]
    for damage, name in (*cases, (Path.unlink, files[0])):
        folder = work / f"{damage.__name__}-{Path(name).stem}"
        shutil.copytree(finished, folder)
        damage(folder / "checkpoints" / f"step-{STEPS}" / name)
        record = finish("dr_grpo", folder, expected["dr_grpo"])
        history = json.loads((folder / "config.json").read_text())["resumed"]
        named = any(name in line for line in history[-1]["damaged"])
        yield {"case": f"{damage.__name__} {name}", "same_file_named": named, **record}


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        expected = {}
        jobs = {variant: Job(variant, work / variant) for variant in VARIANTS}
        for variant, job in jobs.items():
            status, said = job.end()
            assert status == 0, said
            expected[variant] = outcome(work / variant)
        parts = {
            "kill -9": kills(work, expected),
            "SIGTERM": terminations(work, expected),
            "two ranks": two_ranks(work),
            "full disk": full_disks(work, expected),
            "damaged checkpoint": damages(work, work / "dr_grpo", expected),
        }
        figures: dict[str, Any] = {"command": list(FLAGS), "variants": VARIANTS}
        for part, records in parts.items():
            figures[part] = []
            for record in records:
                print(part, record, file=sys.stderr, flush=True)
                figures[part].append(record)
        places = [kill["place"] for record in figures["kill -9"] for kill in record["kills"]]
        figures["places of the kills"] = collections.Counter(places)
        figures["all well"] = {part: all(map(is_well, figures[part])) for part in parts}
    write("kill_matrix", figures)
    sys.exit(0 if all(figures["all well"].values()) else 1)


if __name__ == "__main__":
    main()
