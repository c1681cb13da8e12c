"""The ladder: a nested chain of sub-networks, smallest to full, from which a budget picks one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flextron.config import AXES, MENUS, ElasticConfig, PerAxis, Widths
from flextron.nn.router import StaticRouter

_GOLDEN = (5**0.5 - 1) / 2
_GRID = 201  # targets at which a router is read; its logits are lines between trained targets

Upgrade = tuple[str, int]  # (axis, layer): this layer's axis goes to its next choice


@dataclass(frozen=True)
class Ladder:
    """A chain of sub-networks: each takes one axis of one layer to its next choice.

    Every rung covers those below, so whatever grows with width grows along the ladder, and the highest rung
    within a budget is a function of the budget that never falls.

    Attributes:
        mlp_choices, head_choices: the menus.
        num_layers: number of layers, L.
        upgrades: the steps from the smallest network to the full one, in order.
        origin: what made it: ``"router"`` or ``"uniform"``.
    """

    mlp_choices: tuple[int, ...]
    head_choices: tuple[int, ...]
    num_layers: int
    upgrades: tuple[Upgrade, ...]
    origin: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "upgrades", tuple((str(axis), int(layer)) for axis, layer in self.upgrades))
        steps = self.num_layers * sum(len(menu) - 1 for menu in self.menus)
        if len(self.upgrades) != steps or sorted(self.upgrades) != sorted(self._all_upgrades()):
            raise ValueError(
                f"Ladder: upgrades must take each of {self.num_layers} layers from its smallest to its full "
                f"choice, got {len(self.upgrades)} that do not"
            )

    @property
    def menus(self) -> PerAxis[tuple[int, ...]]:
        return PerAxis(*(getattr(self, name) for name in MENUS))

    def _all_upgrades(self) -> list[Upgrade]:
        return [
            (axis, layer)
            for axis, menu in zip(AXES, self.menus, strict=True)
            for layer in range(self.num_layers)
            for _ in menu[1:]
        ]

    @cached_property
    def rungs(self) -> tuple[Widths, ...]:
        """All sub-networks, the smallest first, the full one last."""
        index = {axis: [0] * self.num_layers for axis in AXES}
        found = [self._widths(index)]
        for axis, layer in self.upgrades:
            index[axis][layer] += 1
            found.append(self._widths(index))
        return tuple(found)

    def _widths(self, index: dict[str, list[int]]) -> Widths:
        return Widths(
            *(tuple(menu[i] for i in index[axis]) for axis, menu in zip(AXES, self.menus, strict=True))
        )

    def highest(self, cost: Callable[[Widths], float], limit: float) -> Widths | None:
        """The highest rung whose cost is within the limit (and rounding); None when the lowest is not.

        ``cost`` must not fall as widths grow.
        """
        limit += 1e-9 * abs(limit)
        # rungs[low] is within the limit, or low is -1; no rung above high is
        low, high = -1, len(self.rungs) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(self.rungs[middle]) <= limit else (low, middle - 1)
        return self.rungs[low] if low >= 0 else None

    def within(self, cost: Callable[[Widths], float], limit: float) -> Widths:
        """`highest`, where the lowest rung is known to be within the limit."""
        rung = self.highest(cost, limit)
        if rung is None:
            least = cost(self.rungs[0])
            raise ValueError(f"ladder: its lowest rung must be within the limit {limit:g}, got {least:g}")
        return rung

    def check(self, config: ElasticConfig) -> None:
        """Raise ValueError unless the ladder is about this model's menus."""
        mine = (self.num_layers, *self.menus)
        theirs = (config.num_layers, *config.menus)
        if mine != theirs:
            raise ValueError(
                f"ladder: layers and menus must be those of the model {theirs}, got {mine}; "
                "run `flextron route DIR` again"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: list(menu) for name, menu in zip(MENUS, self.menus, strict=True)},
            "num_layers": self.num_layers,
            "upgrades": [list(upgrade) for upgrade in self.upgrades],
            "origin": self.origin,
        }


def uniform_ladder(config: ElasticConfig) -> Ladder:
    """Upgrade all layers evenly, all axes at the same pace: the ladder of a model without routers.

    Layers take turns by multiples of the golden ratio, so that at every rung the wider ones are
    spread over the depth.
    """
    # layer -> its place in the order
    turn = sorted(range(config.num_layers), key=lambda k: (k + 1) * _GOLDEN % 1)
    order: list[tuple[float, str, int]] = []
    for axis in config.axes:
        steps = len(axis.menu) - 1
        for choice in range(steps):
            order += [
                ((choice + (turn[n] + 0.5) / config.num_layers) / steps, axis.name, n)
                for n in range(config.num_layers)
            ]
    return _ladder(config, [(axis, layer) for _, axis, layer in sorted(order)], "uniform")


def router_ladder(config: ElasticConfig, router: StaticRouter) -> Ladder:
    """Read a router out as a ladder: deterministic, and nested by construction.

    The arg-max choices are taken at a fine grid of targets, with a running maximum, so that no layer shrinks
    as the target grows. Upgrades are ordered by the target at which they first appear; among those that
    appear together, the one the router prefers more (its logit margin) comes first, then the lower layer.
    """
    grid = torch.linspace(router.targets[0], 1.0, _GRID)
    with torch.no_grad():
        logits = router(grid)
    order = []
    for axis, rows in zip(AXES, logits, strict=True):
        reached = rows.argmax(-1).cummax(0).values  # [grid, L]
        reached[-1] = rows.shape[-1] - 1  # the full model at 1
        for layer in range(config.num_layers):
            for choice in range(1, rows.shape[-1]):
                first = int((reached[:, layer] < choice).sum())
                margin = _margin(rows[first, layer], choice)
                # `margin` never grows with the choice, and the choice breaks its ties: the order within a
                # layer holds
                order.append((first, -margin, choice, layer, axis))
    return _ladder(config, [(axis, layer) for *_, layer, axis in sorted(order)], "router")


def _margin(logits: Tensor, choice: int) -> float:
    """By how much the best of ``choice`` and above exceeds the best of the smaller choices."""
    return float(logits[choice:].max() - logits[:choice].max())


def _ladder(config: ElasticConfig, upgrades: Sequence[Upgrade], origin: str) -> Ladder:
    return Ladder(*config.menus, config.num_layers, tuple(upgrades), origin)
