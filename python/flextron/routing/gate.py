"""How a router is optimised: steps on its loss, and a gate that holds them back while a surrogate errs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flextron.artefacts.reports import GateReport
from flextron.recipes import AdaptiveConfig, RouteConfig
from flextron.routing.sharing import add_gradients

_MEMORY = 0.9  # weight of the past in the moving average of the surrogate's error

Progress = Callable[[str, int, int], object]


def reachable(
    who: str, targets: Sequence[float], fastest: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(the targets that some network meets, those that none is fast enough for).

    Args:
        fastest: the fastest network's fraction of the full latency.

    Raises:
        ValueError: no target below 1 can be met.
    """
    kept = tuple(t for t in targets if t >= fastest)
    if len(kept) < 2:
        raise ValueError(
            f"{who}: some target below 1 must be at least {fastest:.3f}, the fastest network's "
            f"fraction of the full latency, got {list(targets)}"
        )
    return kept, tuple(t for t in targets if t < fastest)


class Gate:
    """Holds a router back while the moving average of a surrogate's error is at or above a threshold.

    The router is held back for ``patience`` observations at most; what it does afterwards is counted.

    Args:
        threshold: nats.
        patience: observations that may be spent waiting.
        guards: False where no surrogate stands between router and model: the gate is always open.
    """

    def __init__(self, threshold: float, patience: int = 0, guards: bool = True) -> None:
        self.threshold, self.patience, self.guards = threshold, patience, guards
        self.error = 0.0
        self.waited = self.steps_below = self.steps_above = 0

    def is_open(self) -> bool:
        return not self.guards or self.error < self.threshold

    def is_waiting(self) -> bool:
        return not self.is_open() and self.waited < self.patience

    def see(self, predicted: float, observed: float) -> None:
        """Take in what the surrogate predicted of something that it had not been trained on."""
        self.error = _MEMORY * self.error + (1 - _MEMORY) * abs(predicted - observed)

    def pass_step(self) -> None:
        """Count one step of the router."""
        self.steps_below += self.is_open()
        self.steps_above += not self.is_open()

    def report(self) -> GateReport:
        return GateReport(self.threshold, self.error, self.steps_below, self.steps_above, self.waited)


class RouterTraining:
    """The optimisation of one router; a subclass says what its loss is, and what it observes on the way."""

    def __init__(
        self, router: nn.Module, options: RouteConfig | AdaptiveConfig, gate: Gate, progress: Progress
    ) -> None:
        self.router, self.options, self.gate, self.progress = router, options, gate, progress
        self.history: list[dict[str, float]] = []
        self.forget()

    def forget(self) -> None:
        """Begin with an optimiser that has no moments yet."""
        self.optimiser = torch.optim.Adam(self.router.parameters(), lr=self.options.lr)

    def minimise(self, loss: Tensor) -> None:
        """Take one step of the optimiser."""
        self.optimiser.zero_grad()
        loss.backward()
        add_gradients(self.router.parameters())
        self.optimiser.step()

    def optimise(self, what: str) -> None:
        """Take all steps of the router, and write down about every fiftieth."""
        steps, step = self.options.steps, 0
        while step < steps:
            if self.waits(step):
                self.gate.waited += 1
                self.progress("waiting for the surrogate", self.gate.waited, self.gate.patience)
                continue
            self.gate.pass_step()
            loss, logged = self.loss(step)
            self.minimise(loss)
            step += 1
            logged = logged | self.after(step)
            if step % max(1, steps // 50) == 0:
                self.history.append({"step": step, **logged})
            self.progress(what, step, steps)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """What a step minimises, and what is written down of it."""
        raise NotImplementedError

    def waits(self, step: int) -> bool:
        """Whether something was observed in place of taking this step."""
        return False

    def after(self, step: int) -> dict[str, float]:
        """What is done once so many steps have been taken, and what is written down of it."""
        return {}
