"""The curves of a run in TensorBoard, where that is installed; what they show stands in ``metrics.jsonl`` too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
_COUNTS = ("step", "tokens", "seconds")  # of a step's record: the axis, and what grows with it


class Board:
    """Writes records as scalars; does nothing without the package (``pip install 'flextron[track]'``)."""

    def __init__(self, directory: Path, resumed: int) -> None:
        """Go on after step ``resumed``: TensorBoard drops what was written of later ones."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer: Any = None
        else:
            self.writer = SummaryWriter(str(directory / FOLDER), purge_step=resumed + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        if self.writer is not None:
            for name, value in _scalars(record):
                self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()  # a run may be killed at any moment

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value): ``train/loss``, ``loss_by_size/0.75``, ``held_out/0.75``."""
    for row in record.get("sub_networks", ()):
        yield f"held_out/{row['size']:.2f}", row["loss"]
    for name, value in record.items():
        if name == "loss_by_size":
            yield from ((f"{name}/{size}", loss) for size, loss in value.items())
        elif isinstance(value, int | float) and name not in _COUNTS:
            yield f"train/{name}", value
