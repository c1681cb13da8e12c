"""How sources are divided into units of work: by what they are alone, whoever does the work and in what order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from flextron.documents.datasets import DATASET, dataset_parts, pinned
from flextron.documents.files import WHOLE, kind_of, kinds
from flextron.documents.formats import opened_parquet, parquet_errors
from flextron.documents.reading import Part, Text, files_below

# bytes of text in a unit: a 64th of them all, so that processes have something to share, within these bounds
_SMALLEST, _LARGEST, _UNITS = 1 << 22, 1 << 27, 64

Source = str | Path | Text


class Plan(NamedTuple):
    """What there is to do.

    Attributes:
        units: each a list of parts, which one process reads one after the other.
        sources: each source, with what tells whether it has changed.
    """

    units: list[list[Part]]
    sources: list[dict[str, Any]]


def plan_of(sources: Sequence[Source]) -> Plan:
    """Divide sources into units, in their order.

    Lines of .jsonl, .txt and .md files and row groups of .parquet files are divided; other files, and compressed ones,
    are read by one process each. Small files are read together. A dataset has a unit for each of its files.

    Raises:
        FileNotFoundError, ValueError: a source is nothing that can be read.
    """
    found = [source if isinstance(source, Text) else Text(source) for source in sources]
    if not found:
        raise ValueError("tokenize: sources must be given, got none")
    facts, whole = [], []
    for source in found:
        own, parts = _dataset(source) if str(source.path).startswith(DATASET) else _files(source)
        facts.append(own)
        whole.append(parts)
    total = sum(size for parts in whole for _, size in parts)
    size = min(max(total // _UNITS, _SMALLEST), _LARGEST)
    return Plan([unit for parts in whole for unit in _grouped(parts, size)], facts)


def _dataset(source: Text) -> tuple[dict[str, Any], list[tuple[Part, int]]]:
    name = pinned(str(source.path))
    count = dataset_parts(name, source.field)
    parts = [(Part(name, source.field, number, count), 0) for number in range(count)]
    return {"path": name, "field": source.field, "parts": count}, parts


def _files(source: Text) -> tuple[dict[str, Any], list[tuple[Part, int]]]:
    path = Path(source.path)
    if str(path) == "-":
        raise ValueError("tokenize: sources must be files, folders or datasets, got - (standard input)")
    files = files_below(path, source.field)
    digest, total = hashlib.sha256(), 0
    parts = []
    for file in files:
        if kind_of(file) is None:
            raise ValueError(f"read_documents: path must be a text file ({kinds()}), got {file}")
        state = file.stat()
        total += state.st_size
        name = file.relative_to(path).as_posix()
        digest.update(json.dumps([name, state.st_size, state.st_mtime_ns]).encode())
        parts.append((Part(str(file.absolute()), source.field), state.st_size))
    if not files:
        raise ValueError(f"read_documents: path must hold text ({kinds()}), got none in {path}")
    facts = {
        "path": str(source.path),
        "field": source.field,
        "files": len(files),
        "bytes": total,
        "state": digest.hexdigest(),
    }
    return facts, parts


def _grouped(parts: Sequence[tuple[Part, int]], size: int) -> Iterator[list[Part]]:
    """Units of about ``size`` bytes: large files divided, small ones together."""
    unit: list[Part] = []
    filled = 0
    for part, bytes_ in (piece for whole in parts for piece in _divided(*whole, size)):
        if unit and (filled + bytes_ > size or bytes_ == 0):
            yield unit
            unit, filled = [], 0
        unit.append(part)
        filled += bytes_
    if unit:
        yield unit


def _divided(part: Part, bytes_: int, size: int) -> Iterator[tuple[Part, int]]:
    """The part in pieces of about ``size`` bytes, where it can be divided."""
    kind = ("", "") if part.path.startswith(DATASET) else kind_of(Path(part.path)) or ("", "")
    if kind == (".parquet", ""):
        yield from _row_groups(part, size)
    elif bytes_ > size and kind in {(suffix, "") for suffix in (".jsonl", *WHOLE)}:
        count = -(-bytes_ // size)
        ends = [bytes_ * i // count for i in range(count)] + [bytes_]
        for start, stop in pairwise(ends):
            yield Part(part.path, part.field, start, stop), stop - start
    else:
        yield part, bytes_


def _row_groups(part: Part, size: int) -> Iterator[tuple[Part, int]]:
    path = Path(part.path)
    with parquet_errors(path):
        metadata = opened_parquet(path, path).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    start = filled = 0
    for number, bytes_ in enumerate(sizes):
        if filled and filled + bytes_ > size:
            yield Part(part.path, part.field, start, number), filled
            start, filled = number, 0
        filled += bytes_
    yield Part(part.path, part.field, start, len(sizes)), filled
