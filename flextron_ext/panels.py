"""PanelFormat: how panels store a weight. The ops' own list, with the same names, is csrc/kernels/panel_format.h."""

from __future__ import annotations

import math
from enum import StrEnum

import torch

GROUP = 32  # inputs that share a scale: kGroupInputs of csrc/kernels/elastic_gemm.h


class PanelFormat(StrEnum):
    """The name that an op takes as ``format``; a format without scales stores weights in the dtype of the inputs."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"  # each row divided by its scale, the largest of its values over 127, and rounded
    W8A8 = "w8a8"  # the same; the inputs are rounded too, each `GROUP` of a token's by a scale of their own
    INT4 = (
        "int4"  # least + scale * (0 to 15), of each `GROUP` inputs of a row their own; the inputs as in w8a8
    )

    @property
    def storage(self) -> torch.dtype:
        """The dtype of the panels."""
        return _STORAGE[self]

    @property
    def together(self) -> int:
        """Inputs of a feature that lie side by side, in a word of four bytes."""
        return 8 if self is PanelFormat.INT4 else 4 // self.storage.itemsize

    @property
    def elements(self) -> int:
        """Elements of the storage in that word."""
        return 4 // self.storage.itemsize

    @property
    def multiple(self) -> int:
        """Inputs of a block are filled up to a multiple of it."""
        return GROUP if self.quantised else self.together

    @property
    def scaled(self) -> bool:
        """Whether there are scales: a float32 for each feature; int4: float16, and least values, for each group."""
        return self in (PanelFormat.INT8, PanelFormat.W8A8, PanelFormat.INT4)

    @property
    def quantised(self) -> bool:
        """Whether the inputs of a layer are rounded to integers of 8 bits, too."""
        return self in (PanelFormat.W8A8, PanelFormat.INT4)

    def words(self, inputs: int) -> int:
        """The words that hold so many inputs of a feature."""
        return -(-inputs // self.multiple) * (self.multiple // self.together)

    def scales_shape(self, panels: torch.Tensor) -> tuple[int, ...]:
        """The shape of the scales beside these panels."""
        blocks, count, words, features = panels.shape[:4]
        groups = (words * self.together // GROUP, 2) if self is PanelFormat.INT4 else ()
        return blocks, count, *groups, features

    @property
    def scales_dtype(self) -> torch.dtype:
        return torch.float16 if self is PanelFormat.INT4 else torch.float32

    def in_slices(self, panels: torch.Tensor) -> torch.Tensor:
        """Panels or scales [blocks, P, words or groups, ..] as they lie in memory, in a tensor of the same shape.

        In a quantised format a slice of the inputs of all panels of a block comes before the next one: a prefix of the
        inputs of all panels is contiguous, but for its last slice (group_place() of csrc/kernels/elastic_gemm.h).
        """
        sizes = self._slices(panels)
        return torch.cat([part.flatten(1) for part in panels.split(sizes, 2)], 1).view(panels.shape)

    def out_of_slices(self, panels: torch.Tensor) -> torch.Tensor:
        """What `in_slices` was given."""
        sizes, (blocks, count, _, *rest) = self._slices(panels), panels.shape
        parts = panels.flatten(1).split([count * size * math.prod(rest) for size in sizes], 1)
        return torch.cat(
            [part.view(blocks, count, size, *rest) for part, size in zip(parts, sizes, strict=True)], 2
        )

    def _slices(self, panels: torch.Tensor) -> list[int]:
        """How many entries of the third axis each slice has: words of panels, groups of scales."""
        entries = panels.shape[2]
        if not self.quantised:
            return [entries]
        of_group = self.words(GROUP) if panels.dtype is self.storage else 1
        groups = entries // of_group
        count = 1 if groups < _MOST_SLICE_GROUPS else (groups + 8) // 16
        each = max(1, -(-groups // count))
        return [of_group * min(each, groups - first) for first in range(0, groups, each)] or [0]

    @classmethod
    def plain(cls, dtype: torch.dtype) -> PanelFormat:
        """The format without scales that stores weights of this dtype as they are."""
        return next(each for each in cls if each.storage is dtype and not each.scaled)


_MOST_SLICE_GROUPS = 24  # kMostSliceGroups of csrc/kernels/elastic_gemm.h
_STORAGE = {
    PanelFormat.FLOAT32: torch.float32,
    PanelFormat.BFLOAT16: torch.bfloat16,
    PanelFormat.FLOAT16: torch.float16,
    PanelFormat.INT8: torch.int8,
    PanelFormat.W8A8: torch.int8,
    PanelFormat.INT4: torch.uint8,
}


def check_format(op: str, format: PanelFormat | str) -> PanelFormat:
    """The format of this name."""
    if format not in _STORAGE:
        raise ValueError(f"{op}: format must be one of {', '.join(_STORAGE)}, got {format}")
    return PanelFormat(format)
