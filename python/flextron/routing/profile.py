"""Profiling: measure the latency table of a model on this machine.

The entries are measured through what runs, whole forwards, which on a CPU are one op. Base and slope are fitted on
whole models of mixed widths, and the residual is taken on others. Measuring goes on while the residual is large.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from time import monotonic
from typing import Any

import torch

from flextron.artefacts.latency_table import LatencyTable, Workload
from flextron.artefacts.machine import machine_of
from flextron.config import AXES, ElasticConfig, Widths
from flextron.judge.latency import Measurement, measure, whole_model
from flextron.judge.loss import restored
from flextron.nn import Dial
from flextron.nn.protocol import Elastic
from flextron.nn.router import AdaptiveRouter, default_hidden
from flextron.routing.fit import calibration_widths, fit_line, fit_table, isotonic, random_widths

_MIXTURES = 6  # mixtures of two networks to which the cost of choosing for every token is fitted
_NEVER = 1e6  # subtracted from the logit of a choice that must not be made
_CLOSE = 0.05  # error on networks that the table was not fitted on, below which nothing more is measured
PATIENCE = 60.0  # seconds to go on for, unless another number is given
_SAME_COST = 0.97  # a width that costs this share of the next one up saves too little for its loss

Progress = Callable[[int, int], object]


def profile(
    model: Elastic,
    workload: Workload,
    *,
    rounds: int = 5,
    min_seconds: float = 0.02,
    fit: int = 8,
    held_out: int = 6,
    seed: int = 0,
    patience: float | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the table of one phase on the device that the model is on.

    For each axis and choice a forward is timed with all layers at the choice, the other axis at its full width. A
    layer's entry is what that takes more than at the smallest choice, over the number of layers: all layers have the
    same shapes, and what differs between them would be noise that a planner takes for gain. Every model is timed
    between two runs of the full one.

    Args:
        model: an elastic model; its widths are restored.
        workload: phase, batch and lengths.
        rounds: samples of each choice and each whole model, at least.
        min_seconds: least duration of a sample.
        fit: whole configurations for base and slope, the full and the smallest among them.
        held_out: whole configurations for the residual.
        seed: seed of the configurations drawn.
        patience: seconds after the first ``rounds`` to go on measuring for, while a held-out configuration is off by
            5 % or more, or the table is in doubt; None: 60.
        progress: called with (done, total) rounds.
    """
    if fit < 2 or held_out < 1:
        raise ValueError(f"profile: fit must be at least 2 and held_out at least 1, got {fit} and {held_out}")
    config = model.elastic
    to_fit, to_judge = calibration_widths(config, fit, held_out, seed)
    choices = _choices(config)
    draft = LatencyTable(
        workload=workload,
        machine=machine_of(model),
        elastic=config,
        **_no_costs(config),
        base=0.0,
        slope=1.0,
    )

    def table_of(found: Measurement) -> LatencyTable:
        times = [ms for ms, _ in found.others]
        costs = _costs(config, dict(zip(choices, times, strict=False)))
        table = replace(draft, **costs, noise=found.noise, spread_ms=found.full.spread)
        table = replace(table, warnings=tuple(_warnings(table)))
        whole = dict(zip((*to_fit[1:], *to_judge), times[len(choices) :], strict=True))
        whole[to_fit[0]] = found.full.ms
        fitted, judged = ([(widths, whole[widths]) for widths in some] for some in (to_fit, to_judge))
        return fit_table(table, fitted, judged)

    total, until = rounds, 0.0

    def on_round(done: int) -> None:
        nonlocal total
        total = max(total, done)
        if progress is not None:
            progress(done, total)

    def enough(found: Measurement) -> bool:
        nonlocal until
        now = monotonic()
        until = until or now + (PATIENCE if patience is None else patience)
        table = table_of(found)
        return now >= until or (table.residual_worst < _CLOSE and table.doubt is None)

    others = [*choices.values(), *to_fit[1:], *to_judge]
    return table_of(
        measure(
            model,
            others,
            workload,
            rounds=rounds,
            min_seconds=min_seconds,
            on_round=on_round,
            enough=enough,
        )
    )


