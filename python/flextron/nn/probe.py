"""One elastic module of one layer as a callable: what the latency table of the prefill phase times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def probe(model: Any, layer: int, axis: str, *, batch: int, length: int) -> Callable[[], None]:
    """Return a function that runs a layer's own module once, at its present width, on random input.

    Args:
        model: an elastic model.
        layer: index of the layer.
        axis: ``"mlp"`` or ``"heads"``.
        batch: sequences.
        length: tokens of each.
    """
    if axis not in ("mlp", "heads"):
        raise ValueError(f"probe: axis must be mlp or heads, got {axis!r}")
    module = model.layers_of()[layer].mlp if axis == "mlp" else model.layers_of()[layer].attention
    weight = module.up_proj.weight if axis == "mlp" else module.q_proj.weight
    x = torch.randn(batch, length, model.elastic.hidden_size, dtype=weight.dtype, device=weight.device)
    if axis == "mlp":
        return torch.no_grad()(lambda: module(x))
    embeddings = model.model.rotary_emb(x, torch.arange(length, device=weight.device)[None])
    return torch.no_grad()(lambda: module(x, embeddings))
