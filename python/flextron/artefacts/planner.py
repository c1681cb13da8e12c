"""The planner: a budget in the user's units becomes the widths of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from flextron.artefacts.ladder import Ladder, uniform_ladder
from flextron.artefacts.latency_table import PHASES, LatencyTable
from flextron.config import ElasticConfig, Widths, count, number

BUDGETS = ("fraction", "latency_ms", "tokens_per_s", "params", "memory_gb", "widths")
_GB = 1e9


class _Limit(NamedTuple):
    """A budget as a cost that must not exceed a limit; ``show`` turns a cost into the budget's own number."""

    cost: Callable[[Widths], float]
    limit: float
    show: Callable[[float], str]
    bound: str  # "at least", or "at most" where more is harder
    best: str  # "fastest" or "smallest"


@dataclass(frozen=True)
class Planner:
    """Turns budgets into widths: the highest rung of a ladder that is within the budget.

    A larger budget never gives a smaller network, and the same one always gives the same network.

    Attributes:
        config: the menus.
        tables: latency tables by phase; without one, only ``params``, ``memory_gb`` and ``widths`` are
            understood.
        ladder: the routed ladder; None: the uniform one.
    """

    config: ElasticConfig
    tables: Mapping[str, LatencyTable] = field(default_factory=dict)
    ladder: Ladder = None  # type: ignore[assignment]  # becomes the uniform ladder

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", dict(self.tables or {}))
        ladder = self.ladder or uniform_ladder(self.config)
        ladder.check(self.config)
        object.__setattr__(self, "ladder", ladder)
        for table in self.tables.values():
            table.check(self.config)

    def table(self, phase: str) -> LatencyTable:
        """The latency table of a phase.

        Raises:
            ValueError: it was never measured; the sentence says how to.
        """
        if phase not in self.tables:
            have = ", ".join(sorted(self.tables)) or "none"
            raise ValueError(
                f"budget: latency must have a table of phase {phase!r}, got {have}; run `flextron profile DIR` first"
            )
        return self.tables[phase]

    def predict(self, widths: Widths, phase: str = "prefill") -> float:
        """Milliseconds of one forward of the phase's workload."""
        self.config.check(widths)
        return self.table(phase).predict(widths)

    def resolve(
        self,
        fraction: float | None = None,
        *,
        latency_ms: float | None = None,
        tokens_per_s: float | None = None,
        params: float | None = None,
        memory_gb: float | None = None,
        widths: Widths | None = None,
        phase: str = "prefill",
        batch: int | None = None,
        context: int | None = None,
        kv: str = "selected",
        bytes_per_value: int = 4,
    ) -> Widths:
        """The largest network of the ladder that is within the budget; exactly one must be given.

        Args:
            fraction: share of the full model's latency in the phase, in (0, 1].
            latency_ms: milliseconds of one forward of the phase's workload.
            tokens_per_s: tokens that one forward takes in, over all sequences, per second.
            params: parameters.
            memory_gb: weights and key/value cache, in 1e9 bytes.
            widths: themselves; they are checked against the menus.
            phase: ``"prefill"`` or ``"decode"``: which latency table.
            batch, context: size of the key/value cache that ``memory_gb`` counts (1 and 0 unless given). For a
                budget of latency they must be the profiled ones when they are given.
            kv: which key/value groups ``params`` and ``memory_gb`` count: ``"selected"`` or ``"all"``.
            bytes_per_value: bytes that a weight or cached value takes in memory.

        Raises:
            ValueError: none or several budgets, or an impossible one: the message names the best possible.
        """
        values = (fraction, latency_ms, tokens_per_s, params, memory_gb, widths)
        name, value = _only(BUDGETS, values)
        _check_phase(phase)
        if widths is not None:
            self.config.check(widths)
            return widths
        value = _amount(name, value)
        batch, context = _workload(batch, context)
        if name == "params" and (batch is not None or context is not None):
            raise ValueError(
                "budget: batch and context must not be given with params, which counts no cache, "
                f"got {batch} and {context}"
            )
        if name in ("params", "memory_gb"):
            limit = self._size_limit(name, value, batch or 1, context or 0, kv, bytes_per_value)
        else:
            limit = self._time_limit(name, value, phase, batch, context)
        found = self.ladder.highest(limit.cost, limit.limit)
        if found is None:
            raise _impossible(name, value, limit, self.ladder.rungs[0])
        return found

    def target(
        self,
        fraction: float | None = None,
        *,
        latency_ms: float | None = None,
        tokens_per_s: float | None = None,
        phase: str = "prefill",
        batch: int | None = None,
        context: int | None = None,
    ) -> float:
        """One budget of latency as a fraction of the full model's, which is what an adaptive router takes.

        More than the full model needs is 1. The arguments are those of `resolve`.

        Raises:
            ValueError: none or several budgets, or an impossible one: the message names the best possible.
        """
        name, value = _only(BUDGETS[:3], (fraction, latency_ms, tokens_per_s))
        _check_phase(phase)
        value = _amount(name, value)
        batch, context = _workload(batch, context)
        limit = self._time_limit(name, value, phase, batch, context, adaptive=True)
        if limit.cost(self.config.smallest()) > limit.limit * (1 + 1e-9):
            raise _impossible(name, value, limit, self.config.smallest())
        table = self.table(phase)
        return min(1.0, limit.limit if name == "fraction" else limit.limit / table.full_ms)

    def _size_limit(
        self, name: str, value: float, batch: int, context: int, kv: str, bytes_per_value: int
    ) -> _Limit:
        if name == "params":
            return _Limit(
                lambda widths: self.config.params(widths, kv),
                value,
                lambda n: f"{n:.0f}",
                "at least",
                "smallest",
            )

        def gigabytes(widths: Widths) -> float:
            size = self.config.memory_bytes(
                widths, batch=batch, context=context, bytes_per_value=bytes_per_value, kv=kv
            )
            return size / _GB

        return _Limit(gigabytes, value, _up, "at least", "smallest")

    def _time_limit(
        self,
        name: str,
        value: float,
        phase: str,
        batch: int | None,
        context: int | None,
        adaptive: bool = False,
    ) -> _Limit:
        table = self.table(phase)
        predict, fraction = (partial(f, adaptive=adaptive) for f in (table.predict, table.fraction))
        for what, wanted in (("batch", batch), ("context", context)):
            profiled = getattr(table.workload, what)
            if wanted is not None and wanted != profiled:
                raise ValueError(
                    f"budget: {what} must be {profiled}, as in the {phase} latency table, got {wanted}; "
                    f"profile the model with the {what} you want"
                )
        if name == "fraction":
            return _Limit(fraction, value, _up, "at least", "fastest")
        if name == "latency_ms":
            return _Limit(predict, value, _up, "at least", "fastest")
        thousands = 1e3 * table.workload.tokens
        return _Limit(predict, thousands / value, lambda ms: _down(thousands / ms), "at most", "fastest")