def measure_adaptive(
    model: Elastic,
    table: LatencyTable,
    *,
    hidden: int | None = None,
    rounds: int = 5,
    min_seconds: float = 0.02,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure `LatencyTable.adaptive` with routers that draw mixtures of two networks.

    Args:
        model: an elastic model; its dial and router are restored.
        table: the latency table of this model on this machine.
        hidden: width of the routers' hidden layer, as `AdaptiveRouter`; None: the default of training.
        rounds, min_seconds: samples of each measurement, and the least duration of one.
        progress: called with (done, total) rounds.
    """
    config, workload = model.elastic, table.workload
    table.check(config)
    router = _mixing_router(config, hidden or default_hidden(config), workload.phase)
    dials = [Dial.adaptive(config, [t], workload.phase) for t in router.targets[:-1]]
    plain = replace(table, base=0.0, slope=1.0, adaptive=None)
    with restored(model):
        model.attach_router(router)
        sums = []
        for dial in dials:
            run = whole_model(model, dial, workload)
            model.turn(dial)
            with model.watched() as forwards:
                run()
            sums.append(float(plain.of_tokens(forwards[0])))
        found = measure(
            model,
            dials,
            workload,
            rounds=rounds,
            min_seconds=min_seconds,
            on_round=None if progress is None else lambda done: progress(done, rounds),
        )
    try:
        times = [ms / found.full.ms * table.full_ms for ms, _ in found.others]
        line = fit_line(sums, times, [1.0] * len(sums))
    except ValueError as error:
        warning = (
            f"adaptive budgets are planned as static ones, their own time does not follow the table ({error})"
        )
        return replace(table, adaptive=None, warnings=(*table.warnings, warning))
    return replace(table, adaptive=line)


def _mixing_router(config: ElasticConfig, hidden: int, phase: str) -> AdaptiveRouter:
    """A router that mixes two networks at each target; in every layer, tokens choose between them by their state.

    The pair is the smallest network twice at the first target, the full one twice at the second, random ones after.
    """
    pairs = [(config.smallest(),) * 2, (config.full(),) * 2]
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    pairs += [(random_widths(config, rng), random_widths(config, rng)) for _ in range(_MIXTURES)]
    targets = [(i + 1) / (len(pairs) + 1) for i in range(len(pairs))]
    router = AdaptiveRouter(
        config.num_layers, config.hidden_size, config.choices, (*targets, 1.0), hidden
    ).requires_grad_(False)
    router.base.fill_(-_NEVER)
    for i, pair in enumerate(pairs):
        for widths in pair:
            for own, rows in zip(config.indices(widths), router.base.split(config.choices, -1), strict=True):
                rows[range(config.num_layers), i, own] = 0.0
    router.w2.copy_(torch.randn(router.w2.shape, generator=generator))
    router.calibration = {phase: ((targets[0], targets[-1]), (0.0, 0.0))}
    return router


def _choices(config: ElasticConfig) -> dict[tuple[str, int], Widths]:
    """(axis, choice) -> the sub-network with all layers at that choice, and the other axes full."""
    full, layers = config.full(), config.num_layers
    return {
        (axis.name, i): replace(full, **{axis.name: (width,) * layers})
        for axis in config.axes
        for i, width in enumerate(axis.menu)
    }


def _costs(config: ElasticConfig, times: dict[tuple[str, int], float]) -> dict[str, Any]:
    """The costs of a table, as measured and repaired; ``times``: ms of a whole forward at each (axis, choice)."""
    layers, costs = config.num_layers, {}
    for axis in AXES:
        raw = tuple(ms / layers for (name, _), ms in times.items() if name == axis)
        repaired = isotonic(raw)
        costs[axis] = (tuple(ms - repaired[0] for ms in repaired),) * layers
        costs[f"raw_{axis}"] = (raw,) * layers
    return costs


def _no_costs(config: ElasticConfig) -> dict[str, Any]:
    return _costs(config, dict.fromkeys(_choices(config), 0.0))


def _warnings(table: LatencyTable) -> list[str]:
    found = []
    for axis, costs in zip(table.elastic.axes, table.by_axis, strict=True):
        name, menu = axis.name, axis.menu
        for i, (cost, above) in enumerate(pairwise(costs[0])):
            if cost >= _SAME_COST * above:
                found.append(
                    f"{name} {menu[i]} costs as much as {menu[i + 1]} ({cost:.3f}, {above:.3f} ms a layer)"
                )
    return found
