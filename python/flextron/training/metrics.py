"""What a run measures: ``metrics.jsonl``, with a line for each step and evaluation, and TensorBoard's curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flextron import ranks
from flextron.checkpoint import read_lines
from flextron.checkpoint.schema import build
from flextron.training import tensorboard

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, each with its ``step``, flushed as it is written; and TensorBoard.

    Rank 0 writes them.
    """

    def __init__(self, directory: Path, resumed: int) -> None:
        """Go on after step ``resumed``: later lines, and one cut off by a crash, are dropped."""
        self.path = directory / METRICS_FILE
        if not ranks.is_first():
            return
        self.path.touch()
        records = read_metrics(self.path)  # a damaged one is refused before anything is cut off
        with self.path.open("rb+") as file:
            size = 0
            for record, line in zip(records, file, strict=False):
                if record["step"] > resumed:
                    break
                size += len(line)
            file.truncate(size)
        self.board = tensorboard.Board(directory, resumed)

    def write(self, record: Mapping[str, Any]) -> None:
        if not ranks.is_first():
            return
        self.board.write(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return ranks.shared(read_metrics(self.path) if ranks.is_first() else [])

    def close(self) -> None:
        if ranks.is_first():
            self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``: a line is a step, with its ``loss``, or an evaluation, with ``sub_networks``.

    Raises:
        CheckpointError: one sentence that says which line is neither.
    """
    records = read_lines(path)
    for number, record in enumerate(records, 1):
        kind = _Evaluation if "sub_networks" in record else _Step
        known = {f.name for f in fields(kind)}
        build(kind, {k: v for k, v in record.items() if k in known}, f"{path}: line {number}")
    return records


@dataclass(frozen=True)
class _Step:
    """The fields of a step's line that are read."""

    step: int
    loss: float
    size: float
    tokens: int


@dataclass(frozen=True)
class _Evaluation:
    """The fields of an evaluation's line that are read."""

    step: int
    sub_networks: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        for row in self.sub_networks:
            for name, kind in (
                ("size", float),
                ("loss", float),
                ("mlp", tuple[int, ...]),
                ("heads", tuple[int, ...]),
            ):
                build(kind, row.get(name), METRICS_FILE, name)
