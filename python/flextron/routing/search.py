"""Plain search over table and surrogate: what the routers start from and are checked against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from flextron.artefacts.latency_table import LatencyTable
from flextron.config import ElasticConfig, Widths
from flextron.nn.router import Probabilities
from flextron.routing.surrogate import Surrogate

_POPULATION = 64
_PARENTS = 16  # the best of the population, which live on and have all the children
_CHUNK = 4096  # configurations that the surrogate sees at once


def one_hot(config: ElasticConfig, widths: Sequence[Widths]) -> Probabilities:
    """Configurations as certain choices: one-hot [n, L, C] for each axis."""
    return _certain(config, _indices(config, widths))


def likely(config: ElasticConfig, widths: Sequence[Widths], confidence: float) -> Probabilities:
    """Configurations as choices of this probability; the others of a layer share what is left: [n, L, C]."""

    def hedged(certain: Tensor) -> Tensor:
        rest = (1 - confidence) / max(1, certain.shape[-1] - 1)
        return certain * (confidence - rest) + rest

    return Probabilities(*map(hedged, one_hot(config, widths)))


@torch.no_grad()
def predicted_losses(
    config: ElasticConfig, table: LatencyTable, surrogate: Surrogate, widths: Sequence[Widths]
) -> Tensor:
    """Nats above the full model's loss that the surrogate predicts, [n]."""
    choices = one_hot(config, widths)
    return surrogate.loss(choices, table.expected(*choices) / table.full_ms)


def search(
    config: ElasticConfig,
    table: LatencyTable,
    surrogate: Surrogate,
    target: float,
    start: Sequence[Widths] = (),
    generations: int = 30,
    swaps: int = 200,
    seed: int = 0,
) -> Widths:
    """A configuration of low predicted loss within ``target`` of the full latency, by evolution.

    The first population is a greedy descent (from the full model, give up the step that costs the least
    predicted loss for each millisecond, until the target is met), ``start``, and random steps away from them.
    Children take each layer's axis from one of two parents and move a few by a step; what is too slow gives up
    random steps. The best of the last generation is improved by swaps, one step down and one up, as long as
    they help: it is never worse than the greedy descent or any of ``start`` that meets the target.

    Args:
        config, table, surrogate: the menus that are searched, and what judges a configuration.
        target: fraction of the full latency.
        start: configurations to begin with; those that are too slow are made smaller.
        generations: generations of evolution.
        swaps: swaps tried at the end, at most.
        seed: seed of every random draw.

    Raises:
        ValueError: the smallest network takes longer than the target.
    """
    limit = target * table.full_ms * (1 + 5e-7)  # float32 times
    if table.smallest_ms > limit:
        raise ValueError(
            f"search: target must be at least {table.smallest_ms / table.full_ms:.3f}, got {target}"
        )
    return _Search(config, table, surrogate, limit, seed).run(start, generations, swaps)


class _Search:
    """One call of `search`. A configuration is a row of indices into the menus: L of each axis in turn."""

    def __init__(
        self, config: ElasticConfig, table: LatencyTable, surrogate: Surrogate, limit: float, seed: int
    ) -> None:
        self.config, self.table, self.surrogate, self.limit = config, table, surrogate, limit
        self.generator = torch.Generator().manual_seed(seed)
        self.top = torch.tensor([count - 1 for count in config.choices for _ in range(config.num_layers)])

    @torch.no_grad()
    def run(self, start: Sequence[Widths], generations: int, swaps: int) -> Widths:
        first = torch.stack([self._greedy(), *_indices(self.config, start)])
        kept = first[self._ms(first) <= self.limit]  # the greedy one is
        population = torch.cat([kept, self._fit(self._mutated(self._drawn(first, _POPULATION)))])
        for _ in range(generations):
            parents = population[self._loss(population).argsort(stable=True)[:_PARENTS]]
            mother, father = self._drawn(parents, _POPULATION), self._drawn(parents, _POPULATION)
            mask = self._random(mother.shape) < 0.5
            population = torch.cat([parents, self._fit(self._mutated(torch.where(mask, mother, father)))])
        candidates = torch.cat([kept, population[self._loss(population).argsort(stable=True)[:1]]])
        results = torch.stack([self._swapped(row, swaps) for row in candidates.unique(dim=0)])
        best = results[self._loss(results).argmin()]
        return self.config.widths(axis.tolist() for axis in best.split(self.config.num_layers))

    def _greedy(self) -> Tensor:
        row = self.top.clone()
        while self._ms(row[None])[0] > self.limit:
            down = self._steps(row, -1)
            saved = (self._ms(row[None]) - self._ms(down)).clamp_min(1e-9)
            row = down[((self._loss(down) - self._loss(row[None])) / saved).argmin()]
        return row

    def _swapped(self, row: Tensor, swaps: int) -> Tensor:
        """Improve by a step up, or by one down and one up, within the limit."""
        best = float(self._loss(row[None])[0])
        for _ in range(swaps):
            near = torch.cat([row[None], self._steps(row, -1)])
            reach = torch.cat([self._steps(one, +1) for one in near])
            reach = reach[self._ms(reach) <= self.limit]
            if not len(reach):
                return row
            losses = self._loss(reach)
            place = int(losses.argmin())
            if float(losses[place]) >= best - 1e-6:
                return row
            row, best = reach[place], float(losses[place])
        return row

    def _steps(self, row: Tensor, direction: int) -> Tensor:
        """All rows one choice up (+1) or down (-1) in one place."""
        moved = row + direction * torch.eye(len(row), dtype=row.dtype)
        return moved[((moved >= 0) & (moved <= self.top)).all(1)]

    def _mutated(self, rows: Tensor) -> Tensor:
        """Move about two places of each row by a step."""
        moves = self._random(rows.shape) < 2 / rows.shape[1]
        direction = torch.where(self._random(rows.shape) < 0.5, 1, -1)
        return (rows + moves * direction).clamp_min(0).minimum(self.top)

    def _fit(self, rows: Tensor) -> Tensor:
        """Take random steps down from configurations that are too slow until none is."""
        while (slow := self._ms(rows) > self.limit).any():
            weight = self._random(rows.shape) * (rows > 0)
            chosen = functional.one_hot(weight.argmax(1), rows.shape[1])
            rows = rows - chosen * slow[:, None]
        return rows

    def _drawn(self, rows: Tensor, count: int) -> Tensor:
        return rows[torch.randint(len(rows), (count,), generator=self.generator)]

    def _random(self, shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _ms(self, rows: Tensor) -> Tensor:
        return self.table.expected(*_certain(self.config, rows))

    def _loss(self, rows: Tensor) -> Tensor:
        found = []
        for part in rows.split(_CHUNK):
            choices = _certain(self.config, part)
            found.append(self.surrogate.loss(choices, self.table.expected(*choices) / self.table.full_ms))
        return torch.cat(found)


def _indices(config: ElasticConfig, widths: Sequence[Widths]) -> Tensor:
    """[n, axes * L] indices into the menus: L of each axis in turn."""
    rows = [[*chain(*config.indices(w))] for w in widths]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), len(config.axes) * config.num_layers)


def _certain(config: ElasticConfig, rows: Tensor) -> Probabilities:
    by_axis = zip(rows.split(config.num_layers, dim=1), config.choices, strict=True)
    return Probabilities(*(functional.one_hot(own, count).float() for own, count in by_axis))
