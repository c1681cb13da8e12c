"""The routers: a latency target in, and for the adaptive one a token's state; logits for every layer and axis out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from flextron.config import MENUS, ElasticConfig, PerAxis, check_targets

LEAK = 0.1
_EPS = torch.finfo(torch.float32).eps  # of the norm: that of torch's rms_norm
_EVERYTHING = 1e9  # an offset: times any two choices' difference in cost it outweighs their logits


class Menus(PerAxis[Tensor]):
    """The widths an axis may take, ascending: [C] int64 of each axis."""


class Logits(PerAxis[Tensor]):
    """A router's preference for each entry of a menu: ``[..., C]`` of each axis, with L before C for all layers."""


class Probabilities(PerAxis[Tensor]):
    """The share of each entry of a menu, sums to 1: ``[..., C]`` of each axis, with L before C for all layers."""


class Indices(PerAxis[Tensor]):
    """Chosen entries by their place in a menu: ``[...]`` int64 of each axis, with L last for all layers."""


def encode(tau: Tensor | float, targets: Tensor) -> Tensor:
    """tau [...] -> [..., number of targets]: one-hot at a target, between two the line that joins them."""
    tau = torch.as_tensor(tau, dtype=targets.dtype, device=targets.device)
    count = len(targets)
    if count == 1:
        return tau.new_ones(*tau.shape, 1)
    tau = tau.clamp(targets[0], targets[-1])
    right = torch.searchsorted(targets, tau.contiguous()).clamp(1, count - 1)
    low, high = targets[right - 1], targets[right]
    share = ((tau - low) / (high - low)).unsqueeze(-1)
    return functional.one_hot(right - 1, count) * (1 - share) + functional.one_hot(right, count) * share


class StaticRouter(nn.Module):
    """Choose a width and a head count for every layer from a latency target alone.

    ``encode(tau) -> Linear -> LeakyReLU(0.1) -> Linear``, whose output is one row for every layer and axis.
    The encoding is one-hot over the trained targets, and between two of them the line that joins them, so the
    logits are continuous in the target. Targets outside the trained range are taken to its ends. Logits are
    divided by the root of ``hidden``: otherwise one step of Adam at 1e-2, which moves all weights of a row
    together, would move a logit by about 1, and the choice would be settled before anything was explored.

    Args:
        num_layers: L.
        choices: how many choices each axis has, C.
        targets: trained targets, ascending in (0, 1]: fractions of the full model's latency.
        hidden: width of the hidden layer.
        seed: draws the initial weights.
    """

    def __init__(
        self,
        num_layers: int,
        choices: Sequence[int],
        targets: Sequence[float],
        hidden: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("num_layers", num_layers), *zip(MENUS, choices, strict=True)):
            if value < 1:
                raise ValueError(f"StaticRouter: {name} must be at least 1, got {value}")
        self._targets: Tensor
        self.targets = tuple(map(float, check_targets("StaticRouter", targets)))
        self.num_layers, self.choices, self.hidden = num_layers, PerAxis(*choices), hidden
        self.register_buffer("_targets", torch.tensor(self.targets), persistent=False)
        self.body = skip_init(nn.Linear, len(self.targets), hidden)
        self.rows = skip_init(nn.Linear, hidden, num_layers * sum(choices))
        generator = torch.Generator().manual_seed(seed)
        for linear in (self.body, self.rows):  # not torch's own start, which draws from everybody's generator
            nn.init.kaiming_uniform_(linear.weight, a=LEAK, generator=generator)
            nn.init.zeros_(linear.bias)

    def encode(self, tau: Tensor | float) -> Tensor:
        """tau [...] -> [..., number of targets]: weights of the neighbouring targets, which sum to 1."""
        return encode(tau, self._targets)

    def forward(self, tau: Tensor | float) -> Logits:
        """Logits ``mlp [..., L, C_mlp]`` and ``heads [..., L, C_heads]`` at targets of shape [...]."""
        rows = self.rows(functional.leaky_relu(self.body(self.encode(tau)), LEAK)) / self.hidden**0.5
        return Logits(*rows.unflatten(-1, (self.num_layers, -1)).split(self.choices, -1))

    @torch.no_grad()
    def choose(self, tau: Tensor | float) -> Indices:
        """Arg-max without noise: indices ``mlp [..., L]``, ``heads [..., L]`` at targets of shape [...]."""
        return Indices(*(logits.argmax(-1) for logits in self(tau)))


