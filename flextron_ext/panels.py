"""PanelFormat: how panels store a weight. The ops' own list, with the same names, is csrc/kernels/panel_format.h."""

from __future__ import annotations

from enum import StrEnum

import torch


class PanelFormat(StrEnum):
    """The name that an op takes as ``format``; a format without scales stores weights in the dtype of the inputs."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"  # each row divided by its scale, the largest of its values over 127, and rounded

    @property
    def storage(self) -> torch.dtype:
        """The dtype of the panels."""
        return _STORAGE[self]

    @property
    def together(self) -> int:
        """Inputs of a feature that lie side by side, in a word of four bytes."""
        return 4 // self.storage.itemsize

    @property
    def scaled(self) -> bool:
        """Whether each feature has a float32 scale."""
        return self is PanelFormat.INT8

    @classmethod
    def plain(cls, dtype: torch.dtype) -> PanelFormat:
        """The format without scales that stores weights of this dtype as they are."""
        return next(each for each in cls if each.storage is dtype and not each.scaled)


_STORAGE = {
    PanelFormat.FLOAT32: torch.float32,
    PanelFormat.BFLOAT16: torch.bfloat16,
    PanelFormat.FLOAT16: torch.float16,
    PanelFormat.INT8: torch.int8,
}


def check_format(op: str, format: PanelFormat | str) -> PanelFormat:
    """The format of this name."""
    if format not in _STORAGE:
        raise ValueError(f"{op}: format must be one of {', '.join(_STORAGE)}, got {format}")
    return PanelFormat(format)
