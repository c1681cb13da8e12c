"""The latency table: what every choice of every layer costs here, and how well the sum predicts the whole.

    T(config) = base + slope * sum over layers ( heads[layer, n_c] + mlp[layer, d_c] )

All times are milliseconds. `flextron.routing.profile` measures a table; `latency_files.py` stores a checkpoint's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flextron.artefacts.machine import Machine, name_of
from flextron.artefacts.noise import DOUBTFUL, Noise
from flextron.checkpoint.format import CheckpointError
from flextron.checkpoint.schema import build
from flextron.config import AXES, ElasticConfig, PerAxis, Widths, check_numbers
from flextron.nn.router import Indices
from flextron.sentences import listed

PHASES = ("prefill", "decode")


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

    def __str__(self) -> str:
        what = f"prefill of {self.length}" if self.phase == "prefill" else f"decode after {self.context}"
        return f"{what} tokens" + (f", batch {self.batch}" if self.batch > 1 else "")

    @property
    def depth(self) -> int:
        """Tokens of each sequence that the phase is about: those of its prompt, or those that are cached."""
        return self.length if self.phase == "prefill" else self.context

    @property
    def order(self) -> tuple[int, int, int]:
        """Where its table stands among a machine's: by phase, batch and depth."""
        return PHASES.index(self.phase), self.batch, self.depth


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
    """Measured costs of the choices for one workload on one machine.

    Attributes:
        workload, machine: what was timed and where, the key of the table.
        elastic: shape and menus of the model that was timed; latency does not depend on the weights' values.
        mlp, heads: [L, C], cost of a choice in a layer, never falling with the width; in the decode phase what it
            costs above the narrowest.
        raw_mlp, raw_heads: the forwards with all layers at a choice, as measured, over the number of layers.
        base, slope: the end-to-end fit.
        adaptive: base and slope of forwards in which a router chooses for every token: they also run the router,
            project keys and values of all groups and gather rows. None where that was not measured, which counts as
            `base` and `slope`.
        fitted, held_out: the configurations used for the fit, and those that judge it.
        warnings: sentences for the user.
        noise: how quiet the machine was; None in tables of versions that did not look.
        spread_ms: half the distance between the quartiles of the full model's times; None there, too.
        unknown: what a later version has stored beside, which is stored again.
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
    noise: Noise | None = None
    spread_ms: float | None = None
    unknown: dict[str, Any] = field(default_factory=dict)

    @property
    def by_axis(self) -> PerAxis[tuple[tuple[float, ...], ...]]:
        """[L, C] of each axis: its costs."""
        return PerAxis(*(getattr(self, name) for name in AXES))

    @cached_property
    def _tensors(self) -> PerAxis[Tensor]:
        return PerAxis(*(torch.tensor(costs, dtype=torch.float64) for costs in self.by_axis))

    @property
    def num_layers(self) -> int:
        return self.elastic.num_layers

    @property
    def machine_name(self) -> str:
        return name_of(self.machine)

    @cached_property
    def full_ms(self) -> float:
        """Predicted time of the full model: what a fraction is a fraction of."""
        return self.predict(self.elastic.full())

    @cached_property
    def smallest_ms(self) -> float:
        return self.predict(self.elastic.smallest())

    @cached_property
    def smallest_adaptive_ms(self) -> float:
        """Predicted time of the smallest network where every token chooses; at least `smallest_ms`."""
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

    @property
    def error(self) -> float:
        """The share by which predictions may be wrong, as far as the measurement itself tells."""
        residual = self.residual_worst if self.held_out else 0.0
        return max(residual, self.noise.worst if self.noise else 0.0)

    @property
    def doubt(self) -> str | None:
        """Why predictions may be wrong by more than 10 %, in one sentence; None where they are not."""
        if self.error <= DOUBTFUL:
            return None
        what = (
            f"the latency table of {self.workload} on {self.machine_name} must be within {DOUBTFUL:.0%}, got"
        )
        if self.noise is not None and self.noise.worst > DOUBTFUL:
            return f"{what} one that was measured while {self.noise.fault}"
        return f"{what} an error of {self.residual_worst:.0%} on a network that it was not fitted on"

    def expected(self, *p: Tensor, adaptive: bool = False) -> Tensor:
        """Expected milliseconds under choice probabilities, differentiable in them.

        Args:
            p: [..., L, C] of each axis.
            adaptive: a router chooses for every token.

        Returns:
            [...]
        """
        base, slope = self._line(adaptive)
        sums = [(own * costs.to(own)).sum((-2, -1)) for own, costs in zip(p, self._tensors, strict=True)]
        return base + slope * torch.stack(sums).sum(0)

    def predict(self, widths: Widths, adaptive: bool = False) -> float:
        """Milliseconds of a configuration; with ``adaptive``, of one that a router chooses for every token."""
        base, slope = self._line(adaptive)
        return base + slope * self.layer_sum(widths)

    def layer_sum(self, widths: Widths) -> float:
        """The costs of a configuration's choices, added up over layers and axes."""
        total = 0.0
        for rows, places in zip(self.by_axis, self.elastic.indices(widths), strict=True):
            total += sum(row[place] for row, place in zip(rows, places, strict=True))
        return total

    def of_tokens(self, choices: Indices) -> Tensor:
        """Milliseconds of forwards in which every token has choices of its own, ``mlp``, ``heads`` [..., B, T, L].

        A prefill is bound by arithmetic: it takes the mean over its B * T tokens. A decode step of ``batch``
        sequences is bound by the weights that it reads, up to the widest of its tokens: the mean over the steps
        of the maximum over the sequences, in each layer. (B is then a multiple of the workload's batch.)
        """
        if self.workload.phase == "decode" and self.workload.batch > 1:
            batch = self.workload.batch
            choices = Indices(*(axis.unflatten(-3, (-1, batch)).amax(-3) for axis in choices))
        layers = torch.arange(self.num_layers, device=choices.mlp.device)
        sums = [
            costs.to(rows.device)[layers, rows].sum(-1)
            for costs, rows in zip(self._tensors, choices, strict=True)
        ]
        base, slope = self._line(adaptive=True)
        return (base + slope * torch.stack(sums).sum(0)).mean((-2, -1))

    def fraction(self, widths: Widths, adaptive: bool = False) -> float:
        """The configuration's time divided by the full model's."""
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
        """The costs that routers and calibrations rest on, as they are stored with them."""
        return {
            **{name: list(costs[0]) for name, costs in zip(AXES, self.by_axis, strict=True)},
            "base": self.base,
            "slope": self.slope,
        }

    def differs(self, machine: Machine) -> list[str]:
        """One phrase for each fact of ``machine`` (see `machine_of`) that was another when the table was measured."""
        return [
            f"the {self.workload.phase} table was measured with {fact} {self.machine[fact]!r}, "
            f"now it is {machine[fact]!r}"
            for fact in sorted(self.machine.keys() & machine.keys())
            if self.machine[fact] != machine[fact]
        ]

    def to_dict(self) -> dict[str, Any]:
        values = {**self.unknown, **asdict(self), "elastic": self.elastic.to_dict()}
        del values["unknown"]
        values["residual_median"] = self.residual_median if self.held_out else None
        values["residual_worst"] = self.residual_worst if self.held_out else None
        return values

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], path: str | Path = "latency table", place: str = ""
    ) -> LatencyTable:
        """Read what `to_dict` returned; CheckpointError says what is wrong in ``path``."""
        made = {f.name for f in fields(cls)} - {"unknown"}
        known = {name: value for name, value in values.items() if name in made}
        unknown = {
            name: value
            for name, value in values.items()
            if name not in made | {"residual_median", "residual_worst"}
        }
        table = build(cls, {**known, "unknown": unknown}, path, place)
        for axis in table.elastic.axes:
            menu = axis.menu
            for name in (axis.name, f"raw_{axis.name}"):
                rows = getattr(table, name)
                shape = len(rows) == table.elastic.num_layers and all(len(row) == len(menu) for row in rows)
                if not shape or (name == axis.name and any(list(row) != sorted(row) for row in rows)):
                    raise CheckpointError(
                        f"{path}: {place}.{name} must be a cost for each of {table.elastic.num_layers} layers and "
                        f"{len(menu)} choices, which never falls, got another"
                    )
        if table.full_ms <= 0:
            raise CheckpointError(f"{path}: {place} must predict a time above 0, got {table.full_ms:g}")
        if any(c.measured <= 0 for c in (*table.fitted, *table.held_out)):
            raise CheckpointError(f"{path}: {place} must have measured times above 0, got others")
        return table
