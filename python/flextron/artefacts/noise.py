"""How far other programs, and drift, disturbed a measurement of time; and what a reader must be told of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DOUBTFUL = 0.1  # share by which a time may be wrong before it is called so


@dataclass(frozen=True)
class Noise:
    """What else happened while times were measured.

    Attributes:
        taken: share of the processors that are measured which other programs took, 0 where they left enough; None
            where the system does not tell.
        drift: by what share the same work took longer, or less long, at the end than at the beginning.
        spread: distance between the quartiles of the times of the same work, as a share of their median.
    """

    taken: float | None
    drift: float
    spread: float

    @property
    def worst(self) -> float:
        """The share by which the measured times may all be wrong together; what differs from sample to sample is not
        in it, since a median is taken."""
        return max(self.taken or 0.0, self.drift)

    @property
    def fault(self) -> str | None:
        """What disturbed the measurement, in words; None where nothing did to speak of."""
        if (self.taken or 0.0) > DOUBTFUL:
            return f"other programs took {self.taken:.0%} of the processors that were measured"
        if self.drift > DOUBTFUL:
            return f"the same work took {self.drift:.0%} more or less at the end than at the beginning"
        if self.spread > 2 * DOUBTFUL:
            return f"the times of the same work spread by {self.spread:.0%}"
        return None

    @property
    def sentence(self) -> str | None:
        """What stands under times that mean nothing; None where they do."""
        return self.fault and f"The machine was too busy for these times to mean anything: {self.fault}."

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
