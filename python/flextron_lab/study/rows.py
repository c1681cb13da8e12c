"""The rows of a study that goes on where it was stopped: a line of JSON each, in one file of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flextron.checkpoint import read_lines

ROWS = "rows.jsonl"


def rows_in(out: Path) -> list[dict[str, Any]]:
    """The rows that are there; a last one that a killed run left unfinished is dropped."""
    path = out / ROWS
    return read_lines(path) if path.exists() else []


def append_row(out: Path, row: dict[str, Any]) -> None:
    with (out / ROWS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
