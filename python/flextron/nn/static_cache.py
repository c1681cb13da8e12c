"""A key/value cache whose tensors stay where they are, so that one captured graph serves every token and budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flextron.nn.cache import ElasticCache, ElasticCacheLayer
from flextron.nn.protocol import Elastic

_LEAST = 256  # tokens of the smallest room


def room_for(tokens: int) -> int:
    """The room that so many tokens get: a power of two, so that a sequence of n tokens moves log2(n) times at most."""
    return max(_LEAST, 1 << (tokens - 1).bit_length())


def rows_at(table: Tensor, page: int, at: Tensor) -> Tensor:
    """The rows of tokens ``at`` [B, T] of each sequence among all rows of all pages, [B, T] int64."""
    return table[: len(at)].gather(1, at // page) * page + at % page


class StaticLayer(ElasticCacheLayer):
    """Keys and values of one layer, ``[P, page, G, D]``, with room for all groups of the model.

    ``length`` and ``groups`` are those of `ElasticCacheLayer`: a token stores ``groups`` groups, and its others are
    zeros or were never written.
    """

    def __init__(self, cache: StaticCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.cache, self.keys, self.values = cache, keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the room is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, T, D]`` states; return all valid ones as ``[B, G, S, D]``."""
        B, groups, T, _ = key_states.shape
        self.check(groups)
        if key_states.requires_grad or value_states.requires_grad:
            raise ValueError(
                "StaticCache: states must not need a gradient, got ones that do; use an ElasticCache"
            )
        begin, end = self.length, self.length + T
        self.cache.reserve_rows(B, end)
        rows = self.cache.rows(B, begin, end).flatten()
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            part = stored.flatten(0, 1)[:, :groups]
            part.index_copy_(0, rows, new.transpose(1, 2).flatten(0, 1))
        self.length, self.groups = end, groups
        if begin == 0:
            return key_states, value_states
        return self._states(self.keys, B), self._states(self.values, B)

    def _states(self, stored: Tensor, B: int) -> Tensor:
        if self.cache.block_table is None:
            valid = stored[:B, : self.length]
        else:
            valid = stored.flatten(0, 1)[self.cache.rows(B, 0, self.length)]
        return valid[:, :, : self.groups].transpose(1, 2)

    def get_max_length(self) -> int:
        return self.cache.tokens

    def reset(self) -> None:
        self.length = self.groups = 0

    def permute(self, B: int, order: Tensor) -> None:
        """Give every token of B sequences the keys and values that the row ``order`` [B, T] of all pages has."""
        rows = self.cache.rows(B, 0, order.shape[1])
        for stored in (self.keys, self.values):
            flat = stored.flatten(0, 1)
            flat[rows] = flat[order]

    def batch_select_indices(self, indices: Tensor) -> None:
        B = len(indices)
        self.permute(B, self.cache.rows(self.cache.sequences, 0, self.length)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError(
            f"StaticCache: repeats must be 1, its number of sequences stays, got {repeats}; use an ElasticCache"
        )


class StaticCache(ElasticCache):
    """A cache for `ElasticModel.generate` whose decode step is one captured graph on a GPU.

    The room of ``tokens`` tokens is contiguous, ``[sequences, tokens, G, D]`` in each layer, or pages of ``page``
    tokens, ``[P, page, G, D]``, which ``table`` assigns to the sequences. A forward that needs more room doubles it,
    and the next step is captured again.

    Args:
        model: whose dtype and device the cache has.
        sequences: the largest batch.
        tokens: of each sequence, prompt included.
        page: tokens of a page; None: contiguous.

    Attributes:
        table: [sequences, columns] int64 on the device: the page of each ``page`` tokens of a sequence.
        lengths: [sequences] int64 on the device: the tokens of each sequence, as a captured step counts them.
        steps: the captured steps by the router that chooses, see `flextron.nn.graph`; gone when the room has grown.
        is_lent: whether a generation has it from `flextron.nn.graph.lend`.
    """

    def __init__(self, model: Elastic, sequences: int, tokens: int, page: int | None = None) -> None:
        super().__init__()
        for name, value in (
            ("sequences", sequences),
            ("tokens", tokens),
            ("page", 1 if page is None else page),
        ):
            if value < 1:
                raise ValueError(f"StaticCache: {name} must be at least 1, got {value}")
        config, device = model.elastic, model.device
        self.sequences = sequences
        self.is_paged, self.page = page is not None, page or tokens
        columns = -(-tokens // self.page)
        self.table = _pages(sequences, 0, columns, device)
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.steps: dict[Any, Any] = {}
        self.is_lent = False
        shape = (sequences * columns, self.page, config.num_kv_heads, config.head_dim)
        like = torch.empty(0, dtype=model.dtype, device=device)
        self.layers = [
            StaticLayer(self, like.new_empty(shape), like.new_empty(shape)) for _ in range(config.num_layers)
        ]

    @property
    def tokens(self) -> int:
        """How many tokens of each sequence there is room for."""
        return self.table.shape[1] * self.page

    @property
    def block_table(self) -> Tensor | None:
        """What the attention op takes; None where the room is contiguous."""
        return self.table if self.is_paged else None

    def rows(self, B: int, begin: int, end: int) -> Tensor:
        """The rows of these tokens of the first B sequences among all rows of all pages, [B, T]."""
        at = torch.arange(begin, end, device=self.table.device)
        return rows_at(self.table, self.page, at.expand(B, -1))

    def reserve_rows(self, B: int, tokens: int) -> None:
        """Make room for ``tokens`` tokens of each of B sequences; keys and values move where it was too small."""
        if self.sequences < B:
            raise ValueError(f"StaticCache: batch must be at most its {self.sequences} sequences, got {B}")
        if tokens > self.tokens:
            self._grow(room_for(tokens))

    def _grow(self, tokens: int) -> None:
        self.steps.clear()  # they hold the old addresses
        old = self.table.shape[1]
        if self.is_paged:
            columns = -(-tokens // self.page)
            more = _pages(self.sequences, self.sequences * old, columns - old, self.table.device)
            self.table = torch.cat([self.table, more], 1)
        else:
            self.page, columns = tokens, old
        for layer in self.layers:
            for name in ("keys", "values"):
                stored = getattr(layer, name)
                grown = stored.new_empty(self.sequences * columns, self.page, *stored.shape[2:])
                grown[: len(stored), : stored.shape[1]] = stored
                setattr(layer, name, grown)

    def reset(self) -> None:
        super().reset()
        self.is_left_padded = False

    def arrange(self, order: Tensor) -> None:
        B, T = order.shape
        rows = self.rows(B, 0, T).gather(1, order)
        for layer in self.layers:
            layer.permute(B, rows)


def _pages(sequences: int, first: int, columns: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + sequences * columns, device=device).view(sequences, columns)
