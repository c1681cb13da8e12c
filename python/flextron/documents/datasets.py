"""Documents of a dataset that the library ``datasets`` reads: from the hub, or a folder as it would lie there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flextron.documents.files import library
from flextron.documents.formats import chosen_field
from flextron.sentences import first_line

DATASET = "hf:"
_MOST_PARTS = 64  # of a dataset that is downloaded; one that streams has a part for each of its files


class _Name(NamedTuple):
    name: str
    revision: str | None
    config: str | None
    split: str


def dataset_rows(source: str, field: str | None, part: tuple[int, int] | None = None) -> Iterator[str | None]:
    """The texts in the rows of a dataset.

    Args:
        source: ``hf:name[split]``, ``hf:name:config[split]``, either with ``@revision`` after the name.
        field: the column that holds the text.
        part: (number, how many): a part of the dataset, which then streams and is not downloaded as a whole. A split
            that is a slice or a sum cannot stream.
    """
    with _errors(source):
        rows = _loaded(source, streaming=part is not None)
    field = _text_column(source, rows, field)
    with _errors(source):
        if part is not None:
            rows = rows.shard(num_shards=part[1], index=part[0], contiguous=True)
        yield from (row[field] for row in rows.select_columns([field]))


def dataset_parts(source: str, field: str | None) -> int:
    """How many parts `dataset_rows` may be asked for; its split and column are checked."""
    with _errors(source):
        rows = _loaded(source, streaming=True)
    _text_column(source, rows, field)
    return max(1, rows.num_shards if hasattr(rows, "num_shards") else min(_MOST_PARTS, len(rows)))


def pinned(source: str) -> str:
    """The source at its present revision on the hub, so that all processes read the same; a folder has none."""
    parts = _parsed(source)
    if parts.revision is not None or Path(parts.name).exists():
        return source
    hub = library("huggingface_hub", source)
    with _errors(source):
        revision = hub.HfApi().dataset_info(parts.name).sha
    return f"{DATASET}{parts.name}@{revision}" + f":{parts.config}" * bool(parts.config) + f"[{parts.split}]"


def _parsed(source: str) -> _Name:
    found = re.fullmatch(DATASET + r"([^\[\]:@]+)(?:@([^\[\]:]+))?(?::([^\[\]]+))?(?:\[(.+)\])?", source)
    if not found:
        raise ValueError(f"read_documents: a dataset must be named as hf:owner/name[split], got {source}")
    return _Name(found[1], found[2], found[3], found[4] or "train")


def _loaded(source: str, streaming: bool) -> Any:
    name = _parsed(source)
    datasets = library("datasets", source)
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    streaming = streaming and re.fullmatch(r"\w+", name.split) is not None
    try:
        return datasets.load_dataset(
            name.name, name.config, split=name.split, revision=name.revision, streaming=streaming
        )
    finally:
        if shown:
            datasets.enable_progress_bars()


def _text_column(source: str, rows: Any, field: str | None) -> str:
    """The column of texts; where the dataset does not say what its columns are, its first row does."""
    with _errors(source):
        types = {name: getattr(kind, "dtype", None) for name, kind in (rows.features or {}).items()}
        if not types:
            types = {name: "string" * isinstance(value, str) for name, value in next(iter(rows), {}).items()}
    strings = [name for name, kind in types.items() if kind in ("string", "large_string")]
    return chosen_field(source, types, strings, field)


@contextmanager
def _errors(source: str) -> Iterator[None]:
    """Turn any error of network, hub, file system or builder, which have no base class in common, into a sentence."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("read_documents: "):  # a sentence already
            raise
        raise ValueError(
            f"read_documents: {source} must be a dataset that can be read, got: {first_line(error)}"
        ) from None
