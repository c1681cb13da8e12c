"""The calibration of an adaptive router: offsets at which the mean over text meets each fraction of the latency."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flextron import ranks
from flextron.artefacts.latency_table import LatencyTable
from flextron.judge.latency import fractions
from flextron.nn.protocol import Elastic
from flextron.nn.router import AdaptiveRouter
from flextron.routing.gate import Progress
from flextron.routing.learning import TOLERANCE

_GRID = 0.05  # largest step between fractions at which the offset is calibrated
_BISECTIONS = 16
_CLOSE = 1e-3  # how far below its fraction the mean may stay, as a share of the full latency
_REACH = 64.0  # largest offset tried, in steps of a layer's choice: far beyond any difference of logits


def calibrate(
    router: AdaptiveRouter,
    model: Elastic,
    tables: dict[str, LatencyTable],
    tokens: Tensor,
    progress: Progress = lambda *_: None,
) -> None:
    """Set the router's offsets of each phase so that the mean over ``tokens`` meets every fraction.

    At a grid of fractions from the fastest network's to 1, at most 0.05 apart and with the trained targets in
    it, the offset is bisected until the mean is at most 0.001 below: a larger one never narrows a token's choice in
    the first layer, and in the others only by way of what wider layers below change in their input.
    """
    for phase, table in tables.items():
        grid = calibration_grid(table.smallest_adaptive_ms / table.full_ms, router.targets)
        low, high = torch.full((len(grid),), -_REACH), torch.full((len(grid),), _REACH)
        left = torch.arange(len(grid))  # the grid's points that are not close yet
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            router.calibration[phase] = (grid, tuple(middle.tolist()))
            targets = torch.tensor(grid, dtype=torch.float64)[left]
            short = targets - fractions_of_all(model, table, tokens, targets.tolist(), phase)
            low[left] = torch.where(short < 0, low[left], middle[left])
            is_close = (short >= 0) & (short < _CLOSE)
            high[left] = torch.where((short < 0) | is_close, middle[left], high[left])
            left = left[~is_close]
            progress(f"calibrating {phase}", len(grid) - len(left), len(grid))
            if not len(left):
                break
        router.calibration[phase] = (grid, tuple(low.tolist()))


def fractions_of_all(
    model: Elastic, table: LatencyTable, tokens: Tensor, targets: Sequence[float], phase: str
) -> Tensor:
    """`fractions` of tokens, of which each of several processes takes its part."""
    group = table.workload.batch if phase == "decode" else 1
    return ranks.over_rows(tokens, lambda mine: fractions(model, table, mine, targets, phase), group)


def calibration_grid(fastest: float, targets: Sequence[float]) -> tuple[float, ...]:
    """Fractions from the fastest network's up to just below 1, the trained targets among them."""
    ends = sorted({fastest, *(t for t in targets if fastest < t < 1), 1.0})
    grid: list[float] = []
    for a, b in pairwise(ends):
        pieces = max(1, -int(-(b - a) // _GRID))
        grid += [a + (b - a) * i / pieces for i in range(pieces)]
    return (*grid, 1 - TOLERANCE / 4)
