"""Profiling: measure the latency table of a model on this machine.

What is measured is what runs, whole forwards, which on a CPU are one op. The entries are fitted on models with all
layers alike and on some of mixed widths together; the residual is taken on others. Measuring goes on while it is large.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from time import monotonic
from typing import Any

import torch

from flextron.artefacts.latency_table import LatencyTable, Workload
from flextron.artefacts.machine import machine_of
from flextron.config import ElasticConfig, PerAxis, Widths
from flextron.judge.latency import Measurement, measure, whole_model
from flextron.judge.loss import restored
from flextron.nn import Dial
from flextron.nn.protocol import Elastic
from flextron.nn.router import AdaptiveRouter, default_hidden
from flextron.routing.fit import Timed, calibration_widths, fit_costs, fit_line, fit_table, random_widths

_MIXTURES = 6  # mixtures of two networks to which the cost of choosing for every token is fitted
_NEVER = 1e6  # subtracted from the logit of a choice that must not be made
_CLOSE = 0.05  # error on networks that the table was not fitted on, below which nothing more is measured
_SURE = 0.01  # standard error of a fraction below which nothing more is measured: two profiles are then within 3 %
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

    For each axis and choice a forward is timed with all layers at the choice, the other axis at its full width, and so
    are some of mixed widths. `fit_costs` makes a layer's entries of all of them. Every model is timed between two runs
    of the full one.

    Args:
        model: an elastic model; its widths are restored.
        workload: phase, batch and lengths.
        rounds: samples of each choice and each whole model, at least.
        min_seconds: least duration of a sample.
        fit: configurations of mixed widths to fit on, the full and the smallest among them.
        held_out: whole configurations for the residual.
        seed: seed of the configurations drawn.
        patience: seconds after the first ``rounds`` to go on measuring for, while a held-out configuration is off by
            5 % or more, a fraction has a standard error of 1 % or more, or the table is in doubt; None: 60.
        progress: called with (done, total) rounds.
    """
    if fit < 2 or held_out < 1:
        raise ValueError(f"profile: fit must be at least 2 and held_out at least 1, got {fit} and {held_out}")
    config = model.elastic
    to_fit, to_judge = calibration_widths(config, fit, held_out, seed)
    choices = _choices(config)
    others = [*choices, *to_fit[1:], *to_judge]
    nothing = PerAxis(*((0.0,) * len(axis.menu) for axis in config.axes))
    draft = LatencyTable(
        workload=workload,
        machine=machine_of(model),
        elastic=config,
        **_entries(config, nothing, [0.0] * len(choices)),
        base=0.0,
        slope=1.0,
    )

    def table_of(found: Measurement) -> tuple[LatencyTable, float]:
        """The table, and the standard error of its fractions."""
        full = Timed(to_fit[0], found.full.ms, 0.0)
        timed = [
            Timed(widths, ms, error)
            for widths, (ms, _), error in zip(others, found.others, found.errors, strict=True)
        ]
        alike, mixed, judged = (
            timed[: len(choices)],
            timed[len(choices) :][: len(to_fit) - 1],
            timed[-len(to_judge) :],
        )
        costs, error = fit_costs(config, [full, *mixed, *alike])
        entries = _entries(config, costs, [latency.ms for latency in alike])
        table = replace(draft, **entries, noise=found.noise, spread_ms=found.full.spread)
        table = replace(table, warnings=tuple(_warnings(table)))
        pairs = [[(each.widths, each.ms) for each in some] for some in ([full, *mixed, *alike], judged)]
        return fit_table(table, *pairs), error

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
        table, error = table_of(found)
        return now >= until or (table.residual_worst < _CLOSE and error < _SURE and table.doubt is None)

    found = measure(
        model,
        others,
        workload,
        rounds=rounds,
        min_seconds=min_seconds,
        on_round=on_round,
        enough=enough,
    )
    return table_of(found)[0]


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


def _choices(config: ElasticConfig) -> list[Widths]:
    """For each axis and choice, the sub-network with all layers at that choice, and the other axes full."""
    full, layers = config.full(), config.num_layers
    return [replace(full, **{axis.name: (width,) * layers}) for axis in config.axes for width in axis.menu]


def _entries(
    config: ElasticConfig, costs: PerAxis[tuple[float, ...]], alike: Sequence[float]
) -> dict[str, Any]:
    """A table's costs, fitted and as measured; ``alike``: ms of the networks of `_choices`."""
    layers, entries, at = config.num_layers, {}, 0
    for axis, own in zip(config.axes, costs, strict=True):
        raw = alike[at : at + len(axis.menu)]
        at += len(raw)
        entries[axis.name] = (own,) * layers
        entries[f"raw_{axis.name}"] = (tuple(ms / layers for ms in raw),) * layers
    return entries


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
