"""Files that outlive a kill, a power cut and a full disk; what cannot be written is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lmrl_env.errors import RunFolderError

CHECKSUMS = "checksums.json"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an error while a file is written into one that names it.

    Args:
        path: that is written.

    Raises:
        RunFolderError: if the file cannot be written, a full disk included.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        room = "unknown"
        if (there := next((p for p in path.parents if p.is_dir()), None)) is not None:
            room = f"{shutil.disk_usage(there).free / 2**20:.1f} MiB"
        raise RunFolderError(
            f"cannot write {path}: {error} (free on that disk: {room}); finished checkpoints are "
            "as they were: make room, or mend what the reason says, and go on with --resume"
        ) from error


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: at every moment it has its old content or the new one.

    Raises:
        RunFolderError: if it cannot be written; the old content stays.
    """
    partial = path.with_name(f"{path.name}.partial")
    with naming(path):
        try:
            partial.write_text(text)
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which gets its name when it is whole and on the disk.

    The checksums of its files are in it. Nothing is left of it if writing fails.

    Args:
        folder: that shall appear; there must be none of that name, or an empty one.

    Raises:
        RunFolderError: if it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(partial):
            partial.mkdir(parents=True)
        yield partial
        sums = json.dumps(_checksums(partial), indent=2) + "\n"
        with naming(partial / CHECKSUMS):
            (partial / CHECKSUMS).write_text(sums)
        with naming(folder):
            for path in (*partial.rglob("*"), partial):
                sync(path)
            partial.rename(folder)
            sync(folder.parent)
            sync(folder.parent.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a folder that ``whole_folder`` wrote, or None if it is intact."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    try:
        found = _checksums(folder)
    except OSError as error:
        return f"a file cannot be read ({error})"
    for name, value in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != value:
            size = (folder / name).stat().st_size
            return f"{name} ({size} bytes) is truncated or altered: its sha256 is another"
    return None


def _checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder, by its path inside."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / CHECKSUMS]
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
