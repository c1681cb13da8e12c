"""How far to trust routers that learned from a surrogate: its fit, and the steps that its gate let pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FitReport:
    """How well a surrogate predicts what it was not trained on; losses are nats above the full model's.

    Attributes:
        n: configurations judged.
        r2: share of the variance explained.
        rank: Spearman's rank correlation.
        mean_error, worst_error: mean and largest |predicted - observed|.
        worst_fraction: latency fraction of the configuration with the worst error.
        predicted, observed, fractions: loss predicted and observed, and latency fraction, of each configuration.
    """

    n: int
    r2: float
    rank: float
    mean_error: float
    worst_error: float
    worst_fraction: float
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    fractions: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("predicted", "observed", "fractions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GateReport:
    """The steps that the surrogate's gate let pass; the error is a moving average over configurations new to it.

    Attributes:
        threshold: nats.
        error: the moving average at the end.
        steps_below: router steps taken while the error was below the threshold; without a surrogate in the way, all.
        steps_above: router steps taken above it, when the evaluations for waiting had been spent.
        waited: evaluations spent waiting.
    """

    threshold: float
    error: float
    steps_below: int
    steps_above: int
    waited: int

    @property
    def passed(self) -> bool:
        """Whether every step of the routers was taken below the threshold."""
        return self.steps_above == 0
