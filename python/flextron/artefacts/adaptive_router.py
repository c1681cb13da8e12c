"""The adaptive router of a checkpoint: how it was trained, its calibration, what was reported, and its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flextron.artefacts.latency_table import LatencyTable
from flextron.artefacts.reports import FitReport, GateReport
from flextron.artefacts.router_files import RouterFiles
from flextron.checkpoint.files import Files, opened
from flextron.checkpoint.format import FORMAT, CheckpointError, check_format
from flextron.checkpoint.origin import Origin, fits
from flextron.checkpoint.schema import build, checking
from flextron.config import MENUS, PerAxis
from flextron.nn.router import AdaptiveRouter
from flextron.recipes import AdaptiveConfig

DESCRIPTION = "adaptive.json"
FILES = "adaptive.safetensors", DESCRIPTION

Grid = tuple[tuple[float, ...], tuple[float, ...]]  # fractions, and the offset of each


@dataclass(frozen=True)
class AdaptiveReport:
    """One trained target below 1, on sequences that nothing was trained on.

    Attributes:
        target: fraction of the full latency.
        fraction: mean over the tokens, by the table, of what the router chose.
        loss: nats.
        static_fraction, static_loss: fraction and loss of the static ladder's rung for the target.
    """

    target: float
    fraction: float
    loss: float
    static_fraction: float
    static_loss: float


@dataclass(frozen=True)
class AdaptiveResult(RouterFiles):
    """A trained adaptive router and the report of its training.

    Attributes:
        router: calibrated.
        targets: comparison at every trained target below 1.
        dropped_targets: asked for, but faster than the fastest network.
        full_loss: the full model's loss on the same sequences, nats.
        history: one entry for about every fiftieth step.
        config: settings of the training.
        phase: the phase whose latency was trained for; the calibration covers every profiled phase.
        costs: costs in the tables it is calibrated for, by phase: ``LatencyTable.costs`` and ``adaptive``.
        surrogate: fit on observations that it was never trained on; None where there was none.
        gate: when the router moved; None where there was no surrogate.
    """

    FILES = FILES
    router: AdaptiveRouter
    targets: tuple[AdaptiveReport, ...]
    dropped_targets: tuple[float, ...]
    full_loss: float
    history: tuple[dict[str, float], ...]
    config: AdaptiveConfig
    phase: str
    costs: dict[str, Any]
    surrogate: FitReport | None = None
    gate: GateReport | None = None

    def to_dict(self) -> dict[str, Any]:
        r = self.router
        sizes = ("num_layers", "hidden_size", "hidden")
        return {
            "format": FORMAT,
            "router": {name: getattr(r, name) for name in sizes}
            | dict(zip(MENUS, r.choices, strict=True))
            | {"targets": list(r.targets)},
            "calibration": {phase: [list(v) for v in grid] for phase, grid in r.calibration.items()},
            "targets": [asdict(t) for t in self.targets],
            "dropped_targets": list(self.dropped_targets),
            "full_loss": self.full_loss,
            "history": list(self.history),
            "config": {**asdict(self.config), "targets": list(self.config.targets)},
            "phase": self.phase,
            "costs": self.costs,
            "surrogate": None if self.surrogate is None else self.surrogate.to_dict(),
            "gate": None if self.gate is None else asdict(self.gate),
        }

    @classmethod
    def load(cls, directory: str | Path | Files) -> AdaptiveResult:
        """Read a stored router; CheckpointError says in one sentence what is wrong with which file."""
        with opened(directory) as files:
            path, values = files / DESCRIPTION, files.read_json(DESCRIPTION)
            check_format(values, path)
            size = build(_Size, values.get("router"), path, "router")
            weights = cls.weights(files)
            if not all(
                1 <= n <= weights for n in (size.num_layers, size.hidden_size, size.hidden, size.parameters)
            ):
                raise CheckpointError(f"{path}: router must fit the weights, got {size}")
            with checking(path):
                router = AdaptiveRouter(
                    size.num_layers, size.hidden_size, size.choices, size.targets, size.hidden
                )
            cls.load_weights(router, files, values)
        router.calibration = build(dict[str, Grid], values.get("calibration"), path, "calibration")
        for phase, (grid, offsets) in router.calibration.items():
            if len(grid) != len(offsets) or len(grid) < 2 or any(a >= b for a, b in pairwise(grid)):
                raise CheckpointError(
                    f"{path}: calibration.{phase} must be ascending fractions and an offset for each, got others"
                )
        # older checkpoints, from before the form could be chosen, have neither surrogate nor gate
        stored = cls.read_fields(values, path, but=("router",))
        return cls(router=router.requires_grad_(False), **stored)


@dataclass(frozen=True)
class _Size:
    """The router's shape in ``adaptive.json``."""

    num_layers: int
    hidden_size: int
    mlp_choices: int
    head_choices: int
    hidden: int
    targets: tuple[float, ...]

    @property
    def choices(self) -> PerAxis[int]:
        return PerAxis(*(getattr(self, name) for name in MENUS))

    @property
    def parameters(self) -> int:
        """A lower bound on the number of weights, by which a damaged shape is found."""
        return self.num_layers * self.hidden * max(self.hidden_size, sum(self.choices))


def load(directory: str | Path | Files, origin: Origin) -> AdaptiveResult | None:
    """The router of an elastic checkpoint that was made for its weights; another is left out, with a warning."""
    with opened(directory) as files:
        fitting = fits(files, DESCRIPTION, origin, f"flextron route {files.directory} --adaptive")
        return AdaptiveResult.load(files) if fitting else None


def costs_of(tables: dict[str, LatencyTable]) -> dict[str, Any]:
    """The costs that a calibration rests on, by phase, as they are stored."""
    return {
        phase: {**t.costs, "adaptive": None if t.adaptive is None else list(t.adaptive)}
        for phase, t in tables.items()
    }
