"""Tokens: a stream from documents, mixtures of streams, and windows of them in an order that integers describe."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flextron.documents import (
    TEXT_SUFFIXES,
    Text,
    has_fields,
    read_documents,
    split_documents,
    stdlib_documents,
)

__all__ = [
    "TEXT_SUFFIXES",
    "Batches",
    "Mixture",
    "Stream",
    "Text",
    "Tokens",
    "checksum_of",
    "encode",
    "has_fields",
    "held",
    "read_documents",
    "seeded",
    "separators",
    "shares",
    "split_documents",
    "stdlib_documents",
    "windows",
]

_BLOCK = 10_000  # windows: so many in a row of a mixture have its proportions exactly


@runtime_checkable
class Stream(Protocol):
    """Tokens in their order, wherever they lie."""

    def __len__(self) -> int: ...

    def window(self, start: int, length: int) -> Tensor:
        """The tokens from ``start`` on: [length] int64."""
        ...

    @property
    def checksum(self) -> str:
        """A hash of the tokens."""
        ...


@dataclass(frozen=True)
class _Held:
    """A stream that is held in memory."""

    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def window(self, start: int, length: int) -> Tensor:
        return self.tokens[start : start + length]

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.tokens.cpu().contiguous().numpy().data).hexdigest()


class Mixture:
    """Streams that are drawn from in given proportions; a short one is repeated sooner.

    Args:
        streams: [tokens] int64 each, or streams that lie elsewhere.
        weights: shares of the tokens that are drawn, kept to one part in ten thousand; by default the streams' lengths.
    """

    def __init__(self, streams: Sequence[Tensor | Stream], weights: Sequence[float] | None = None) -> None:
        self.streams = [held(stream) for stream in streams]
        self.weights = [float(w) for w in (map(len, self.streams) if weights is None else weights)]
        if len(self.weights) != len(self.streams) or not self.streams:
            raise ValueError(
                f"Mixture: weights must be one for each of the {len(self.streams)} streams, got {len(self.weights)}"
            )
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ValueError(f"Mixture: weights must be positive numbers, got {_listed(self.weights)}")
        if not all(self.counts):
            raise ValueError(
                f"Mixture: weights must each be at least 1/{_BLOCK} of their sum, got {_listed(self.weights)}"
            )

    @property
    def counts(self) -> list[int]:
        """How many of ten thousand windows are drawn from each stream."""
        return shares(_BLOCK, self.weights)

    @property
    def checksum(self) -> str:
        facts = [[stream.checksum, count] for stream, count in zip(self.streams, self.counts, strict=True)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


Tokens = Tensor | Stream | Mixture  # a tensor is [tokens] int64


def checksum_of(tokens: Tokens) -> str:
    """A hash of a stream or mixture; one that lies on the disk has it recorded."""
    return tokens.checksum if isinstance(tokens, Mixture) else held(tokens).checksum


def shares(count: int, weights: Sequence[float]) -> list[int]:
    """Part ``count`` things by weights, as exactly as whole numbers can."""
    exact = [count * weight / math.fsum(weights) for weight in weights]
    parts = [math.floor(x) for x in exact]
    by_rest = sorted(range(len(weights)), key=lambda i: parts[i] - exact[i])
    for i in by_rest[: count - sum(parts)]:
        parts[i] += 1
    return parts


def separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens before and after each document: BOS if the tokenizer itself puts it there, EOS if it has one."""
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    begins = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    return [bos] if bos is not None and begins else [], [] if eos is None else [eos]


