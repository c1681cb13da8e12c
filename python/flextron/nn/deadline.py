"""A deadline that holds: steps are measured as they run, and the next ones take the rung that keeps within it.

A latency table says what a step takes on a machine that has nothing else to do. The controller learns from the last
steps how much slower the machine is now, and moves along the ladder; never below a floor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flextron.config import Widths
from flextron.nn.policy import Dial

if TYPE_CHECKING:
    from flextron.nn.protocol import Elastic

WINDOW = 16  # steps that are looked back on
SPARE = (
    0.05  # share of the limit that a higher rung must leave, so that a step's jitter does not undo it at once
)
_LONGEST = 256  # steps to wait at most after climbs that failed
_LATE = 2  # steps that a GPU may have been given beyond the one whose end the host waits for

Clock = Callable[[], float]  # seconds


def slowdown_of(last: Sequence[float]) -> float:
    """The second largest of the last steps' slowdowns: one outlier moves nothing; 1 where too few have been seen."""
    return sorted(last)[-2] if len(last) > 1 else 1.0


class Controller:
    """Which rung keeps a step within a limit, by what the last steps took. It knows no clock and no model.

    A step's slowdown is its time over the table's. The second largest of the last 16 counts: one outlier moves
    nothing, two slow steps do, and 15 of 16 steps are meant to be in time. The rung falls as soon as its own time by
    that slowdown is beyond the limit. It rises when a higher one's leaves 5 % of the limit, and 16 steps after the
    last rise at the earliest. A rise that is taken back within that wait doubles it.

    Args:
        predicted: milliseconds of a step at each rung by the table, never falling.
        lowest: the rung that is kept whatever a step takes.
        slowdowns: those of steps before, the oldest first.
    """

    def __init__(
        self,
        predicted: Sequence[float],
        lowest: int = 0,
        slowdowns: Iterable[float] = (),
        wait: int = WINDOW,
    ) -> None:
        self.predicted, self.lowest, self.rung = tuple(predicted), lowest, lowest
        self.slowdowns = deque(slowdowns, maxlen=WINDOW)
        self.wait = wait
        self._since, self._rose = inf, False  # steps since the last move, and whether that was a rise

    @property
    def slowdown(self) -> float:
        """How many times the table's milliseconds a step takes now; 1 where too few steps have been seen."""
        return slowdown_of(self.slowdowns)

    def begin(self, limit: float) -> int:
        """The first step's rung: the highest whose time is within ``limit`` milliseconds."""
        self.rung, self._since, self._rose = self._highest(limit), inf, False
        return self.rung

    def step(self, rung: int, ms: float, limit: float) -> int:
        """The next step's rung, after one at ``rung`` took ``ms``; ``limit`` milliseconds are for the next one."""
        self.slowdowns.append(ms / self.predicted[rung])
        self._since += 1
        if self._ms(self.rung) > limit:
            if self._rose:
                self.wait = min(2 * self.wait, _LONGEST) if self._since <= self.wait else WINDOW
            self.rung, self._since, self._rose = self._highest(limit), 0, False
        elif self._since >= self.wait and len(self.slowdowns) == WINDOW:
            higher = self._highest((1 - SPARE) * limit)
            if higher > self.rung:
                self.rung, self._since, self._rose = higher, 0, True
        return self.rung

    def _ms(self, rung: int) -> float:
        return self.predicted[rung] * self.slowdown

    def _highest(self, limit: float) -> int:
        within = (i for i in reversed(range(self.lowest, len(self.predicted))) if self._ms(i) <= limit)
        return next(within, self.lowest)


class HeldToken(NamedTuple):
    """One token of a generation that was held to a deadline.

    Attributes:
        widths: the sub-network that gave it.
        fraction: of the full model's latency, by the table.
        ms: what its step took; None for the first token, which the prompt's forward gives, and where nothing waited
            for the end.
    """

    widths: Widths
    fraction: float
    ms: float | None


@dataclass
class Held:
    """A generation that was held to a deadline: the budget of every token, for all sequences of the batch together.

    Attributes:
        tokens: in the order in which they were made.
        latency_ms: the limit of each step, or None.
        deadline_ms: the limit of the whole generation, or None.
        total_ms: from the call to the last token.
    """

    latency_ms: float | None
    deadline_ms: float | None
    tokens: list[HeldToken] = field(default_factory=list)
    total_ms: float = 0.0

    @property
    def within(self) -> float:
        """The share of the measured steps that kept to ``latency_ms``; of a whole generation, 1 or 0."""
        if self.deadline_ms is not None:
            return float(self.total_ms <= self.deadline_ms)
        assert self.latency_ms is not None
        times = [token.ms for token in self.tokens if token.ms is not None]
        return sum(ms <= self.latency_ms for ms in times) / len(times) if times else 1.0

    @property
    def fraction(self) -> float:
        """Mean over the tokens."""
        return sum(token.fraction for token in self.tokens) / len(self.tokens) if self.tokens else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "latency_ms": self.latency_ms,
            "deadline_ms": self.deadline_ms,
            "total_ms": self.total_ms,
            "within": self.within,
            "fraction": self.fraction,
            "budgets": [token.fraction for token in self.tokens],
            "ms": [token.ms for token in self.tokens],
        }


