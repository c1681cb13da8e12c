"""What a server offers: budgets that requests carry become widths, by the tables and the ladder of the checkpoint.

Knows nothing of vLLM: its plugin and its middleware call this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from flextron.artefacts.directory import ElasticDirectory
from flextron.artefacts.machine import Machine, machine_on
from flextron.artefacts.planner import Planner
from flextron.config import ElasticConfig, Widths, number
from flextron.serving.pace import Cost, Pace

FIELDS = ("budget", "latency_ms", "deadline_ms")  # of a request, of which it has at most one
_STEPS = 20  # of the list of budgets


@dataclass(frozen=True)
class Offer:
    """The budgets of one server.

    Attributes:
        planner: of the checkpoint, on the machine that serves it.
        own: the server's one budget, as the fields of a request; empty where every request has its own.
    """

    planner: Planner
    own: Mapping[str, float]

    @classmethod
    def read(
        cls,
        directory: str | Path,
        own: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        machine: Machine | None = None,
    ) -> Offer:
        """The offer of an elastic checkpoint.

        Args:
            directory: the checkpoint's.
            own: the server's one budget, or empty.
            dtype, device: of the weights in memory, which make the machine.
            machine: the machine itself, where another process found it.

        Raises:
            CheckpointError: what is wrong with the directory.
            ValueError: ``own`` is no budget, or an impossible one.
        """
        with ElasticDirectory.open(directory) as checkpoint:
            planner = checkpoint.planner(machine or machine_on(device, dtype))
        offer = cls(planner, {})
        given = budget_of(own)
        if "deadline_ms" in given:
            raise ValueError("serve: a server's budget must be budget or latency_ms, got deadline_ms")
        offer.widths(given)
        return replace(offer, own=given)

    @property
    def config(self) -> ElasticConfig:
        return self.planner.config

    @cached_property
    def widest(self) -> Widths:
        """The widest network that a request may get."""
        return self._of(self.own)

    def widths(self, request: Mapping[str, Any]) -> Widths:
        """The widths of one request; without a budget of its own, the server's, or the full model.

        With a deadline it is the full model: the widths change from step to step, and are at most these.

        Args:
            request: its fields, others than `FIELDS` are passed over.

        Raises:
            ValueError: what is wrong with the budget, in one sentence, or that the server has another.
        """
        given = budget_of(request)
        if self.own and given not in ({}, self.own):
            raise ValueError(
                f"budget: must be the server's own, {_told(self.own)}, or not be given, got {_told(given)}"
            )
        return self._of(given or self.own)

    def _of(self, given: Mapping[str, float]) -> Widths:
        if not given:
            return self.config.full()
        ((name, value),) = given.items()
        if name == "budget":
            return self.config.full() if value == 1 else self.planner.resolve(fraction=value)
        if name == "latency_ms":
            return self.planner.resolve(latency_ms=value, phase="decode")
        self.cost(self.config.smallest())  # there must be tables
        return self.config.full()

    def cost(self, widths: Widths) -> Cost:
        """What one request alone takes, by the tables.

        Raises:
            ValueError: it was never measured.
        """
        prefill, decode = self.planner.table("prefill"), self.planner.table("decode")
        prompt = prefill.workload.batch * prefill.workload.length
        return Cost(prefill.predict(widths) / prompt, decode.predict(widths))

    def pace(self) -> Pace | None:
        """What holds deadlines; None where nothing was measured."""
        try:
            rungs = [(widths, self.cost(widths)) for widths in self.planner.ladder.rungs]
        except ValueError:
            return None
        return Pace(rungs, cache(self.cost))

    def listed(self) -> list[dict[str, float]]:
        """Budgets that a request may name, the smallest first, each with what is known of its network.

        Without latency tables a budget is a share of nothing, and only the full model is offered.
        """
        shares = [i / _STEPS for i in range(1, _STEPS + 1)]
        if self.own:
            shares = [self.own["budget"]] if "budget" in self.own else []
        found: list[dict[str, float]] = []
        last = None
        for share in shares:
            try:
                widths = self._of({"budget": share})
            except ValueError:
                continue
            if widths != last:
                found.append({"budget": share, **self._known(widths)})
            last = widths
        return found or [{**self.own, **self._known(self.widest)}]

    def _known(self, widths: Widths) -> dict[str, float]:
        known: dict[str, float] = {"params": self.config.params(widths)}
        with contextlib.suppress(ValueError):  # where it was not profiled here
            known["latency_ms"] = round(self.planner.predict(widths, "decode"), 4)
        return known


def budget_of(request: Mapping[str, Any]) -> dict[str, float]:
    """The one budget among a request's fields; empty where it has none.

    Raises:
        ValueError: it has several, or one that is no positive number.
    """
    given = {name: request[name] for name in FIELDS if request.get(name) is not None}
    if len(given) > 1:
        raise ValueError(
            f"budget: a request must have at most one of {', '.join(FIELDS)}, got {', '.join(given)}"
        )
    for name, value in given.items():
        given[name] = float(number(f"budget: {name}", value))
        if not 0 < given[name] < float("inf") or (name == "budget" and given[name] > 1):
            bound = "in (0, 1]" if name == "budget" else "a positive number"
            raise ValueError(f"budget: {name} must be {bound}, got {value!r}")
    return given


def _told(given: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in given.items())
