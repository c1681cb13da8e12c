"""The key/value cache of an elastic model: it knows how many groups it holds, and grows without copying each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Tokens. Room is made in multiples of this, for at least as many more than are stored, so that the first token after a
# prompt copies nothing, and at least doubling, so that appending is amortised O(1).
_BLOCK = 64


class ElasticCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[B, room, G, D]``, of which the first ``length`` tokens are valid.

    On a CPU the tokens of a group are contiguous: a thread reads one group, and one stream is faster than pieces.

    ``groups`` is the number of key/value groups valid for *every* cached token. It may shrink (a smaller
    budget needs a prefix of what is there); it never grows, since a later token would miss the groups that
    earlier ones did not store.
    """

    keys: Any  # a Tensor, or None where nothing is cached
    values: Any
    is_sliding = False
    is_croppable = True

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.length = 0
        self.groups = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        self._start(key_states, B, G, D)

    def _start(self, like: Tensor, B: int, G: int, D: int) -> None:
        self.dtype, self.device, self.groups = like.dtype, like.device, G
        self.keys, self.values = _room(like, B, 0, G, D), _room(like, B, 0, G, D)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, T, D]`` states; return all valid ones as ``[B, G, S, D]`` views."""
        if self.length == 0:
            self.lazy_initialization(key_states, value_states)
        self.check(key_states.shape[1])
        self.groups = key_states.shape[1]
        end = self.length + key_states.shape[2]
        self.keys = self._append(self.keys, key_states.transpose(1, 2), end)
        self.values = self._append(self.values, value_states.transpose(1, 2), end)
        self.length = end
        return self._valid(self.keys), self._valid(self.values)

    def check(self, groups: int) -> None:
        """Raise ValueError when a budget asks for more groups than the cached tokens have."""
        if self.length > 0 and groups > self.groups:
            raise ValueError(
                f"ElasticCache: the budget must not need more key/value groups than the cache holds, got {groups} for "
                f"{self.groups}; use kv='all' from the start to raise a budget during generation"
            )

    def _append(self, stored: Tensor, new: Tensor, end: int) -> Tensor:
        stored = stored[:, :, : self.groups]
        if (
            new.requires_grad or stored.requires_grad
        ):  # autograd keeps the old buffer: it must not be written again
            return torch.cat([stored[:, : self.length], new], dim=1)
        stored = self._grown(stored, end)
        stored[:, self.length : end] = new
        return stored

    def _grown(self, stored: Tensor, end: int) -> Tensor:
        if end <= stored.shape[1]:
            return stored
        B, _, G, D = stored.shape
        room = -(-max(end + _BLOCK, 2 * self.length) // _BLOCK) * _BLOCK
        grown = _room(stored, B, room, G, D)
        grown[:, : self.length] = stored[:, : self.length]
        return grown

    def reserve(self, like: Tensor, B: int, tokens: int, groups: int, head_dim: int) -> None:
        """Make room in ``keys`` and ``values`` for ``groups`` groups of so many more tokens of B sequences.

        The caller writes them after the ``length`` valid ones, and then counts them.
        """
        if self.length == 0:
            self._start(like, B, groups, head_dim)
        elif groups < self.keys.shape[2]:
            self.keys, self.values = self.keys[:, :, :groups], self.values[:, :, :groups]
        end = self.length + tokens
        if end > self.keys.shape[1]:
            self.keys, self.values = self._grown(self.keys, end), self._grown(self.values, end)

    def first_groups(self, groups: int) -> ElasticCacheLayer:
        """The first groups as a layer of its own in the same memory, for as many tokens as there is room for."""
        layer = ElasticCacheLayer()
        layer.keys, layer.values = self.keys[:, :, :groups], self.values[:, :, :groups]
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        layer.length, layer.groups = self.length, groups
        return layer

    def _valid(self, stored: Tensor) -> Tensor:
        return stored[:, : self.length].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.length = self.groups = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (transformers' convention: zero or negative)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"ElasticCache.crop: tokens_to_remove must be zero or negative, got {tokens_to_remove}"
            )
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys = self.keys.index_select(0, indices.to(self.keys.device))
            self.values = self.values.index_select(0, indices.to(self.values.device))


def _room(like: Tensor, B: int, tokens: int, G: int, D: int) -> Tensor:
    if like.device.type == "cpu":
        return like.new_empty(B, G, tokens, D).transpose(1, 2)
    return like.new_empty(B, tokens, G, D)


class _Rooms:
    """What a cache reserved, kept for the next token: asking 30 layers again takes 70 microseconds of a decode step."""

    def __init__(self, layers: Sequence[ElasticCacheLayer], groups: Sequence[int]) -> None:
        self.keys, self.values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self.groups = groups
        self.sequences, self.tokens = self.keys[0].shape[0], min(keys.shape[1] for keys in self.keys)

    def have(self, layers: Sequence[ElasticCacheLayer], B: int, tokens: int, groups: Sequence[int]) -> bool:
        """Whether the layers still hold these tensors, with room for so many more tokens of these groups."""
        if groups is not self.groups or self.sequences != B or layers[0].length + tokens > self.tokens:
            return False
        own = zip(layers, self.keys, self.values, strict=True)
        return all(
            layer.keys is keys and layer.values is values and layer.length for layer, keys, values in own
        )


class ElasticCache(Cache):
    """A transformers cache for ``model(...)`` and ``model.generate(...)`` of an elastic model."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=ElasticCacheLayer)
        self._rooms: _Rooms | None = None
        self.is_left_padded = False  # known of a generation's masks, so that the host need not read them
        self.is_own = False  # made by a generation, which may take another in its place

    def reserve(
        self, like: Tensor, B: int, tokens: int, groups: Sequence[int], head_dim: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`ElasticCacheLayer.reserve` of every layer, made where there are none: their keys, and their values."""
        if self._rooms is None or not self._rooms.have(self.layers, B, tokens, groups):
            self._rooms = (
                None  # else old and grown tensors would be held together until all layers have grown
            )
            self.layers += [ElasticCacheLayer() for _ in range(len(groups) - len(self.layers))]
            for layer, n in zip(self.layers, groups, strict=True):
                layer.reserve(like, B, tokens, n, head_dim)
            self._rooms = _Rooms(self.layers, groups)
        return self._rooms.keys, self._rooms.values

    def arrange(self, order: Tensor) -> None:
        """Reorder the first tokens of each sequence; order [B, tokens] int64 holds their present indices."""
        index = order[..., None, None]
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                part = stored[:, : order.shape[1]]
                part.copy_(part.gather(1, index.expand_as(part)))

    def advance(self, tokens: int, groups: Sequence[int]) -> None:
        """Count ``tokens`` that were written into the room of `reserve`."""
        for layer, n in zip(self.layers, groups, strict=True):
            layer.length += tokens
            layer.groups = n

    def first_groups(self, groups: Sequence[int]) -> ElasticCache:
        """`ElasticCacheLayer.first_groups` of every layer: what a sub-network reads, and may write behind it."""
        view = ElasticCache()
        view.layers = [layer.first_groups(n) for layer, n in zip(self.layers, groups, strict=True)]
        return view

    def rewind(self, tokens: int) -> None:
        """Count the first ``tokens`` tokens of each sequence alone."""
        for layer in self.layers:
            layer.length = tokens

    def check(self, groups: Sequence[int]) -> None:
        """Raise ValueError, before anything is appended, when some layer would need more groups than it holds."""
        for layer, wanted in zip(self.layers, groups, strict=False):
            layer.check(wanted)


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among a forward's or a generation's arguments; transformers takes its old name too, with a warning."""
    past = arguments.get("cache")
    return arguments.get("past_key_values") if past is None else past
