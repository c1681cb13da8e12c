"""A folder of tokens: ``tokens.json`` says what its ``.bin`` files are, and the tokens stay on the disk.

A ``.bin`` file is nothing but little-endian uint16 or uint32 numbers, so ``numpy.memmap(path, "<u2")`` shows it, too.
Training reads a window at a time from its place in a file: memory does not grow with the tokens, and a file that was
cut short is an error, not a dead process.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextron.checkpoint import CheckpointError, checksum_of, read_json
from flextron.checkpoint.schema import build
from flextron.data import separators

TOKENS_FILE = "tokens.json"
PROGRESS = ".progress"  # folder of what an unfinished run has done
PLAN = "plan.json"  # in there
FORMAT = 1
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
_OPEN_FILES = 64  # of a stream, at most


@dataclass(frozen=True)
class Shard:
    """One ``.bin`` file: its name, how many tokens it holds, and its sha256."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class TokenizerIdentity:
    """What tells tokenizers apart.

    Attributes:
        vocabulary: how many tokens it has.
        sha256: a hash of what it does, however its files are written.
        before, after: the tokens that were put before and after each document.
    """

    vocabulary: int
    sha256: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """What ``tokens.json`` holds.

    Attributes:
        format: version of this description.
        tokenizer: what the text was tokenised with.
        sources: what was read, as it was named, with what tells whether it has changed.
        share: how much of the documents was to be held out.
        shard_tokens: tokens after which another file begins.
        dtype: type of the numbers in the files: uint16 or uint32.
        border: documents whose hash is at most this are held out; the share, unless that left one side empty.
        documents: how many were tokenised, those that are held out included.
        characters: how many they have.
        train, held_out: the files of both sides, in the order of the stream.
    """

    format: int
    tokenizer: TokenizerIdentity
    sources: tuple[dict[str, Any], ...]
    share: float
    shard_tokens: int
    dtype: str
    border: float
    documents: int
    characters: int
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {self.format}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        for shard in (*self.train, *self.held_out):
            if Path(shard.file).name != shard.file or shard.tokens < 1:
                raise ValueError(
                    f"files must lie in the folder and hold tokens, got {shard.file} of {shard.tokens}"
                )


def identity_of(tokenizer: Any) -> TokenizerIdentity:
    """The identity of a tokenizer; the same for its copy that was saved and loaded again."""
    before, after = separators(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        facts: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        facts = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # settings of the last call
            facts.pop(name, None)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return TokenizerIdentity(len(tokenizer), digest, tuple(before), tuple(after))


@contextmanager
def mended() -> Iterator[None]:
    """An error of a damaged folder says what mends it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; `flextron tokenize` with --restart (restart=True) writes the folder anew"
        ) from None


def is_token_folder(path: Any) -> bool:
    """Whether this names a folder of tokens, finished or not."""
    marks = (TOKENS_FILE, f"{PROGRESS}/{PLAN}")
    return isinstance(path, str | Path) and any((Path(path) / mark).is_file() for mark in marks)


class TokenFolder:
    """An opened folder of tokens.

    Attributes:
        path: the folder.
        description: what ``tokens.json`` holds.
        train, held_out: the streams of both sides.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder.

        Raises:
            CheckpointError: it is not finished, ``tokens.json`` is damaged, or a file is missing or has another size.
        """
        self.path = Path(path)
        if not (self.path / TOKENS_FILE).is_file() and is_token_folder(path):
            raise CheckpointError(
                f"{path}: must be whole, got a folder of tokens that is not finished; run the same "
                "`flextron tokenize` again to go on"
            )
        with mended():
            self.description = build(Description, read_json(self.path / TOKENS_FILE), self.path / TOKENS_FILE)
            d = self.description
            self.train = ShardStream(self.path, d.train, d.dtype)
            self.held_out = ShardStream(self.path, d.held_out, d.dtype)

    def verify(self, told: Callable[[int, int], object] = lambda *_: None) -> None:
        """Read every file, and refuse one that is not as it was written.

        Args:
            told: called with files done, and files in all.

        Raises:
            CheckpointError: it has other content.
        """
        shards = (*self.description.train, *self.description.held_out)
        for done, shard in enumerate(shards):
            told(done, len(shards))
            if checksum_of(self.path / shard.file) != shard.sha256:
                with mended():
                    raise CheckpointError(
                        f"{self.path / shard.file}: must be as it was written, got other content"
                    )
        told(len(shards), len(shards))

    def check(self, tokenizer: Any) -> None:
        """Refuse another tokenizer than the one that the text was tokenised with."""
        have, want = self.description.tokenizer, identity_of(tokenizer)
        if have != want:
            what = (
                f"one of {have.vocabulary} tokens instead of {want.vocabulary}"
                if have.vocabulary != want.vocabulary
                else "another one with as many tokens"
            )
            raise CheckpointError(
                f"{self.path}: its text must be tokenised with the model's tokenizer, got {what}; "
                "run `flextron tokenize` with --model as this one"
            )


class ShardStream:
    """The tokens of several files, in their order, read from the disk when they are asked for.

    Args:
        folder: where the files lie.
        shards: the files.
        dtype: uint16 or uint32.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: str) -> None:
        self.folder, self.shards = folder, tuple(shards)
        self._dtype = np.dtype(DTYPES[dtype])
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._file = lru_cache(_OPEN_FILES)(_Opened)
        for shard in shards:
            size = shard.tokens * self._dtype.itemsize
            path = folder / shard.file
            have = path.stat().st_size if path.is_file() else None
            if have != size:
                raise CheckpointError(
                    f"{path}: must be a file of {size} bytes, got {'none' if have is None else have}"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def checksum(self) -> str:
        """A hash of the recorded hashes: no token is read."""
        facts = [self._dtype.str, *([shard.tokens, shard.sha256] for shard in self.shards)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def window(self, start: int, length: int) -> Tensor:
        """The tokens from ``start`` on, over the borders of files: [length] int64."""
        found = np.empty(length, np.int64)
        done = 0
        while done < length:
            number = bisect_right(self._ends, start + done)
            shard = self.shards[number]
            within = start + done - (self._ends[number] - shard.tokens)
            count = min(length - done, shard.tokens - within)
            path, size = self.folder / shard.file, self._dtype.itemsize
            content = os.pread(self._file(path).handle, count * size, within * size)
            if len(content) != count * size:
                raise CheckpointError(
                    f"{path}: must hold {shard.tokens} tokens, got a file that was cut short"
                )
            found[done : done + count] = np.frombuffer(content, self._dtype)
            done += count
        return torch.from_numpy(found)


class _Opened:
    """A file that is open as long as this is kept."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)