def encode(documents: Iterable[str], tokenizer: Any, max_tokens: int | None = None) -> Tensor:
    """Tokenise documents into one stream, [tokens] int64, with EOS after each document if the tokenizer has one.

    BOS precedes each document if the tokenizer itself would put it there. At most ``max_tokens`` tokens are kept, and
    reading stops when they are full.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"encode: max_tokens must be at least 1, got {max_tokens}")
    before, after = separators(tokenizer)
    stream: list[int] = []
    for group in _groups(documents, 64):
        # verbose=False: a document longer than the model's context is no mistake here.
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*before, *ids, *after]
        if max_tokens is not None and len(stream) >= max_tokens:
            break
    return torch.tensor(stream[:max_tokens], dtype=torch.int64)


def windows(tokens: Tensor | Stream, n: int, length: int) -> Tensor:
    """Take ``n`` windows, spread evenly over the stream, that do not overlap: [n, length] int64."""
    if n < 1:
        raise ValueError(f"windows: n must be at least 1, got {n}")
    stream = _checked("windows", tokens, length)
    there = len(stream) // length
    if there < n:
        raise ValueError(
            f"windows: tokens must hold {n} windows of {length} tokens, got {len(stream)} tokens"
        )
    return torch.stack([stream.window(i * there // n * length, length) for i in range(n)])


class Batches:
    """Endless shuffled windows of a token stream: [batch_size, length] int64, every window once an epoch.

    The stream is cut into consecutive windows; a tail shorter than a window is left out. The order of an epoch
    depends only on the seed and the number of the epoch. A batch may span two epochs. So one integer says exactly
    where a run stands, whoever reads it: processes that share the batches count the same windows, and each gets
    its own rows of every batch.

    In a `Mixture` each stream has epochs of its own. Of ten thousand windows in a row, from a multiple of ten thousand
    on, each stream gives its share, in an order that depends on the seed. An epoch's order takes 8 bytes of memory a
    window; tokens that lie on the disk are read when their window is drawn.

    Args:
        tokens: [tokens] int64, a stream, or a mixture of them.
        batch_size: windows in a batch, over all processes.
        length: tokens in a window.
        seed: decides the order of every epoch.
        rows: those of every batch that are read here; all by default.
    """

    def __init__(
        self, tokens: Tokens, batch_size: int, length: int, seed: int = 0, rows: range | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {batch_size}")
        streams = tokens.streams if isinstance(tokens, Mixture) else [tokens]
        self._streams = [_checked("Batches", stream, length) for stream in streams]
        self._turns = _Turns(tokens.counts, seed) if isinstance(tokens, Mixture) else None
        self.batch_size = batch_size
        self.length = length
        self.rows = range(batch_size) if rows is None else rows
        self._drawn = 0  # windows handed out since the beginning, to all processes
        purposes = (
            [f"batches/{seed}/{i}" for i in range(len(streams))] if self._turns else [f"batches/{seed}"]
        )
        self._orders = [
            _Order(len(stream) // length, purpose)
            for stream, purpose in zip(self._streams, purposes, strict=True)
        ]

    @property
    def windows_per_epoch(self) -> int:
        """How many windows there are, in all streams together."""
        return sum(self.windows_of)

    @property
    def windows_of(self) -> list[int]:
        """How many windows each stream has."""
        return [order.count for order in self._orders]

    @property
    def last(self) -> range:
        """The draws of the batch that was handed out last, of this process."""
        first = self._drawn - self.batch_size
        return range(first + self.rows.start, first + self.rows.stop)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        found = torch.stack([self.window(self._drawn + i) for i in self.rows])
        self._drawn += self.batch_size
        return found

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._drawn = int(state["drawn"])

    def window(self, draw: int) -> Tensor:
        """The tokens of a draw, counted from the beginning: [length] int64."""
        stream, index = self.place(draw)
        return self._streams[stream].window(index * self.length, self.length)

    def place(self, draw: int) -> tuple[int, int]:
        """(stream, which of its windows) of a draw."""
        stream, own_draw = self._turns(draw) if self._turns else (0, draw)
        return stream, self._orders[stream](own_draw)


class _Order:
    """The windows of a stream, shuffled anew in each epoch."""

    def __init__(self, count: int, purpose: str) -> None:
        self.count, self._purpose = count, purpose
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, draw: int) -> int:
        epoch, place = divmod(draw, self.count)
        if epoch != self._epoch:
            self._order = torch.randperm(self.count, generator=seeded(f"{self._purpose}/{epoch}"))
            self._epoch = epoch
        return int(self._order[place])


class _Turns:
    """Which stream of a mixture each draw is from."""

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._counts, self._seed = torch.tensor(counts), seed
        self._block, self._stream, self._own = -1, torch.empty(0), torch.empty(0)

    def __call__(self, draw: int) -> tuple[int, int]:
        """(the stream, how many were drawn from it before)."""
        block, place = divmod(draw, _BLOCK)
        if block != self._block:
            shuffled = torch.randperm(_BLOCK, generator=seeded(f"mixture/{self._seed}/{block}"))
            self._stream = torch.arange(len(self._counts)).repeat_interleave(self._counts)[shuffled]
            self._own = torch.empty_like(self._stream)
            for stream, count in enumerate(self._counts.tolist()):
                self._own[self._stream == stream] = torch.arange(block * count, (block + 1) * count)
            self._block = block
        return int(self._stream[place]), int(self._own[place])


def seeded(purpose: str) -> torch.Generator:
    """A CPU generator whose seed is a hash of ``purpose``, so that no two purposes share random numbers."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big"))


def _groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def held(tokens: Tensor | Stream) -> Stream:
    """A stream of a tensor; a stream is passed on."""
    return _Held(tokens) if isinstance(tokens, Tensor) else tokens


def _checked(name: str, tokens: Tensor | Stream, length: int) -> Stream:
    if length < 2:
        raise ValueError(f"{name}: length must be at least 2, got {length}")
    if isinstance(tokens, _Held):
        tokens = tokens.tokens
    if isinstance(tokens, Tensor) and (tokens.dim() != 1 or tokens.dtype != torch.int64):
        raise ValueError(
            f"{name}: tokens must be a stream [tokens] int64, got {list(tokens.shape)} {tokens.dtype}"
        )
    if len(tokens) < length:
        raise ValueError(f"{name}: tokens must hold at least {length} tokens, got {len(tokens)}")
    return held(tokens)


def _listed(weights: Iterable[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)
