"""The fit of a latency table: which networks it is fitted on and judged by, the costs, and the line."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from flextron.artefacts.latency_table import Check, LatencyTable
from flextron.config import ElasticConfig, PerAxis, Widths


class Fitted(NamedTuple):
    """What `fit_costs` found.

    Attributes:
        costs: [C] of each axis: milliseconds of a choice in one layer above the narrowest, never falling.
        error: standard error of a network's share of the full model's time, the largest of those measured.
    """

    costs: PerAxis[tuple[float, ...]]
    error: float


def fit_costs(config: ElasticConfig, measured: Sequence[Timed]) -> Fitted:
    """The costs that best explain all networks that were measured, in least squares of relative errors.

    Time is a base and what each layer's choices cost; all layers have the same shapes, so the same costs. A choice that
    would cost less than the one below is noise, and a planner would take it for a gain: it costs the same.

    Args:
        measured: the full model first, which counts as much as all the others together.
    """
    x = torch.tensor([_steps(config, each.widths) for each in measured], dtype=torch.float64)
    y = torch.tensor([each.ms for each in measured], dtype=torch.float64)
    row = _weights(len(measured)).sqrt() / y
    kept = torch.ones(x.shape[1], dtype=torch.bool)  # the base and every step of a menu
    while True:
        found = torch.zeros(x.shape[1], dtype=torch.float64)
        found[kept] = torch.linalg.lstsq(row[:, None] * x[:, kept], (row * y)[:, None]).solution[:, 0]
        lowest = int(found[1:].argmin()) + 1 if len(found) > 1 else 0
        if lowest == 0 or found[lowest] >= 0:
            break
        kept[lowest] = False
    costs, at = [], 1
    for axis in config.axes:
        steps = found[at : at + len(axis.menu) - 1] / config.num_layers
        costs.append((0.0, *steps.cumsum(0).tolist()))
        at += len(steps)
    noise = torch.tensor([each.error for each in measured], dtype=torch.float64).clamp(min=1e-6)
    noise[0] = noise[1:].min() / len(noise) ** 0.5  # shares are of the full model
    design = x[:, kept] / (y * noise)[:, None]
    covariance = torch.linalg.pinv(design.T @ design)
    spread = (x[:, kept] @ covariance * x[:, kept]).sum(1).clamp(min=0).sqrt()
    return Fitted(PerAxis(*costs), float((spread / y).max()))


class Timed(NamedTuple):
    """A network's time in milliseconds, and the standard error of its share of the full model's."""

    widths: Widths
    ms: float
    error: float


def _steps(config: ElasticConfig, widths: Widths) -> list[float]:
    """1 for the base, and for each step of a menu the share of the layers that have taken it."""
    found = [1.0]
    for axis, places in zip(config.axes, config.indices(widths), strict=True):
        found += [sum(place >= i for place in places) / len(places) for i in range(1, len(axis.menu))]
    return found


def _weights(count: int) -> torch.Tensor:
    """Of the full model, which every ratio was measured against and every fraction is of, and of all others."""
    return torch.tensor([count - 1.0] + [1.0] * (count - 1), dtype=torch.float64)


def fit_line(
    sums: Sequence[float], measured: Sequence[float], weights: Sequence[float]
) -> tuple[float, float]:
    """(base, slope) that minimise the weighted squares of (base + slope * sum - measured) / measured.

    Relative errors, because a budget is a fraction: 1 ms matters more on a small network.

    Raises:
        ValueError: the sums do not differ, or time does not grow with them: no line means anything.
    """
    x, y = (torch.tensor(list(v), dtype=torch.float64) for v in (sums, measured))
    row = torch.tensor(list(weights), dtype=torch.float64).sqrt() / y
    design = torch.stack([row, row * x], dim=1)
    if len(x) < 2 or float(x.max() - x.min()) <= 1e-12 * float(x.abs().max()):
        raise ValueError("fit_line: sums must differ")
    base, slope = torch.linalg.lstsq(design, (row * y)[:, None]).solution[:, 0].tolist()
    if slope <= 0:
        raise ValueError(f"fit_line: measured must grow with sums, got a slope of {slope:.3g}")
    return base, slope


def random_widths(config: ElasticConfig, rng: random.Random) -> Widths:
    """One draw whose mean size is spread over the whole range.

    Half the time homogeneous with jitter (every layer near one size, each axis its own), half the time every
    layer
    independent at a mean that is itself drawn: plain independent draws would all have about the same size.
    """
    homogeneous = rng.random() < 0.5
    chosen = []
    for axis in config.axes:
        size, top = rng.random(), len(axis.menu) - 1
        if homogeneous:
            places = [size * top + rng.gauss(0, 0.35) for _ in range(config.num_layers)]
        else:
            places = [
                rng.betavariate(0.2 + 1.8 * size, 2 - 1.8 * size) * (top + 1) - 0.5
                for _ in range(config.num_layers)
            ]
        chosen.append([min(top, max(0, round(place))) for place in places])
    return config.widths(chosen)


def calibration_widths(
    config: ElasticConfig, fit: int, held_out: int, seed: int
) -> tuple[list[Widths], list[Widths]]:
    """Configurations to fit on (the full and the smallest come first) and others to judge by.

    A tiny model may have fewer configurations than asked for; then there are fewer, the held-out ones first.

    Raises:
        ValueError: there are not even three.
    """
    rng = random.Random(seed)
    found = dict.fromkeys((config.full(), config.smallest()))
    for _ in range(50 * (fit + held_out)):
        if len(found) >= fit + held_out:
            break
        found.setdefault(random_widths(config, rng))
    if len(found) < 3:
        raise ValueError(f"profile: the menus must give at least three configurations, got {len(found)}")
    ends, others = list(found)[:2], list(found)[2:]
    return ends + others[held_out:], others[:held_out]


def fit_table(
    table: LatencyTable, to_fit: list[tuple[Widths, float]], to_judge: list[tuple[Widths, float]]
) -> LatencyTable:
    """The table with base and slope fitted on ``to_fit`` (widths, measured ms), judged on ``to_judge``.

    The first of ``to_fit`` is the full model. It counts as much as all the others together.
    """
    sums = [table.layer_sum(widths) for widths, _ in to_fit]
    times = [ms for _, ms in to_fit]
    warnings = table.warnings
    try:
        base, slope = fit_line(sums, times, _weights(len(to_fit)).tolist())
    except ValueError as error:
        slope = 1.0
        base = times[0] - sums[0]
        warnings += (
            f"the whole model's time does not follow the table ({error}): budgets of latency mean little",
        )
    fitted = replace(table, base=base, slope=slope, warnings=warnings)

    def judge(pairs: list[tuple[Widths, float]]) -> tuple[Check, ...]:
        return tuple(Check(widths, fitted.predict(widths), ms) for widths, ms in pairs)

    return replace(fitted, fitted=judge(to_fit), held_out=judge(to_judge))
