"""How routers learn through a model: the policy of one training step, and the latency term of its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from flextron.judge.loss import restored, sequence_losses
from flextron.nn.policy import Mixed, Relaxed, Sampled, menus_of
from flextron.nn.protocol import Elastic
from flextron.nn.router import AdaptiveRouter, GumbelSampler, Logits, Probabilities, StaticRouter

TOLERANCE = 0.02  # relative distance from a target that costs nothing

# choice probabilities [..., L, C] -> share of the full latency [...]
Fraction = Callable[[Probabilities], Tensor]


def learning_policy(
    model: Elastic,
    router: StaticRouter | AdaptiveRouter,
    tau: Tensor,
    noise: GumbelSampler | None,
    temperature: float,
    scale: float,
    gates: str,
) -> Relaxed:
    """The policy of a step in which each sequence of the batch has its own target, tau [B].

    The adaptive router draws for every token, the static one once for each sequence. ``gates`` is one of
    `flextron.recipes.GATES`, or ``"sampled"``: choices from which only the router's own probabilities learn.
    """
    if isinstance(router, StaticRouter):
        rows = router(tau)

        def logits(x: Tensor, layer: int) -> Logits:
            return Logits(*(axis[:, layer] for axis in rows))
    else:
        contexts = [router.context(tau, i) for i in range(model.elastic.num_layers)]

        def logits(x: Tensor, layer: int) -> Logits:
            return router.logits(x, layer, contexts[layer])

    kind = Sampled if gates == "sampled" else Relaxed
    return kind(logits, menus_of(model.elastic, tau.device), noise, temperature, scale, gates == "hard")


def relaxed_loss(model: Elastic, tokens: Tensor) -> Callable[[Probabilities], Tensor]:
    """A differentiable function from relaxed choices, one sub-network for each of n sequences, to the model's losses.

    It takes ``mlp`` and ``heads`` [n, L, C] and returns [n] nats: row i on the sequence i of ``tokens`` [N, T], from
    the beginning again after N. The choices may be on another device than the model. The model is restored after each
    call; its parameters get no gradient when they ask for none.
    """

    def loss(p: Probabilities) -> Tensor:
        ids = tokens[torch.arange(len(p.mlp)) % len(tokens)].to(model.device)
        here = Probabilities(*(axis.to(model.device) for axis in p))
        with restored(model):
            model.set_policy(Mixed(here), model.elastic.full(), "all")
            return sequence_losses(model, ids).to(p.mlp.device)

    return loss


def mean_choices(policy: Relaxed, batch: int) -> Probabilities:
    """Noiseless probabilities of the last forward, mean over each sequence's tokens: [B, L, C] of each axis."""
    layers = [[axis.unflatten(0, (batch, -1)).mean(1) for axis in p] for p in policy.soft.values()]
    return Probabilities(*(torch.stack(axis, dim=1) for axis in zip(*layers, strict=True)))


def latency_miss(spent: Tensor, tau: Tensor) -> Tensor:
    """relu(|T / (tau T_full) - 1| - 0.02), mean over the different targets; T is the mean of a target's sequences.

    Args:
        spent: T / T_full of each sequence, [B].
        tau: [B], from a list of few targets.
    """
    targets, which = tau.unique(return_inverse=True)
    sums = torch.zeros_like(targets).index_add(0, which, spent / tau)
    mean = sums / torch.bincount(which, minlength=len(targets))
    return functional.relu((mean - 1).abs() - TOLERANCE).mean()
