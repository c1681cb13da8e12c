"""One elastic module of one layer as a callable: what the latency table times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flextron.nn.cache import ElasticCache, ElasticCacheLayer

PHASES = ("prefill", "decode")


def probe(
    model: Any, layer: int, axis: str, *, batch: int, length: int, phase: str, context: int = 0
) -> Callable[[], None]:
    """Return a function that runs a layer's own module once, at its present width, on random input.

    Args:
        model: an elastic model.
        layer: index of the layer.
        axis: ``"mlp"`` or ``"heads"``.
        batch: sequences.
        length: tokens of each, in the prefill phase.
        phase: ``"prefill"`` (``length`` tokens at once) or ``"decode"`` (one token, ``context`` cached ones).
        context: cached tokens, in the decode phase.
    """
    if axis not in ("mlp", "heads"):
        raise ValueError(f"probe: axis must be mlp or heads, got {axis!r}")
    if phase not in PHASES:
        raise ValueError(f"probe: phase must be one of {', '.join(PHASES)}, got {phase!r}")
    module = model.layers_of()[layer].mlp if axis == "mlp" else model.layers_of()[layer].attention
    weight = module.up_proj.weight if axis == "mlp" else module.q_proj.weight
    T = length if phase == "prefill" else 1
    x = torch.randn(batch, T, model.elastic.hidden_size, dtype=weight.dtype, device=weight.device)
    if axis == "mlp":
        return torch.no_grad()(lambda: module(x))

    cache = None
    if phase == "decode":
        G, D = model.elastic.kv_heads(module.heads, module.kv), model.elastic.head_dim
        cache = ElasticCache()
        states = torch.randn(batch, G, context, D, dtype=weight.dtype, device=weight.device)
        cache.layers.extend(
            ElasticCacheLayer() for _ in range(layer + 1)
        )  # the module appends at its own index
        cache.update(states, states, layer)
    positions = torch.arange(T, device=weight.device)[None] + (context if cache else 0)
    embeddings = model.model.rotary_emb(x, positions)

    @torch.no_grad()
    def run() -> None:
        module(x, embeddings, cache=cache)
        if cache is not None:
            cache.layers[layer].crop(-1)

    return run
