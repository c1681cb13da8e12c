"""The static routers of a checkpoint: how they were trained, their ladder, what was reported, and their files."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flextron.artefacts.ladder import Ladder
from flextron.artefacts.latency_table import LatencyTable
from flextron.artefacts.reports import FitReport, GateReport
from flextron.artefacts.router_files import RouterFiles
from flextron.checkpoint.files import Files, opened
from flextron.checkpoint.format import FORMAT, CheckpointError, check_format
from flextron.checkpoint.origin import Origin, fits
from flextron.checkpoint.schema import build, checking
from flextron.config import Widths
from flextron.nn.router import StaticRouter
from flextron.recipes import RouteConfig

DESCRIPTION = "routers.json"
FILES = "routers.safetensors", DESCRIPTION


@dataclass(frozen=True)
class TargetReport:
    """One trained target at the end; losses in nats above the full model's.

    They are divergences from what the full model predicts; with the form ``gumbel`` differences of the loss.

    Attributes:
        target: fraction of the full latency.
        choice_fraction: predicted fraction of the router's arg-max choice.
        rung_fraction: predicted fraction of the ladder's rung for the target.
        distance: steps (choices of layers) by which the two differ.
        choice_loss, routed_loss, uniform_loss, search_loss: predicted for the router's choice, the routed
            ladder, the uniform ladder and plain search.
        routed_observed, uniform_observed, search_observed: losses that the model itself has at those three.
        search_widths: the sub-network that search found.
    """

    target: float
    choice_fraction: float
    rung_fraction: float
    distance: int
    choice_loss: float
    routed_loss: float
    uniform_loss: float
    search_loss: float
    routed_observed: float
    uniform_observed: float
    search_observed: float
    search_widths: Widths


@dataclass(frozen=True)
class RouterResult(RouterFiles):
    """Trained static routers, the ladder that budgets use, and the report of the training.

    Attributes:
        router: arg-max without noise is its choice.
        ladder: the readout that budgets use.
        surrogate: fit on configurations that were never trained on.
        gate: when the routers moved.
        targets: comparison at every trained target below 1.
        dropped_targets: asked for, but faster than the fastest network.
        evaluations: calls of the LLM's loss.
        history: one entry for about every fiftieth step.
        config: settings of the training.
        phase: the phase whose latency the targets are fractions of.
        costs: ``LatencyTable.costs`` of the table that they were trained on.
    """

    FILES = FILES
    router: StaticRouter
    ladder: Ladder
    surrogate: FitReport
    gate: GateReport
    targets: tuple[TargetReport, ...]
    dropped_targets: tuple[float, ...]
    evaluations: int
    history: tuple[dict[str, float], ...]
    config: RouteConfig
    phase: str
    costs: dict[str, Any]

    @property
    def measure(self) -> str:
        """What the numbers of `targets` and of the surrogate are, in words."""
        loss = self.config.form == "gumbel"
        return "loss above the full model's" if loss else "divergence from the full model"

    def to_dict(self) -> dict[str, Any]:
        r = self.router
        return {
            "format": FORMAT,
            "router": {"targets": list(r.targets), "hidden": r.hidden},
            "ladder": self.ladder.to_dict(),
            "surrogate": self.surrogate.to_dict(),
            "gate": asdict(self.gate),
            "targets": [asdict(t) for t in self.targets],
            "dropped_targets": list(self.dropped_targets),
            "evaluations": self.evaluations,
            "history": list(self.history),
            "config": self.config.to_dict(),
            "phase": self.phase,
            "costs": self.costs,
        }

    @classmethod
    def load(cls, directory: str | Path | Files) -> RouterResult:
        """Read stored routers; CheckpointError says in one sentence what is wrong with which file."""
        with opened(directory) as files:
            path, values = _read(files)
            ladder = build(Ladder, values.get("ladder"), path, "ladder")
            size = build(_Size, values.get("router"), path, "router")
            counts = [len(menu) for menu in ladder.menus]
            weights = cls.weights(files)
            if not 1 <= size.hidden <= weights or ladder.num_layers > weights:
                raise CheckpointError(f"{path}: router.hidden must fit the weights, got {size.hidden}")
            with checking(path):
                router = StaticRouter(ladder.num_layers, counts, size.targets, size.hidden)
            cls.load_weights(router, files, values)
        return cls(router=router, ladder=ladder, **cls.read_fields(values, path, but=("router", "ladder")))


@dataclass(frozen=True)
class _Size:
    """The router's shape in ``routers.json``."""

    targets: tuple[float, ...]
    hidden: int


def load(directory: str | Path | Files, origin: Origin) -> RouterResult | None:
    """The routers of an elastic checkpoint that were made for its weights; others are left out, with a warning."""
    with opened(directory) as files:
        return RouterResult.load(files) if _stored(files, origin) else None


def load_ladder(
    directory: str | Path | Files, origin: Origin, tables: Iterable[LatencyTable] | None = None
) -> Ladder | None:
    """The routed ladder of an elastic checkpoint; None when no routers were trained for its weights.

    Where ``tables`` are given and it rests on none of them, a warning says so: budgets are met by the new ones.
    """
    with opened(directory) as files:
        if not _stored(files, origin):
            return None
        path, values = _read(files)
        ladder = build(Ladder, values.get("ladder"), path, "ladder")
        phase = build(str, values.get("phase"), path, "phase")
        if tables is not None and trained_on(tables, phase, values.get("costs")) is None:
            warnings.warn(
                f"{path}: was trained on another latency table of {phase} than those here; "
                f"run `flextron route {files.directory}`",
                stacklevel=3,
            )
    return ladder


def trained_on(tables: Iterable[LatencyTable], phase: str, costs: Any) -> LatencyTable | None:
    """The table, of whatever machine, that routers with these costs were trained on; None where it is gone."""
    return next((t for t in tables if t.workload.phase == phase and t.costs == costs), None)


def _stored(files: Files, origin: Origin) -> bool:
    return fits(files, DESCRIPTION, origin, f"flextron route {files.directory}")


def _read(files: Files) -> tuple[Path, dict[str, Any]]:
    """The path and contents of ``routers.json``."""
    path, values = files / DESCRIPTION, files.read_json(DESCRIPTION)
    check_format(values, path)
    return path, values
