"""The planner: a budget in the user's units becomes the widths of every layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from flextron.artefacts.ladder import Ladder, uniform_ladder
from flextron.artefacts.latency_files import Tables, machines, nearest, of_machine
from flextron.artefacts.latency_table import PHASES, LatencyTable
from flextron.artefacts.machine import Machine, machine_on, name_of
from flextron.config import ElasticConfig, Widths, count, number
from flextron.nn.protocol import Elastic
from flextron.sentences import listed

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
        tables: latency tables, of all machines; without one, only ``params``, ``memory_gb`` and ``widths`` are
            understood.
        ladder: the routed ladder; None: the uniform one. Its networks are the same on every machine, what they take
            is not.
        machine: the machine that budgets are about; None: the only one that there are tables of.
    """

    config: ElasticConfig
    tables: Tables = ()
    ladder: Ladder = None  # type: ignore[assignment]  # becomes the uniform ladder
    machine: Machine | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", tuple(self.tables))
        ladder = self.ladder or uniform_ladder(self.config)
        ladder.check(self.config)
        object.__setattr__(self, "ladder", ladder)
        for table in self.tables:
            table.check(self.config)

    def at(self, device: torch.device, dtype: torch.dtype) -> Planner:
        """The planner of budgets for a model that is on ``device`` with weights of ``dtype``."""
        return replace(self, machine=machine_on(device, dtype))

    @property
    def here(self) -> Tables:
        """The tables of the planner's machine."""
        return self.tables if self.machine is None else of_machine(self.tables, self.machine)

    def table(
        self, phase: str, *, batch: int | None = None, context: int | None = None, machine: str | None = None
    ) -> LatencyTable:
        """The latency table of a phase.

        Args:
            phase: ``"prefill"`` or ``"decode"``.
            batch, context: sequences, and tokens of a prompt or in the cache: the nearest that were profiled are
                meant; None: the fewest.
            machine: the name of another machine, as ``flextron info`` lists them; None: this one.

        Raises:
            ValueError: it was never measured; the sentence says what was, and how to.
        """
        own = self._of_machine(machine)
        if found := [table for table in own if table.workload.phase == phase]:
            return nearest(found, batch, context)
        have = ", ".join(sorted({table.workload.phase for table in own})) or "none"
        raise ValueError(
            f"budget: latency must have a table of phase {phase!r}, got {have}; run `flextron profile DIR` first"
        )

    def _of_machine(self, name: str | None) -> Tables:
        known = machines(self.tables)
        if name is None and self.machine is not None:
            found = self.here
            if not found and known:
                raise ValueError(
                    f"budget: latency must have a table of this machine ({name_of(self.machine)}), got those of "
                    f"{listed(known)} only; run `flextron profile DIR`, or give one of these as machine"
                )
            return found
        if name is not None and not known:
            raise ValueError(
                f"budget: latency must have a table of the machine {name}, got none of any; run `flextron profile DIR` "
                "on that machine"
            )
        if (name is None and len(known) > 1) or (name is not None and name not in known):
            raise ValueError(f"budget: machine must be one of {listed(known)}, got {name!r}")
        return self.tables if name is None else of_machine(self.tables, name)

    def rungs(
        self, phase: str, *, batch: int | None = None, context: int | None = None, machine: str | None = None
    ) -> list[tuple[Widths, float]]:
        """Every rung of the ladder, with the milliseconds of one forward; the arguments are those of `table`."""
        batch, context = _workload(batch, context)
        table = self.table(phase, batch=batch, context=context, machine=machine)
        if table.smallest_ms <= 0:
            raise ValueError(
                f"budget: the latency table must predict times above 0, got {table.smallest_ms:.3g} ms for the fastest "
                "network; run `flextron profile DIR` again"
            )
        return [(widths, table.predict(widths)) for widths in self.ladder.rungs]

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
        machine: str | None = None,
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
                budget of latency, which of the profiled workloads is meant: see `table`.
            machine: the name of the machine whose latency is meant; None: the one that the model is on.
            kv: which key/value groups ``params`` and ``memory_gb`` count: ``"selected"`` or ``"all"``.
            bytes_per_value: bytes that a weight or cached value takes in memory.

        Raises:
            ValueError: none or several budgets, or an impossible one: the message names the best possible.
        """
        values = (fraction, latency_ms, tokens_per_s, params, memory_gb, widths)
        name, value = _only(BUDGETS, values)
        _check_phase(phase)
        if machine is not None and name not in BUDGETS[:3]:
            raise ValueError(
                f"budget: machine must be given with a budget of latency, got {machine!r} with {name}"
            )
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
            table = self.table(phase, batch=batch, context=context, machine=machine)
            _warn_of(table, name)
            limit = _time_limit(name, value, table)
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
        machine: str | None = None,
    ) -> float:
        """One budget of latency as a fraction of the full model's, which is what an adaptive router takes.

        More than the full model needs is 1. The arguments are those of `resolve`; the router is calibrated for the
        smallest workload of each phase, and takes no other.

        Raises:
            ValueError: none or several budgets, or an impossible one: the message names the best possible.
        """
        name, value = _only(BUDGETS[:3], (fraction, latency_ms, tokens_per_s))
        _check_phase(phase)
        value = _amount(name, value)
        batch, context = _workload(batch, context)
        table = self.table(phase, batch=batch, context=context, machine=machine)
        calibrated = self.table(phase, machine=machine)
        if table.workload != calibrated.workload:
            raise ValueError(
                f"budget: batch and context must be near {calibrated.workload.batch} and {calibrated.workload.depth}, "
                f"for which the adaptive router is calibrated, got {batch} and {context}"
            )
        _warn_of(table, name)
        limit = _time_limit(name, value, table, adaptive=True)
        if limit.cost(self.config.smallest()) > limit.limit * (1 + 1e-9):
            raise _impossible(name, value, limit, self.config.smallest())
        return min(1.0, limit.limit if name == "fraction" else limit.limit / table.full_ms)

    def steps(
        self, draft: Widths, chosen: Widths, batch: int, most: int
    ) -> tuple[float, tuple[float, ...]] | None:
        """What drafting takes, as shares of a decode step of ``chosen``, by the tables of this machine.

        A step that verifies n tokens of each sequence counts as one of n times as many sequences: between profiled
        batches on a straight line, and beyond them as the nearest.

        Returns:
            A step of ``draft``, and steps that verify 1, 2, .. up to ``most`` tokens of each sequence; None where no
            decode step was measured here.
        """
        own = [table for table in self.here if table.workload.phase == "decode"]
        if not own:
            return None
        least = min(table.workload.context for table in own)
        of_batch = {t.workload.batch: t for t in own if t.workload.context == least}
        profiled = sorted(of_batch)
        times = [of_batch[n].predict(chosen) for n in profiled]
        verified = np.interp([batch * n for n in range(1, most + 1)], profiled, times)
        table = of_batch[min(profiled, key=lambda n: abs(math.log(n / batch)))]
        return table.predict(draft) / table.predict(chosen), tuple((verified / verified[0]).tolist())

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


def _time_limit(name: str, value: float, table: LatencyTable, adaptive: bool = False) -> _Limit:
    predict, fraction = (partial(f, adaptive=adaptive) for f in (table.predict, table.fraction))
    if name == "fraction":
        return _Limit(fraction, value, _up, "at least", "fastest")
    if name == "latency_ms":
        return _Limit(predict, value, _up, "at least", "fastest")
    thousands = 1e3 * table.workload.tokens
    return _Limit(predict, thousands / value, lambda ms: _down(thousands / ms), "at most", "fastest")


def _warn_of(table: LatencyTable, name: str) -> None:
    """Warn of a table that milliseconds must not rest on; a share of the full model's rests on less."""
    if name != "fraction" and table.doubt:
        warnings.warn(f"{table.doubt}; run `flextron profile DIR` again", stacklevel=5)


def planner_of(model: Elastic) -> Planner:
    """The planner of a model of a checkpoint, for the machine that it is on now."""
    weight = model.get_input_embeddings().weight
    return model.planner.at(weight.device, weight.dtype)


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
