"""Compute in float32 with weights that stay in a narrower dtype: one part of a layer is widened at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flextron.nn.anatomy import anatomy_of
from flextron.nn.protocol import Elastic
from flextron.nn.storage import common

_PIECE = 1 << 20  # values of a head that are widened at once


def is_narrow(model: Elastic | PreTrainedModel, least: torch.dtype = torch.float32) -> bool:
    """Whether a weight of the model has a dtype that does not hold the values of ``least``."""
    return any(torch.promote_types(p.dtype, least) != p.dtype for p in model.parameters())


@contextlib.contextmanager
def widened(model: Elastic | PreTrainedModel, least: torch.dtype = torch.float32) -> Iterator[None]:
    """Let a causal LM compute in ``least`` or a wider dtype inside a ``with`` block, as if its weights were that wide.

    The attention, the MLP and the norms of a layer are widened when they are called, and are narrow again when they
    return; of the head a few rows are at a time. So beside the weights no more than one part of one layer is in memory.
    An elastic model runs its modules in such a block, not the op of all layers. Weights that are wide enough are left
    alone.
    """
    if not is_narrow(model, least):
        yield
        return
    anatomy, head = anatomy_of(model.config), model.lm_head
    layers = anatomy.layers_in(model)
    # an MLP whose projections are the layer's own is widened with the layer
    parts = [part for layer in layers for part in (layer.children() if anatomy.mlp else [layer])]
    if last := getattr(anatomy.base_in(model), anatomy.norm, None):
        parts.append(last)
    wide = common([least, *(p.dtype for p in model.parameters())])
    most = max(sum(p.numel() for p in part.parameters()) for part in parts)
    # one room for all: new memory for each part would leave holes between what stays
    room = torch.empty(max(most, _PIECE, head.in_features), dtype=wide, device=model.device)
    kept: list[tuple[nn.Parameter, Tensor]] = []

    def widen(module: nn.Module, _: Any) -> None:
        rest = room
        for p in module.parameters():
            kept.append((p, p.data))
            p.data, rest = rest[: p.numel()].view(p.shape).copy_(p.data), rest[p.numel() :]

    def narrow(*_: Any) -> None:
        while kept:
            p, own = kept.pop()
            p.data = own

    handles = [part.register_forward_pre_hook(widen) for part in parts]
    handles += [part.register_forward_hook(narrow) for part in parts]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.to(wide)))
    head.forward = partial(_by_pieces, head, room)
    try:
        yield
    finally:
        narrow()  # a call that failed
        del head.forward
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _by_pieces(head: nn.Linear, room: Tensor, x: Tensor) -> Tensor:
    """The head's logits of x [..., K] in its dtype, or autocast's, a few rows of the head after the others."""
    V, K = head.weight.shape
    device = x.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    out = x.new_empty(*x.shape[:-1], V, dtype=computed)
    pieces = head.weight.detach().split(room.numel() // K)
    for piece, logits in zip(pieces, out.split(room.numel() // K, dim=-1), strict=True):
        logits.copy_(nn.functional.linear(x, room[: piece.numel()].view(piece.shape).copy_(piece)))
    return out if head.bias is None else out + head.bias.to(out.dtype)
