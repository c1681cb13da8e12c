"""What one process does: it reads a unit, tokenises its documents and writes them as files. No torch here.

A unit gives files in the order of its documents; a file is finished when it is full, and the unit can be taken up
again after it. Which bytes they hold depends on nothing but the unit and the settings.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from flextron.documents.reading import Part, read_part
from flextron.documents.splitting import rank_of

LONGEST = 1 << 20  # characters in a document; longer ones are cut into several
# Documents that are tokenised at a time, and characters that they have; no more of these than tokens in a file.
_GROUP, _GROUP_CHARACTERS = 256, 1 << 18
SIDES = ("train", "held_out")

Message = dict[str, Any]
Encoder = Callable[[Sequence[str]], Iterable[Sequence[int]]]


@dataclass(frozen=True)
class Settings:
    """What is the same for all units.

    Attributes:
        folder: where the files are written.
        model: directory or id that the tokenizer is read from, if it has no ``backend``.
        backend: the tokenizer as JSON of the library ``tokenizers``.
        before, after: tokens to put before and after each document.
        dtype: the numbers' numpy name.
        border: documents whose hash is at most this are held out.
        shard_tokens: tokens after which a file is full.
        sides: (texts to train on, texts to hold out): a corpus that is one document, cut; else None.
    """

    folder: str
    model: str
    backend: str | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: str
    border: float
    shard_tokens: int
    sides: tuple[tuple[str, ...], tuple[str, ...]] | None = None


def encoder_of(settings: Settings) -> Encoder:
    """A function from texts to their tokens, none added."""
    if settings.backend is None:  # a tokenizer in Python alone
        from flextron.checkpoint.hf import read_tokenizer

        tokenizer = read_tokenizer(settings.model)
        return lambda texts: tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(settings.backend)
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: (e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False))


def tokenised(
    settings: Settings, encode: Encoder, number: int, unit: Sequence[Part], read: int, part: int
) -> Iterator[Message]:
    """Tokenise a unit.

    Args:
        encode: from `encoder_of`.
        number: the unit's number, which its files are named by.
        unit: its parts.
        read: documents to skip, which earlier files hold.
        part: number of the next file.

    Yields:
        ``{"tokens", "characters"}`` after each group of documents, and ``{"record"}`` after each finished file.
    """
    if settings.sides is None:
        documents = chain.from_iterable(read_part(p, LONGEST) for p in unit)
        sided = ((rank := rank_of(d), rank <= settings.border, d) for d in documents)
    else:
        train, held_out = settings.sides
        sided = ((float(side), side, d) for side, texts in ((False, train), (True, held_out)) for d in texts)
    groups = _groups(islice(sided, read, None), min(_GROUP_CHARACTERS, settings.shard_tokens))
    group = next(groups, None)
    while True:  # at least one record, if only of a unit without documents
        record: dict[str, Any] = {"unit": number, "part": part, "documents": 0, "characters": 0, "ranks": []}
        writers = [_Writer(settings, f"{side}-{number:05d}-{part:04d}.bin") for side in SIDES]
        try:
            while group is not None and writers[0].tokens < settings.shard_tokens:
                characters = sum(len(document) for _, _, document in group)
                tokens = _write(settings, encode, group, writers)
                record["documents"] += len(group)
                record["characters"] += characters
                record["ranks"] = ends_of([*record["ranks"], *(rank for rank, _, _ in group)])
                yield {"tokens": tokens, "characters": characters}
                group = next(groups, None)
            read += record["documents"]
            record |= {side: writer.finish() for side, writer in zip(SIDES, writers, strict=True)}
        finally:
            for writer in writers:
                writer.discard()
        yield {"record": record | {"read": read, "last": group is None}}
        if group is None:
            return
        part += 1


def ends_of(ranks: Iterable[float]) -> list[float]:
    """The lowest, the second highest and the highest of these numbers, each once: what `border_between` needs."""
    ordered = sorted(set(ranks))
    return ordered if len(ordered) <= 3 else [ordered[0], *ordered[-2:]]


def _groups(
    sided: Iterable[tuple[float, bool, str]], characters: int
) -> Iterator[list[tuple[float, bool, str]]]:
    group: list[tuple[float, bool, str]] = []
    size = 0
    for one in sided:
        if group and (len(group) == _GROUP or size + len(one[2]) > characters):
            yield group
            group, size = [], 0
        group.append(one)
        size += len(one[2])
    if group:
        yield group


def _write(
    settings: Settings, encode: Encoder, group: list[tuple[float, bool, str]], writers: Sequence[_Writer]
) -> int:
    found: tuple[list[int], list[int]] = ([], [])
    for (_, held_out, _), ids in zip(group, encode([d for _, _, d in group]), strict=True):
        found[held_out].extend((*settings.before, *ids, *settings.after))
    for writer, ids in zip(writers, found, strict=True):
        writer.write(np.array(ids, settings.dtype))
    return sum(map(len, found))


class _Writer:
    """Writes one file beside its place; it is there when it is whole."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.path = Path(settings.folder, name)
        self.tokens = 0
        self._temporary = self.path.with_name(f".{name}.{os.getpid()}.tmp")
        self._digest = hashlib.sha256()
        self._file: Any = None

    def write(self, ids: np.ndarray) -> None:
        if not len(ids):
            return
        with whole(self.path):
            if self._file is None:
                self._file = self._temporary.open("wb")
            self._file.write(ids.data)
        self._digest.update(ids.data)
        self.tokens += len(ids)

    def finish(self) -> dict[str, Any] | None:
        """Give the file its place; what `Shard` holds, or None where there was no token."""
        if self._file is None:
            return None
        with whole(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
        return {"file": self.path.name, "tokens": self.tokens, "sha256": self._digest.hexdigest()}

    def discard(self) -> None:
        """Remove what was not finished."""
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


class whole:
    """Turns an error of the system into a sentence about the file that cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise ValueError(
                f"tokenize: {self.path} must be written whole, got {reason[:1].lower()}{reason[1:]}"
            ) from None