class GumbelSampler:
    """Draw relaxed choices, with noise that is independent for every layer, axis and row of a batch.

    It owns its generator, so no other random draw moves with it.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Logits, temperature: float, scale: float = 1.0) -> Probabilities:
        """Probabilities ``softmax((scale * logits + noise) / temperature)`` of each axis.

        The arg-max of a row is distributed as ``softmax(scale * logits)`` whatever the temperature.
        """
        if temperature <= 0:
            raise ValueError(f"GumbelSampler: temperature must be positive, got {temperature}")
        return Probabilities(*(self._soft(axis, temperature, scale) for axis in logits))

    def _soft(self, logits: Tensor, temperature: float, scale: float) -> Tensor:
        noise = self._exponential(logits.shape).log().neg()
        return torch.softmax((scale * logits + noise.to(logits)) / temperature, dim=-1)

    def _exponential(self, shape: torch.Size) -> Tensor:
        return torch.empty(shape).exponential_(generator=self.generator)


def anneal(step: int, steps: int) -> tuple[float, float]:
    """(temperature, scale of the logits) at a step: 1 -> 0.05 exponentially, and 1 -> 10 linearly."""
    progress = min(1.0, max(0.0, step / max(1, steps - 1)))
    return 0.05**progress, 1.0 + 9.0 * progress


def default_hidden(config: ElasticConfig) -> int:
    """Width of an adaptive router's hidden layer that keeps it below a twentieth of a layer's cost."""
    return max(8, min(256, config.hidden_size // 4))


class AdaptiveRouter(nn.Module):
    """Choose widths for every token and layer from the layer's input and a latency target.

    ``logits = base_l(tau) + W2_l LeakyReLU(W1_l rms_norm(x) + Wt_l encode(tau) + b_l) + ramp * offset(tau)``

    x is the layer's incoming hidden state behind its norm. ``base`` has a row for each trained target, which
    starts at what the static router found, and W2 starts at 0: an untrained router is the static one. ``ramp``
    grows with the cost of a choice, so the offset moves the mean latency without asking for anything else: the
    choice ``argmax(u_c + offset * cost_c)`` of a token never falls as the offset grows. It is calibrated on
    text at a grid of fractions (`calibrate` in ``flextron.routing.calibrate``), a line between them.

    Args:
        num_layers, hidden_size: L and K.
        choices: how many choices each axis has, C.
        targets: trained targets, ascending in (0, 1].
        hidden: width of the hidden layer.
        seed: draws the initial weights.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        choices: Sequence[int],
        targets: Sequence[float],
        hidden: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_layers, self.hidden_size, self.hidden = num_layers, hidden_size, hidden
        self.choices = PerAxis(*choices)
        self._targets: Tensor
        self.ramp: Tensor
        self.targets = tuple(map(float, check_targets("AdaptiveRouter", targets)))
        self.register_buffer("_targets", torch.tensor(self.targets), persistent=False)
        L, C = num_layers, sum(choices)
        generator = torch.Generator().manual_seed(seed)
        gain = nn.init.calculate_gain("leaky_relu", LEAK)
        self.w1 = nn.Parameter(
            torch.randn(L, hidden, hidden_size, generator=generator) * gain / hidden_size**0.5
        )
        self.wt = nn.Parameter(torch.zeros(L, len(self.targets), hidden))
        self.b1 = nn.Parameter(torch.zeros(L, hidden))
        self.w2 = nn.Parameter(torch.zeros(L, C, hidden))
        self.base = nn.Parameter(torch.zeros(L, len(self.targets), C))
        self.register_buffer("ramp", torch.zeros(C))
        self.calibration: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}

    def check(self, config: ElasticConfig, phase: str | None = None) -> None:
        """Raise ValueError unless the router is for this model's layers and menus, and calibrated for the phase."""
        theirs = (config.num_layers, config.hidden_size, *config.choices)
        mine = (self.num_layers, self.hidden_size, *self.choices)
        if mine != theirs:
            raise ValueError(
                f"adaptive router: layers, width and menus must be those of the model {theirs}, got {mine}"
            )
        if phase is not None and phase not in self.calibration:
            have = ", ".join(sorted(self.calibration)) or "none"
            raise ValueError(
                f"adaptive router: phase must be one it is calibrated for ({have}), got {phase!r}"
            )

    def offset(self, tau: Tensor, phase: str) -> Tensor:
        """The calibrated offset at targets [R]: a line between the points of the phase's grid; at 1 one that
        outweighs every logit, for that is the full model."""
        grid, offsets = (torch.tensor(v, dtype=torch.float64) for v in self.calibration[phase])
        tau = tau.to("cpu", torch.float64)
        at = tau.clamp(grid[0], grid[-1])
        right = torch.searchsorted(grid, at.contiguous()).clamp(1, len(grid) - 1)
        share = (at - grid[right - 1]) / (grid[right] - grid[right - 1])
        found = torch.lerp(offsets[right - 1], offsets[right], share)
        return torch.where(tau >= 1, _EVERYTHING, found).to(self.ramp)

    def context(
        self, tau: Tensor, layer: int | slice = slice(None), phase: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """What a layer's logits owe to the targets [R] alone: ([R, hidden], [R, C]); of several layers [L, R, ..].

        Without a phase the offset is 0: as it is trained.
        """
        code = encode(tau, self._targets)
        logits = code @ self.base[layer]
        if phase is not None:
            logits = logits + self.offset(tau, phase)[:, None] * self.ramp
        return code @ self.wt[layer] + self.b1[layer].unsqueeze(-2), logits

    def logits(self, x: Tensor, layer: int, context: tuple[Tensor, Tensor]) -> Logits:
        """x [B, T, K] -> logits of its B * T tokens, ``mlp [N, C_mlp]`` and ``heads [N, C_heads]``, float32.

        ``context`` is of R requests, each of them B / R sequences in a row.
        """
        B, T, K = x.shape
        state, base = context
        R = base.shape[0]
        x = x.float().reshape(R, B // R * T, K)
        # W1 rms_norm(x) = (W1 x) / rms(x): on a CPU, where torch has no fused norm, half its passes over x
        scale = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / K + _EPS).rsqrt()
        h = functional.leaky_relu(torch.addcmul(state[:, None], x @ self.w1[layer].T, scale), LEAK)
        logits = (h @ self.w2[layer].T + base[:, None]).flatten(0, 1)
        return Logits(*logits.split(self.choices, -1))
