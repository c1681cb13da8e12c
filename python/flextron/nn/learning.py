"""How routers learn through a model: the policies of one training step, and the latency term of its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flextron.nn.policy import Gated
from flextron.nn.router import AdaptiveRouter, Choices, GumbelSampler, StaticRouter

GATES = ("soft", "hard")
TOLERANCE = 0.02  # relative distance from a target that costs nothing

Fraction = Callable[[Choices], Tensor]  # choice probabilities [..., L, C] -> share of the full latency [...]


def learning_policies(
    model: Any,
    router: StaticRouter | AdaptiveRouter,
    tau: Tensor,
    noise: GumbelSampler | None,
    temperature: float,
    scale: float,
    gates: str,
) -> list[Gated]:
    """The policies of a step in which each sequence of the batch has its own target, tau [B].

    The adaptive router draws for every token, the static one once for each sequence.
    """
    device = tau.device
    menus = Choices(
        torch.tensor(model.elastic.mlp_choices, device=device),
        torch.tensor(model.elastic.head_choices, device=device),
    )
    rows = router(tau) if isinstance(router, StaticRouter) else None

    def logits_of(layer: int) -> Callable[[Tensor], Choices]:
        if rows is not None:
            mine = Choices(rows.mlp[:, layer], rows.heads[:, layer])
            return lambda x: mine
        context = router.context(tau, layer)
        return lambda x: router.logits(x, layer, context)

    layers = range(model.elastic.num_layers)
    return [Gated(logits_of(i), menus, noise, temperature, scale, gates == "hard") for i in layers]


def mean_choices(policies: Sequence[Gated], batch: int) -> Choices:
    """Noiseless probabilities of the last forward, mean over each sequence's tokens: [B, L, C] of each axis."""
    layers = [Choices(*(axis.unflatten(0, (batch, -1)).mean(1) for axis in p.soft)) for p in policies]
    return Choices(*(torch.stack(axis, dim=1) for axis in zip(*layers, strict=True)))


def latency_miss(fraction: Fraction, p: Choices, tau: Tensor) -> Tensor:
    """relu(|T / (tau T_full) - 1| - 0.02), mean over the different targets; T is the mean of a target's sequences.

    Args:
        fraction: T / T_full of choice probabilities.
        p: mean probabilities of each sequence, [B, L, C].
        tau: [B], from a list of few targets.
    """
    targets, which = tau.unique(return_inverse=True)
    sums = torch.zeros_like(targets).index_add(0, which, fraction(p) / tau)
    mean = sums / torch.bincount(which, minlength=len(targets))
    return functional.relu((mean - 1).abs() - TOLERANCE).mean()
