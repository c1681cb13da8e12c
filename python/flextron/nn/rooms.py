"""The rooms that captured steps run in: lent to one generation after another, or filled for a step to time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flextron.nn.decode_step import can_step
from flextron.nn.forward import ElasticForward
from flextron.nn.graph import Begin, router_of, step_in
from flextron.nn.protocol import Elastic
from flextron.nn.static_cache import StaticCache, room_for

CAPTURED_ON = ("cuda",)
_BATCH = 64  # the ops stream weights past so many tokens at most
_KEPT_ROOMS = 2
_AT_FIRST = 4096  # tokens of a new room at most

_rooms: weakref.WeakKeyDictionary[Any, list[StaticCache]] = weakref.WeakKeyDictionary()


def lend(model: Elastic, B: int, tokens: int) -> StaticCache | None:
    """An empty cache for B sequences of so many tokens: one that was given back, its graphs with it, or a new one.

    None where a step cannot be captured. A room for very many tokens begins smaller, and grows.
    """
    if not _is_captured(model):
        return None
    sequences = _sequences(B)
    tokens = min(tokens, _AT_FIRST)
    free = _rooms.setdefault(model, [])
    for cache in free:
        layer = cache.layers[0]
        same = (layer.dtype, layer.device) == (model.dtype, model.device)
        if same and cache.sequences == sequences and cache.tokens >= tokens:
            free.remove(cache)
            return cache
    cache = StaticCache(model, sequences, room_for(tokens))
    cache.is_lent = True
    return cache


def _is_captured(model: Elastic) -> bool:
    return model.device.type in CAPTURED_ON and can_step(model, ElasticForward.of(model))


def _sequences(B: int) -> int:
    """Those of the room that B sequences get: a power of two, or a multiple of what the ops stream at once."""
    return 1 << (B - 1).bit_length() if B <= _BATCH else -(-B // _BATCH) * _BATCH


def give_back(model: Elastic, cache: object) -> None:
    """Keep a lent room for later generations: the last two, which hold memory as long as the model lives."""
    if isinstance(cache, StaticCache) and cache.is_lent:
        cache.reset()
        free = _rooms.setdefault(model, [])
        free.append(cache)
        del free[:-_KEPT_ROOMS]


_filled: weakref.WeakValueDictionary[tuple[int, int, int], StaticCache] = weakref.WeakValueDictionary()


def repeated(model: Elastic, ids: Tensor, context: int) -> Callable[[], Tensor] | None:
    """The captured step of ids [B, 1] behind ``context`` random tokens, at the same place in every call.

    It keeps to the budget that the model is set to when it is called. Those that are alive share one room.

    Returns:
        What runs it and returns logits [B, V]; None where no step is captured.
    """
    if ids.shape[1] != 1 or not _is_captured(model):
        return None
    key = (id(model), len(ids), context)
    cache = _filled.get(key)
    if cache is None:
        cache = _filled[key] = _random(model, len(ids), context)
    tokens, room = ids[:, 0], cache  # the room lives as long as what runs in it

    @torch.no_grad()
    def run() -> Tensor:
        setting = model.settings.now()
        step = step_in(room, model, ElasticForward.of(model), router_of(setting))
        if step.setting is not setting:
            extents = setting.extents(len(ids))
            if extents is None:
                raise ValueError(f"repeated: budgets must be those of {len(ids)} sequences, got others")
            step.turn(extents, len(ids))
            step.setting = setting
        if step.is_new:
            step.begin(Begin(tokens, torch.full_like(tokens, context), context, None))
            step.state.advance.zero_()
        elif step.step.router is not None:  # it looks at the tokens, which a step has put the next ones for
            step.state.ids[: len(ids)].copy_(tokens)
        return step()[: len(ids)]

    return run


def _random(model: Elastic, B: int, context: int) -> StaticCache:
    cache, config = StaticCache(model, _sequences(B), room_for(context + 1)), model.elastic
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (B, config.num_kv_heads, context, config.head_dim)
    for layer in range(config.num_layers):
        keys, values = (
            torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache
