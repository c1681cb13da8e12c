"""A ladder by measured steps: from the full network down, what costs the least for the time that it saves.

What a layer's narrower choice costs alone is measured, for all choices of all layers, and costs are taken to add up.
Measured anew in the networks on the way down they do not get better: there a step's divergence from the full network
goes up or down by the noise of the text, and those that happen to go down are given up first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flextron.artefacts.ladder import Ladder
from flextron.artefacts.latency_table import LatencyTable
from flextron.config import AXES, ElasticConfig, Widths

_LEAST = 1e-9  # milliseconds and nats: less is nothing


class Step(NamedTuple):
    """A layer's axis goes to a narrower choice, by its place in the menu."""

    axis: str
    layer: int
    choice: int


def steps_from(config: ElasticConfig, widths: Widths) -> dict[Step, Widths]:
    """Every single step from a network, and what it leads to."""
    places = dict(zip(AXES, map(list, config.indices(widths)), strict=True))
    found = {}
    for axis, own in places.items():
        for layer, place in enumerate(own):
            for choice in range(place):
                after = {**places, axis: [*own[:layer], choice, *own[layer + 1 :]]}
                found[Step(axis, layer, choice)] = config.widths(after[name] for name in AXES)
    return found


def descend(config: ElasticConfig, table: LatencyTable, loss_fn: Callable[[Widths], float]) -> Ladder:
    """The ladder whose networks give up first what costs the least for the time that it saves.

    A layer goes on to its next choice as soon as what that costs further is the cheapest, or skips it where the one
    below costs less for its time.

    Args:
        config, table: the menus, and what their choices take.
        loss_fn: the loss of a network, in nats above the full model's; best the divergence from what that predicts,
            for those of single steps are small. It is asked once for each of `steps_from` the full network.
    """
    places = {axis: [count - 1] * config.num_layers for axis, count in zip(AXES, config.choices, strict=True)}
    costs = {step: loss_fn(widths) for step, widths in steps_from(config, config.full()).items()}
    rows = dict(zip(AXES, table.by_axis, strict=True))

    def price(step: Step) -> float:
        row, place = rows[step.axis][step.layer], places[step.axis][step.layer]
        further = costs[step] - costs.get(step._replace(choice=place), 0.0)
        return max(further, _LEAST) / max(row[place] - row[step.choice], _LEAST)

    given_up: list[tuple[str, int]] = []
    while left := [step for step in costs if step.choice < places[step.axis][step.layer]]:
        best = min(left, key=price)
        given_up += [(best.axis, best.layer)] * (places[best.axis][best.layer] - best.choice)
        places[best.axis][best.layer] = best.choice
    return Ladder(*config.menus, config.num_layers, tuple(reversed(given_up)), "router")
