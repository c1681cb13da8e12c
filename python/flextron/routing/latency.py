"""The latency table: what every choice of every layer costs here, and how well the sum predicts the whole.

    T(config) = base + slope * sum over layers ( heads[layer, n_c] + mlp[layer, d_c] )

The entries are measured through what runs, whole forwards, which on a CPU are one op. Base and slope are fitted on
whole models of mixed widths, and the residual is taken on others. All times are milliseconds.
"""

from __future__ import annotations

import platform
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flextron.checkpoint.format import FORMAT, CheckpointError, check_format, listed
from flextron.checkpoint.io import Files, opened, write_json
from flextron.checkpoint.origin import check_model
from flextron.checkpoint.schema import build
from flextron.config import ElasticConfig, Widths, check_numbers
from flextron.judge.timing import compare
from flextron.nn import Dial, ElasticCache
from flextron.nn.cache import ElasticCacheLayer
from flextron.nn.router import AdaptiveRouter, Choices, default_hidden

FILE = "latency.json"
PHASES = ("prefill", "decode")
AXES = ("mlp", "heads")
_MIXTURES = 6  # of two networks, from which the cost of choosing for every token is fitted
_NEVER = 1e6  # below any logit of a choice that may be made
_SAME_COST = 0.97  # a width that costs this much of the next one up saves nothing worth its loss

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        phase: ``"prefill"``: ``length`` tokens at once, without a cache. ``"decode"``: one new token per
            sequence.
        batch: sequences.
        length: tokens of each sequence in the prefill phase; 1 in the decode phase.
        context: tokens cached before the new one in the decode phase; 0 in the prefill phase.
    """

    phase: str
    batch: int = 1
    length: int = 1
    context: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.phase not in PHASES:
            raise ValueError(f"Workload: phase must be one of {', '.join(PHASES)}, got {self.phase!r}")
        if self.batch < 1:
            raise ValueError(f"Workload: batch must be at least 1, got {self.batch}")
        if self.phase == "prefill" and (self.length < 1 or self.context):
            raise ValueError(
                "Workload: prefill must have a length and no context, "
                f"got length={self.length}, context={self.context}"
            )
        if self.phase == "decode" and (self.length != 1 or self.context < 1):
            raise ValueError(
                "Workload: decode must have length 1 and a context, "
                f"got length={self.length}, context={self.context}"
            )

    @classmethod
    def prefill(cls, length: int, batch: int = 1) -> Workload:
        return cls("prefill", batch=batch, length=length)

    @classmethod
    def decode(cls, context: int, batch: int = 1) -> Workload:
        return cls("decode", batch=batch, context=context)

    @property
    def tokens(self) -> int:
        """Tokens that one forward takes in."""
        return self.batch * self.length


@dataclass(frozen=True)
class Check:
    """One whole configuration: predicted by the table and measured, in milliseconds."""

    widths: Widths
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """|predicted - measured|, as a fraction of measured."""
        return abs(self.predicted - self.measured) / self.measured


@dataclass(frozen=True)
class LatencyTable:
    """Measured costs of the choices of one phase on one machine.

    Attributes:
        workload, machine: what was timed, and where: the key of the table.
        elastic: shape and menus of the model that was timed. Its latency does not depend on the weights' values.
        mlp, heads: [L, C], cost of a choice in a layer, never falling with the width; in the decode phase what it
            costs above the narrowest.
        raw_mlp, raw_heads: the same before the repair of `isotonic`.
        base, slope: the end-to-end fit.
        adaptive: the same of forwards in which a router chooses for every token, which also run the router, project
            the keys and values of all groups and move rows; None where that was not measured: `base` and `slope`.
        fitted, held_out: the configurations used for the fit, and those that judge it.
        warnings: sentences for the user.
    """

    workload: Workload
    machine: dict[str, Any]
    elastic: ElasticConfig
    mlp: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[float, ...], ...]
    raw_mlp: tuple[tuple[float, ...], ...]
    raw_heads: tuple[tuple[float, ...], ...]
    base: float
    slope: float
    adaptive: tuple[float, float] | None = None
    fitted: tuple[Check, ...] = ()
    held_out: tuple[Check, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mlp, dtype=torch.float64), torch.tensor(self.heads, dtype=torch.float64)

    @property
    def num_layers(self) -> int:
        return self.elastic.num_layers

    @cached_property
    def full_ms(self) -> float:
        """Predicted time of the full model: what a fraction is a fraction of."""
        return self.predict(self.elastic.full())

    @cached_property
    def smallest_ms(self) -> float:
        return self.predict(self.elastic.smallest())

    @cached_property
    def smallest_adaptive_ms(self) -> float:
        """Where every token chooses for itself; not below what is possible without choosing."""
        return max(self.smallest_ms, self.predict(self.elastic.smallest(), adaptive=True))

    def _line(self, adaptive: bool) -> tuple[float, float]:
        return self.adaptive if adaptive and self.adaptive is not None else (self.base, self.slope)

    @property
    def residual_median(self) -> float:
        """Median relative error on the held-out configurations."""
        return median(c.error for c in self.held_out)

    @property
    def residual_worst(self) -> float:
        return max(c.error for c in self.held_out)

    def expected(self, p_mlp: Tensor, p_heads: Tensor, adaptive: bool = False) -> Tensor:
        """Expected milliseconds under choice probabilities, differentiable in them.

        Args:
            p_mlp: [..., L, C_mlp].
            p_heads: [..., L, C_heads].
            adaptive: a router chooses for every token.

        Returns:
            [...]
        """
        mlp, heads = (t.to(p_mlp) for t in self._tensors)
        base, slope = self._line(adaptive)
        return base + slope * ((p_mlp * mlp).sum((-2, -1)) + (p_heads * heads).sum((-2, -1)))

    def predict(self, widths: Widths, adaptive: bool = False) -> float:
        """Milliseconds of a configuration; ``adaptive``: which a router chooses for every token."""
        base, slope = self._line(adaptive)
        return base + slope * _layer_sum(self, widths)

    def of_tokens(self, choices: Choices) -> Tensor:
        """Milliseconds of forwards in which every token has choices of its own, ``mlp``, ``heads`` [..., B, T, L].

        A prefill is bound by arithmetic: it takes the mean over its B * T tokens. A decode step of ``batch``
        sequences is bound by the weights that it reads, up to the widest of its tokens: the mean over the steps
        of the maximum over the sequences, in each layer. (B is then a multiple of the workload's batch.)
        """
        if self.workload.phase == "decode" and self.workload.batch > 1:
            batch = self.workload.batch
            choices = Choices(*(axis.unflatten(-3, (-1, batch)).amax(-3) for axis in choices))
        layers = torch.arange(self.num_layers, device=choices.mlp.device)
        sums = sum(
            costs.to(rows.device)[layers, rows].sum(-1)
            for costs, rows in zip(self._tensors, choices, strict=True)
        )
        base, slope = self._line(adaptive=True)
        return (base + slope * sums).mean((-2, -1))

    def fraction(self, widths: Widths, adaptive: bool = False) -> float:
        """The configuration's time over the full model's."""
        return self.predict(widths, adaptive) / self.full_ms

    def check(self, config: ElasticConfig) -> None:
        """Raise ValueError unless the table is about a model of these shapes and menus."""
        if differing := self.elastic.differs(config):
            raise ValueError(
                f"latency table: must be of this model, got one of {listed(differing)}; "
                "run `flextron profile DIR` again"
            )

    @property
    def costs(self) -> dict[str, Any]:
        """What routers and calibrations rest on, as it is stored with them."""
        return {
            "mlp": list(self.mlp[0]),
            "heads": list(self.heads[0]),
            "base": self.base,
            "slope": self.slope,
        }

    def differs(self, machine: dict[str, Any]) -> list[str]:
        """How ``machine`` (of `machine_of`) is not the one that was measured: one sentence each."""
        keys = sorted(self.machine.keys() | machine.keys())
        return [
            f"the {self.workload.phase} table was measured with {k} {self.machine.get(k)!r}, "
            f"now it is {machine.get(k)!r}"
            for k in keys
            if self.machine.get(k) != machine.get(k)
        ]

    def to_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "elastic": self.elastic.to_dict()}
        values["residual_median"] = self.residual_median if self.held_out else None
        values["residual_worst"] = self.residual_worst if self.held_out else None
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: str | Path = FILE, place: str = "") -> LatencyTable:
        """What `to_dict` returned; CheckpointError says what in ``path`` is not so."""
        kept = {k: v for k, v in values.items() if k not in ("residual_median", "residual_worst")}
        table = build(cls, kept, path, place)
        for axis, menu in zip(AXES, (table.elastic.mlp_choices, table.elastic.head_choices), strict=True):
            for name in (axis, f"raw_{axis}"):
                rows = getattr(table, name)
                shape = len(rows) == table.elastic.num_layers and all(len(row) == len(menu) for row in rows)
                if not shape or (name == axis and any(list(row) != sorted(row) for row in rows)):
                    raise CheckpointError(
                        f"{path}: {place}.{name} must be a cost for each of {table.elastic.num_layers} layers and "
                        f"{len(menu)} choices, which never falls, got another"
                    )
        if table.full_ms <= 0:
            raise CheckpointError(f"{path}: {place} must predict a time above 0, got {table.full_ms:g}")
        if any(c.measured <= 0 for c in (*table.fitted, *table.held_out)):
            raise CheckpointError(f"{path}: {place} must have measured times above 0, got others")
        return table


def save_tables(tables: dict[str, LatencyTable], directory: str | Path) -> None:
    """Write tables, by phase, as ``latency.json`` of an elastic checkpoint."""
    content = {"format": FORMAT, "tables": {phase: table.to_dict() for phase, table in tables.items()}}
    write_json(Path(directory) / FILE, content)


def load_tables(directory: str | Path | Files, config: ElasticConfig) -> dict[str, LatencyTable]:
    """The tables of an elastic checkpoint, by phase; empty when it was never profiled.

    A table that does not say which model it is of is left out with a warning.

    Raises:
        CheckpointError: the file is damaged, or a table is of a model that is not ``config``.
    """
    with opened(directory) as files:
        if FILE not in files:
            return {}
        path, content = files / FILE, files.read_json(FILE)
        mend = f"flextron profile {files.directory}"
    check_format(content, path)
    found = build(dict[str, dict[str, Any]], content.get("tables"), path, "tables")
    tables = {}
    for phase, values in found.items():
        if "elastic" not in values:
            warnings.warn(
                f"{path}: a table does not say which model it is of, and is left out; run `{mend}`",
                stacklevel=2,
            )
            continue
        tables[phase] = LatencyTable.from_dict(values, path, f"tables.{phase}")
        if tables[phase].workload.phase != phase:
            raise CheckpointError(
                f"{path}: tables.{phase} must be of {phase}, got {tables[phase].workload.phase}"
            )
        check_model(path, tables[phase].elastic, config, mend)
    return tables


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """The closest never-falling sequence in least squares: pool adjacent violators.

    A wider choice that measures faster than a narrower one is noise, and a planner would take it for a gain.
    """
    blocks: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks.pop(-2), blocks.pop(-1)
            blocks.append(((a * n + b * m) / (n + m), n + m))
    return tuple(mean for mean, count in blocks for _ in range(count))


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
    for menu in (config.mlp_choices, config.head_choices):
        size, top = rng.random(), len(menu) - 1
        if homogeneous:
            places = [size * top + rng.gauss(0, 0.35) for _ in range(config.num_layers)]
        else:
            places = [
                rng.betavariate(0.2 + 1.8 * size, 2 - 1.8 * size) * (top + 1) - 0.5
                for _ in range(config.num_layers)
            ]
        chosen.append(tuple(menu[min(top, max(0, round(place)))] for place in places))
    return Widths(*chosen)


def calibration_widths(
    config: ElasticConfig, fit: int, held_out: int, seed: int
) -> tuple[list[Widths], list[Widths]]:
    """Configurations to fit on (the full and the smallest come first) and to judge with: no one in both.

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


def machine_of(model: Any) -> dict[str, Any]:
    """The device, dtype, threads and versions that a measurement of this model holds for."""
    weight = model.get_input_embeddings().weight
    on_gpu = weight.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(weight.device) if on_gpu else _cpu_name(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flextron": metadata.version("flextron"),
    }


def profile(
    model: Any,
    workload: Workload,
    *,
    rounds: int = 5,
    min_seconds: float = 0.02,
    fit: int = 8,
    held_out: int = 6,
    seed: int = 0,
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
        rounds: samples of each choice and each whole model.
        min_seconds: least duration of a sample.
        fit: whole configurations for base and slope, the full and the smallest among them.
        held_out: whole configurations for the residual.
        seed: of the configurations.
        progress: called with (done, total) rounds.
    """
    if fit < 2 or held_out < 1:
        raise ValueError(f"profile: fit must be at least 2 and held_out at least 1, got {fit} and {held_out}")
    config = model.elastic
    report = (lambda done: None) if progress is None else (lambda done: progress(done, 2 * rounds))
    raw = _by_choice(model, workload, rounds, min_seconds, report)
    repaired = {axis: isotonic(values) for axis, values in raw.items()}
    costs = {axis: tuple(ms - values[0] for ms in values) for axis, values in repaired.items()}
    to_fit, to_judge = calibration_widths(config, fit, held_out, seed)
    full_ms, others = measure(
        model,
        to_fit[1:] + to_judge,
        workload,
        rounds=rounds,
        min_seconds=min_seconds,
        on_round=lambda done: report(rounds + done),
    )
    layers = config.num_layers
    draft = LatencyTable(
        workload=workload,
        machine=machine_of(model),
        elastic=config,
        mlp=(costs["mlp"],) * layers,
        heads=(costs["heads"],) * layers,
        raw_mlp=(raw["mlp"],) * layers,
        raw_heads=(raw["heads"],) * layers,
        base=0.0,
        slope=1.0,
        warnings=tuple(_warnings(config, costs)),
    )
    count = len(to_fit)
    return calibrate(
        draft,
        list(zip(to_fit, [full_ms, *others[: count - 1]], strict=True)),
        list(zip(to_judge, others[count - 1 :], strict=True)),
    )


def calibrate(
    table: LatencyTable, to_fit: list[tuple[Widths, float]], to_judge: list[tuple[Widths, float]]
) -> LatencyTable:
    """The table with base and slope fitted on ``to_fit`` (widths, measured ms), judged on ``to_judge``.

    The first of ``to_fit`` is the full model. It counts as much as all the others together: every ratio was
    measured against it, and every fraction is a fraction of it.
    """
    sums = [_layer_sum(table, widths) for widths, _ in to_fit]
    times = [ms for _, ms in to_fit]
    warnings = table.warnings
    try:
        base, slope = fit_line(sums, times, [len(to_fit) - 1.0] + [1.0] * (len(to_fit) - 1))
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


def measure_adaptive(
    model: Any,
    table: LatencyTable,
    *,
    hidden: int | None = None,
    rounds: int = 5,
    min_seconds: float = 0.02,
    progress: Progress | None = None,
) -> LatencyTable:
    """The table with `LatencyTable.adaptive` measured, by routers that draw mixtures of two networks.

    Args:
        model: an elastic model; its dial and router are restored.
        table: of this model on this machine.
        hidden: width of the routers' hidden layer, as `AdaptiveRouter`; None: the default of training.
        rounds, min_seconds: of the measurement.
        progress: called with (done, total) rounds.
    """
    config, workload = model.elastic, table.workload
    table.check(config)
    router = _mixing_router(config, hidden or default_hidden(config), workload.phase)
    dials = [Dial.adaptive(config, [t], workload.phase) for t in router.targets[:-1]]
    plain = replace(table, base=0.0, slope=1.0, adaptive=None)
    before, own = model.dial, model.adaptive
    model.attach_router(router)
    try:
        sums = []
        for dial in dials:
            run = _whole_model(model, dial, workload)
            model.turn(dial)
            with model.watched() as forwards:
                run()
            sums.append(float(plain.of_tokens(forwards[0])))
        full_ms, times = measure(
            model,
            dials,
            workload,
            rounds=rounds,
            min_seconds=min_seconds,
            on_round=None if progress is None else lambda done: progress(done, rounds),
        )
    finally:
        model.turn(before)
        model.attach_router(own)
    try:
        line = fit_line(sums, [ms / full_ms * table.full_ms for ms in times], [1.0] * len(sums))
    except ValueError as error:
        warning = (
            f"adaptive budgets are planned as static ones, their own time does not follow the table ({error})"
        )
        return replace(table, adaptive=None, warnings=(*table.warnings, warning))
    return replace(table, adaptive=line)


def _mixing_router(config: ElasticConfig, hidden: int, phase: str) -> AdaptiveRouter:
    """A router whose first target is the smallest network, the second the full one, and each other but the last a
    mixture of two random ones: in every layer, tokens choose between them by their state."""
    pairs = [(config.smallest(),) * 2, (config.full(),) * 2]
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    pairs += [(random_widths(config, rng), random_widths(config, rng)) for _ in range(_MIXTURES)]
    menus = config.mlp_choices, config.head_choices
    targets = [(i + 1) / (len(pairs) + 1) for i in range(len(pairs))]
    router = AdaptiveRouter(
        config.num_layers, config.hidden_size, *map(len, menus), (*targets, 1.0), hidden
    ).requires_grad_(False)
    router.base.fill_(-_NEVER)
    for i, pair in enumerate(pairs):
        for widths in pair:
            for layer, kept in enumerate(zip(widths.mlp, widths.heads, strict=True)):
                mlp, heads = (menu.index(n) for menu, n in zip(menus, kept, strict=True))
                router.base[layer, i, [mlp, len(menus[0]) + heads]] = 0.0
    router.w2.copy_(torch.randn(router.w2.shape, generator=generator))
    router.calibration = {phase: ((targets[0], targets[-1]), (0.0, 0.0))}
    return router


def measure(
    model: Any,
    widths: Sequence[Widths | Dial],
    workload: Workload,
    *,
    rounds: int = 5,
    min_seconds: float = 0.02,
    ids: Tensor | None = None,
    on_round: Callable[[int], object] | None = None,
) -> tuple[float, list[float]]:
    """Milliseconds of the whole model: (full, one for each of ``widths``, which may be dials).

    Each configuration is timed between two runs of the full model; what is returned is its median ratio to
    them times the median of the full model, so the drift of a shared machine cancels. ``ids`` [batch, length] are
    the tokens; random ones by default, which is all the same unless a router looks at them.
    """
    before = model.dial
    choices = {str(i): Dial.of(w) for i, w in enumerate(widths)}
    choices["full"] = Dial.of(model.elastic.full())
    try:
        runs = {name: _whole_model(model, dial, workload, ids) for name, dial in choices.items()}
        full = ("full", runs.pop("full"))
        reference, others = compare(
            full,
            runs,
            rounds,
            min_seconds,
            setup=lambda name: model.turn(choices[name]),
            on_round=on_round,
        )
    finally:
        model.turn(before)
    full_ms = 1e3 * reference.median
    return full_ms, [full_ms * others[str(i)].ratio for i in range(len(widths))]


def _choices(config: ElasticConfig) -> dict[tuple[str, int], Widths]:
    """(axis, choice) -> all layers at it, the other axis full."""
    found = {("mlp", i): config.uniform(i, -1) for i in range(len(config.mlp_choices))}
    return found | {("heads", i): config.uniform(-1, i) for i in range(len(config.head_choices))}


def _by_choice(
    model: Any, workload: Workload, rounds: int, min_seconds: float, on_round: Callable[[int], object]
) -> dict[str, tuple[float, ...]]:
    """axis -> milliseconds of a whole forward at each choice, over the layers."""
    choices = _choices(model.elastic)
    _, times = measure(
        model, list(choices.values()), workload, rounds=rounds, min_seconds=min_seconds, on_round=on_round
    )
    found, layers = dict(zip(choices, times, strict=True)), model.elastic.num_layers
    return {axis: tuple(ms / layers for (a, _), ms in found.items() if a == axis) for axis in AXES}


def _whole_model(
    model: Any, dial: Widths | Dial, workload: Workload, ids: Tensor | None = None
) -> Callable[[], None]:
    """The forward whose time is predicted, for a model that will be set to ``dial``."""
    weight = model.get_input_embeddings().weight
    shape = (workload.batch, workload.length)
    if ids is None:
        ids = torch.randint(model.elastic.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if ids.shape != shape:
        raise ValueError(f"measure: ids must have shape {list(shape)} of the workload, got {list(ids.shape)}")
    ids = ids.to(weight.device)
    if workload.phase == "prefill":
        return torch.no_grad()(lambda: model(ids, logits_to_keep=1, use_cache=False))
    cache = _filled_cache(model, dial, workload)

    @torch.no_grad()
    def run() -> None:
        model(ids, cache=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.layers:
            layer.crop(-1)

    return run


def _filled_cache(model: Any, dial: Widths | Dial, workload: Workload) -> ElasticCache:
    """A cache of ``context`` random tokens, always the same ones, with the groups that ``dial`` keeps."""
    weight, config = model.get_input_embeddings().weight, model.elastic
    cache = ElasticCache()
    cache.layers.extend(ElasticCacheLayer() for _ in range(config.num_layers))
    dial, generator = Dial.of(dial), torch.Generator().manual_seed(0)
    for layer, heads in enumerate(dial.bound().heads):
        shape = (workload.batch, config.kv_heads(heads, dial.kv), workload.context, config.head_dim)
        states = torch.randn(shape, generator=generator).to(weight)
        cache.update(states, states, layer)
    return cache


def _layer_sum(table: LatencyTable, widths: Widths) -> float:
    total = 0.0
    for menu, rows, chosen in (
        (table.elastic.mlp_choices, table.mlp, widths.mlp),
        (table.elastic.head_choices, table.heads, widths.heads),
    ):
        total += sum(row[menu.index(width)] for row, width in zip(rows, chosen, strict=True))
    return total


def _warnings(config: ElasticConfig, costs: dict[str, tuple[float, ...]]) -> list[str]:
    found = []
    for axis, menu in (("mlp", config.mlp_choices), ("heads", config.head_choices)):
        for i, (cost, above) in enumerate(zip(costs[axis], costs[axis][1:], strict=False)):
            if cost >= _SAME_COST * above:
                found.append(
                    f"{axis} {menu[i]} costs as much as {menu[i + 1]} ({cost:.3f}, {above:.3f} ms a layer)"
                )
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
