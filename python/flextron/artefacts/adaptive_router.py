"""The adaptive router of a checkpoint: how it was trained, its calibration, what was reported, and its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, get_type_hints

from flextron.artefacts.latency_table import LatencyTable
from flextron.artefacts.reports import FitReport, GateReport
from flextron.checkpoint.files import Files, opened
from flextron.checkpoint.format import FORMAT, CheckpointError, check_format
from flextron.checkpoint.io import save_tensors, write_json
from flextron.checkpoint.origin import KEY, Origin, fits
from flextron.checkpoint.schema import build, checking
from flextron.checkpoint.transaction import commit
from flextron.nn.router import AdaptiveRouter
from flextron.recipes import AdaptiveConfig

FILES = TENSORS, DESCRIPTION = "adaptive.safetensors", "adaptive.json"

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
class AdaptiveResult:
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
        """Everything but the router's weights."""
        r = self.router
        sizes = ("num_layers", "hidden_size", "mlp_choices", "head_choices", "hidden")
        return {
            "format": FORMAT,
            "router": {name: getattr(r, name) for name in sizes} | {"targets": list(r.targets)},
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

    def save(self, directory: str | Path, origin: Origin) -> None:
        """Write ``adaptive.safetensors`` and ``adaptive.json`` into an elastic checkpoint, both or neither."""
        with commit(directory) as stage:
            self.write(stage, origin)

    def write(self, folder: Path, origin: Origin) -> None:
        """Write both files; ``origin`` is the model that they were made for."""
        checksum = save_tensors(folder / TENSORS, self.router.state_dict())
        write_json(folder / DESCRIPTION, {**self.to_dict(), KEY: origin.to_dict(), "checksum": checksum})

    @classmethod
    def load(cls, directory: str | Path | Files) -> AdaptiveResult:
        """Read a stored router; CheckpointError says in one sentence what is wrong with which file."""
        with opened(directory) as files:
            path, values = files / DESCRIPTION, files.read_json(DESCRIPTION)
            check_format(values, path)
            size = build(_Size, values.get("router"), path, "router")
            weights = sum(map(prod, files.shapes(TENSORS).values()))
            if not all(
                1 <= n <= weights for n in (size.num_layers, size.hidden_size, size.hidden, size.parameters)
            ):
                raise CheckpointError(f"{path}: router must fit the weights, got {size}")
            with checking(path):
                router = AdaptiveRouter(**asdict(size))
            checksum = build(str, values.get("checksum"), path, "checksum")
            router.load_state_dict(files.load_tensors(TENSORS, router.state_dict(), checksum))
        router.calibration = build(dict[str, Grid], values.get("calibration"), path, "calibration")
        for phase, (grid, offsets) in router.calibration.items():
            if len(grid) != len(offsets) or len(grid) < 2 or any(a >= b for a, b in pairwise(grid)):
                raise CheckpointError(
                    f"{path}: calibration.{phase} must be ascending fractions and an offset for each, got others"
                )
        hints = get_type_hints(cls)
        # older checkpoints, from before the form could be chosen, have neither surrogate nor gate
        stored = {
            f.name: build(hints[f.name], values.get(f.name), path, f.name)
            for f in fields(cls)
            if f.name != "router"
        }
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
    def parameters(self) -> int:
        """A lower bound on the number of weights, by which a damaged shape is found."""
        return self.num_layers * self.hidden * max(self.hidden_size, self.mlp_choices + self.head_choices)


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
