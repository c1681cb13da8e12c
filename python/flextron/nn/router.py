"""The static router: a latency target in, one row of logits for every layer and axis out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

LEAK = 0.1


class Choices(NamedTuple):
    """One tensor for each axis, ``[..., L, C_axis]``: logits, or probabilities of the choices."""

    mlp: Tensor
    heads: Tensor


class StaticRouter(nn.Module):
    """Choose a width and a head count for every layer from a latency target alone.

    ``encode(tau) -> Linear -> LeakyReLU(0.1) -> Linear``, whose output is one row for every layer and axis.
    The encoding is one-hot over the trained targets, and between two of them the line that joins them, so the
    logits are continuous in the target. Targets outside the trained range are taken to its ends. Logits are
    divided by the root of ``hidden``: otherwise one step of Adam at 1e-2, which moves all weights of a row
    together, would move a logit by about 1, and the choice would be settled before anything was explored.

    Args:
        num_layers: L.
        mlp_choices: choices of an MLP, C_mlp.
        head_choices: choices of an attention, C_heads.
        targets: trained targets, ascending in (0, 1]: fractions of the full model's latency.
        hidden: width of the hidden layer.
        seed: of the initial weights.
    """

    def __init__(
        self,
        num_layers: int,
        mlp_choices: int,
        head_choices: int,
        targets: Sequence[float],
        hidden: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_layers", num_layers),
            ("mlp_choices", mlp_choices),
            ("head_choices", head_choices),
        ):
            if value < 1:
                raise ValueError(f"StaticRouter: {name} must be at least 1, got {value}")
        self.targets = tuple(float(t) for t in targets)
        ascending = all(a < b for a, b in zip(self.targets, self.targets[1:], strict=False))
        if not self.targets or not ascending or not 0 < self.targets[0] <= self.targets[-1] <= 1:
            raise ValueError(f"StaticRouter: targets must ascend within (0, 1], got {list(self.targets)}")
        self.num_layers, self.mlp_choices, self.head_choices = num_layers, mlp_choices, head_choices
        self.hidden = hidden
        self.register_buffer("_targets", torch.tensor(self.targets), persistent=False)
        self.body = skip_init(nn.Linear, len(self.targets), hidden)
        self.rows = skip_init(nn.Linear, hidden, num_layers * (mlp_choices + head_choices))
        generator = torch.Generator().manual_seed(seed)
        for linear in (self.body, self.rows):  # not torch's own start, which draws from everybody's generator
            nn.init.kaiming_uniform_(linear.weight, a=LEAK, generator=generator)
            nn.init.zeros_(linear.bias)

    def encode(self, tau: Tensor | float) -> Tensor:
        """tau [...] -> [..., number of targets]: weights of the neighbouring targets, which sum to 1."""
        tau = torch.as_tensor(tau, dtype=self._targets.dtype, device=self._targets.device)
        count = len(self.targets)
        if count == 1:
            return tau.new_ones(*tau.shape, 1)
        tau = tau.clamp(self._targets[0], self._targets[-1])
        right = torch.searchsorted(self._targets, tau.contiguous()).clamp(1, count - 1)
        low, high = self._targets[right - 1], self._targets[right]
        share = ((tau - low) / (high - low)).unsqueeze(-1)
        return functional.one_hot(right - 1, count) * (1 - share) + functional.one_hot(right, count) * share

    def forward(self, tau: Tensor | float) -> Choices:
        """Logits ``mlp [..., L, C_mlp]`` and ``heads [..., L, C_heads]`` at targets of shape [...]."""
        rows = self.rows(functional.leaky_relu(self.body(self.encode(tau)), LEAK)) / self.hidden**0.5
        rows = rows.unflatten(-1, (self.num_layers, self.mlp_choices + self.head_choices))
        return Choices(rows[..., : self.mlp_choices], rows[..., self.mlp_choices :])

    @torch.no_grad()
    def choose(self, tau: Tensor | float) -> Choices:
        """Arg-max without noise: indices ``mlp [..., L]``, ``heads [..., L]`` at targets of shape [...]."""
        return Choices(*(logits.argmax(-1) for logits in self(tau)))


class GumbelSampler:
    """Draw relaxed choices, with noise that is independent for every layer, axis and row of a batch.

    It owns its generator, so no other random draw moves with it.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Choices, temperature: float, scale: float = 1.0) -> Choices:
        """Probabilities ``softmax((scale * logits + noise) / temperature)`` of each axis.

        The arg-max of a row is distributed as ``softmax(scale * logits)`` whatever the temperature.
        """
        if temperature <= 0:
            raise ValueError(f"GumbelSampler: temperature must be positive, got {temperature}")
        return Choices(*(self._soft(axis, temperature, scale) for axis in logits))

    def _soft(self, logits: Tensor, temperature: float, scale: float) -> Tensor:
        noise = torch.empty(logits.shape).exponential_(generator=self.generator).log().neg()
        return torch.softmax((scale * logits + noise.to(logits)) / temperature, dim=-1)


def anneal(step: int, steps: int) -> tuple[float, float]:
    """(temperature, scale of the logits) at a step: 1 -> 0.05 exponentially, and 1 -> 10 linearly."""
    progress = min(1.0, max(0.0, step / max(1, steps - 1)))
    return 0.05**progress, 1.0 + 9.0 * progress
