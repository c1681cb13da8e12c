"""Which sub-network a micro-batch trains; the loop that asks is in ``loop.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flextron.config import ElasticConfig, Widths
from flextron.data import seeded


def homogeneous(config: ElasticConfig) -> list[Widths]:
    """The sub-networks whose layers are all alike, smallest first, full model last.

    One index runs over the longest menu and is mapped in proportion to the others, to the nearest entry (a tie
    goes up), so all axes keep about the same fraction and every entry of all menus occurs; but for a model that skips
    every layer, from which nothing is learned.
    """
    longest = max(config.choices)
    alike = [config.uniform(*(_nearest(i, longest, C) for C in config.choices)) for i in range(longest)]
    return [widths for widths in alike if any(map(any, widths.axes))]


class WidthSampler:
    """Draws one sub-network at a time from a generator that serves nothing else.

    With ``full_probability`` the full model; otherwise, at even odds, one of the `homogeneous` sub-networks
    or an independent choice for every layer and axis, uniform over the menu. Independent choices alone would
    hover round the mean size; without a share of its own the full model would be trained too rarely.
    Where ``networks`` are given, one of these is drawn in their place, each in proportion to the parameters that it
    does without: the smallest has most to learn.

    Args:
        config: the menus.
        full_probability: probability of the full model, in [0, 1].
        seed: seed of the generator. Equal seeds draw equal sequences, on every device.
        networks: the sub-networks to draw below the full one, such as the rungs of a ladder: what no budget runs learns
            nothing. With one of them and no ``full_probability`` it is trained alone.
    """

    def __init__(
        self,
        config: ElasticConfig,
        full_probability: float = 0.3,
        seed: int = 0,
        networks: Sequence[Widths] = (),
    ) -> None:
        if not 0 <= full_probability <= 1:
            raise ValueError(f"WidthSampler: full_probability must lie in [0, 1], got {full_probability}")
        for widths in networks:
            config.check(widths)
        self.config = config
        self.full_probability = full_probability
        self.networks = tuple(networks)
        without = torch.tensor([config.params(config.full()) - config.params(w) for w in networks]).double()
        self._shares = without if without.any() else torch.ones_like(without)
        self._homogeneous = homogeneous(config)
        self._generator = seeded(f"widths/{seed}")

    def draw(self) -> Widths:
        return self._drawn(self._generator)

    def draw_for(self, rank: int) -> Widths:
        """Draw for each of several processes at once; this one's. The state does not depend on their number."""
        base = int(torch.randint(2**62, (), generator=self._generator))
        return self._drawn(seeded(f"widths/{base}/{rank}"))

    def _drawn(self, generator: torch.Generator) -> Widths:
        kind = float(torch.rand((), dtype=torch.float64, generator=generator))
        if kind < self.full_probability:
            return self.config.full()
        if self.networks:
            return self.networks[int(torch.multinomial(self._shares, 1, generator=generator))]
        if kind < (1 + self.full_probability) / 2:
            return self._homogeneous[_indices(len(self._homogeneous), 1, generator)[0]]
        layers = self.config.num_layers
        return self.config.widths(_indices(count, layers, generator) for count in self.config.choices)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sampler": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._generator.set_state(state["sampler"])


def _indices(choices: int, count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(choices, (count,), generator=generator).tolist()


def _nearest(index: int, longest: int, size: int) -> int:
    """The entry of a menu of ``size`` at the same relative place as ``index`` in one of ``longest``."""
    if longest == 1:
        return 0
    return (2 * index * (size - 1) + longest - 1) // (2 * (longest - 1))
