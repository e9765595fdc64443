"""A fixture that writes files of questions."""

from __future__ import annotations

import gzip
import json

import pytest


@pytest.fixture
def write_jsonl(tmp_path):
    def write(*rows, name="set.jsonl"):
        """Write rows, or lines as they are given, and return the path."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        return str(path)

    return write