def _only(names: Sequence[str], values: Sequence[Any]) -> tuple[str, Any]:
    """The one budget that is given, by name."""
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"budget: exactly one of {', '.join(names)} must be given, got {', '.join(given) or 'none'}"
        )
    return next(iter(given.items()))


def _check_phase(phase: Any) -> None:
    if phase not in PHASES:
        raise ValueError(f"budget: phase must be one of {', '.join(PHASES)}, got {phase!r}")


def _amount(name: str, value: Any) -> float:
    """A budget's number; that of a fraction is at most 1."""
    fault = f"budget: {name} must be a positive number, got {value!r}"
    try:
        own = number(name, value)
    except ValueError:
        raise ValueError(fault) from None
    if not math.isfinite(own) or own <= 0:
        raise ValueError(fault)
    if name == "fraction" and own > 1:
        raise ValueError(f"budget: fraction must be in (0, 1], got {own:g}")
    return own


def _workload(batch: Any, context: Any) -> tuple[int | None, int | None]:
    """Sequences and cached tokens, where they are given."""
    given = []
    for name, value, least in (("batch", batch, 1), ("context", context, 0)):
        own = None if value is None else count(f"budget: {name}", value)
        if own is not None and own < least:
            raise ValueError(f"budget: {name} must be at least {least}, got {own}")
        given.append(own)
    return given[0], given[1]


def _impossible(name: str, value: float, limit: _Limit, smallest: Widths) -> ValueError:
    possible = limit.show(limit.cost(smallest))
    return ValueError(
        f"budget: {name} must be {limit.bound} {possible} (the {limit.best} network), got {value:g}"
    )


def _up(value: float) -> str:
    """Four digits, rounded up: what the message names is possible."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit) * unit:.4g}"


def _down(value: float) -> str:
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.floor(value / unit) * unit:.4g}"