class Hold:
    """A deadline that a model is set to.

    Args:
        rungs: sub-networks, each covering the one before, with the milliseconds of a step by the table.
        lowest: the place of the floor among them.
        latency_ms: the limit of each step; or
        deadline_ms: the limit of a whole generation, counted from the making of this object.
        clock: seconds on the host.
    """

    def __init__(
        self,
        rungs: Sequence[tuple[Widths, float]],
        lowest: int,
        *,
        latency_ms: float | None = None,
        deadline_ms: float | None = None,
        clock: Clock = perf_counter,
    ) -> None:
        self.widths = [widths for widths, _ in rungs]
        self.predicted = [ms for _, ms in rungs]
        self.lowest, self.latency_ms, self.deadline_ms, self.clock = lowest, latency_ms, deadline_ms, clock
        self.began = clock()
        self.slowdowns: list[float] = []  # of the last generation's last steps
        self.wait = WINDOW

    def dial(self, rung: int) -> Dial:
        """The dial at a rung: all groups are cached, since the budget may rise again."""
        return Dial((self.widths[rung],), "all", hold=self)

    def controller(self) -> Controller:
        """A controller that begins with what the last generation has seen."""
        return Controller(self.predicted, self.lowest, self.slowdowns, self.wait)


class Holding:
    """One generation that is held to a deadline: turns the model between its steps, and keeps the record.

    Another budget that is set between two tokens ends it, and the record.

    Args:
        model: set to a dial with a `Hold`.
        tokens: how many will be made at most.
    """

    def __init__(self, model: Elastic, hold: Hold, tokens: int) -> None:
        self.model, self.hold, self.left = model, hold, tokens
        self.controller = hold.controller()
        self.watch = _watch_of(model.device, hold.clock)
        self.rungs: list[int] = []  # of every token
        self.times: list[float] = []  # of every step but the prompt's
        self.began = hold.clock() if hold.deadline_ms is None else hold.began
        self._turn(self.controller.begin(self._limit()))

    def prompt(self) -> None:
        """The prompt's forward has given the first token."""
        self._launched()
        if self.hold.deadline_ms is not None:
            self._turn(self.controller.begin(self._limit()))

    @property
    def holds(self) -> bool:
        """Whether the model is still set to this deadline."""
        return self.model.dial.hold is self.hold

    def start(self) -> None:
        """A step begins."""
        self.watch.start()

    def stop(self) -> None:
        """A step was launched; where the host has seen it, or an earlier one, end, the next may be another network."""
        if not self.holds:
            return
        self.watch.stop()
        self._launched()
        for ms in self.watch.ended(_LATE):
            rung = self.controller.step(self.rungs[1 + len(self.times)], ms, self._limit())
            self.times.append(ms)
            self._turn(rung)

    def forget(self, steps: int) -> None:
        """The last steps came after the end of every sequence."""
        if steps and self.holds:
            del self.rungs[-steps:]
            del self.times[max(0, len(self.rungs) - 1) :]
            self.watch.forget(steps)
            self.left += steps

    def record(self) -> Held:
        """What was held; the next generation begins with what this one has learnt."""
        hold, full = self.hold, self.hold.predicted[-1]
        hold.slowdowns, hold.wait = list(self.controller.slowdowns), self.controller.wait
        times = [None, *self.times, *[None] * len(self.rungs)]
        tokens = [
            HeldToken(hold.widths[rung], hold.predicted[rung] / full, ms)
            for rung, ms in zip(self.rungs, times, strict=False)
        ]
        return Held(hold.latency_ms, hold.deadline_ms, tokens, 1e3 * (hold.clock() - self.began))

    def _launched(self) -> None:
        self.rungs.append(self.controller.rung)
        self.left -= 1

    def _limit(self) -> float:
        """Milliseconds that the next step may take."""
        if self.hold.deadline_ms is None:
            assert self.hold.latency_ms is not None
            return self.hold.latency_ms
        gone = 1e3 * (self.hold.clock() - self.began)
        return (1 - SPARE) * (self.hold.deadline_ms - gone) / max(self.left, 1)

    def _turn(self, rung: int) -> None:
        if self.model.dial.widths != (self.hold.widths[rung],):
            self.model.turn(self.hold.dial(rung))


class _HostWatch:
    """The times of steps that have ended when the host goes on."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._times: list[float] = []

    def start(self) -> None:
        self._begun = self.clock()

    def stop(self) -> None:
        self._times.append(1e3 * (self.clock() - self._begun))

    def ended(self, late: int) -> list[float]:
        """The milliseconds of each step that has ended since the last call."""
        times, self._times = self._times, []
        return times

    def forget(self, steps: int) -> None:
        pass


class _DeviceWatch:
    """The times of steps on a GPU, between two events on its stream; the host reads them when they are there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: deque[tuple[Any, Any]] = deque()

    def start(self) -> None:
        self._begun = self._event()

    def stop(self) -> None:
        self._pending.append((self._begun, self._event()))

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def ended(self, late: int) -> list[float]:
        """The same; the host waits until at most ``late`` steps have not ended, else it would be far ahead."""
        times = []
        while self._pending and (len(self._pending) > late or self._pending[0][1].query()):
            begin, end = self._pending.popleft()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return times

    def forget(self, steps: int) -> None:
        for _ in range(min(steps, len(self._pending))):
            self._pending.pop()


def _watch_of(device: torch.device, clock: Clock) -> _HostWatch | _DeviceWatch:
    return _DeviceWatch(device) if device.type == "cuda" else _HostWatch(clock)
