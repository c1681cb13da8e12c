"""Documents from a file, a folder, standard input or a dataset, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

from flextron.documents import files
from flextron.documents.datasets import DATASET, dataset_rows
from flextron.documents.files import TEXT_SUFFIXES, WHOLE, kind_of, kinds
from flextron.documents.formats import csv_file, json_file, json_lines, parquet_file, parsed
from flextron.documents.stdlib import STDLIB, stdlib_documents

__all__ = [
    "TEXT_SUFFIXES",
    "Part",
    "Text",
    "files_below",
    "has_fields",
    "pieces",
    "read_documents",
    "read_part",
]


@dataclass(frozen=True)
class Text:
    """Documents and the column that holds them: ``Text("reviews.parquet", field="body")``.

    Attributes:
        path: the file, folder or dataset, as `read_documents` takes it.
        field: the column, or the key of JSON objects, that holds the text. None takes ``"text"``, or else the only
            column of strings.
    """

    path: str | Path
    field: str | None = None


@dataclass(frozen=True)
class Part:
    """What one process reads at a time: a file or dataset, or a part of one.

    Attributes:
        path: the file or dataset.
        field: as in `Text`.
        start, stop: what is read of it: the lines that begin at these bytes of a .jsonl, .txt or .md file, row groups
            of a .parquet file; of a dataset, number ``start`` of ``stop`` parts.
    """

    path: str
    field: str | None = None
    start: int = 0
    stop: int | None = None


def read_documents(source: str | Path | Text) -> list[str]:
    """Read the documents in a file, in a folder (every known file, in the order of the paths), or in a dataset.

    Files and folders whose names begin with a dot are no part of a folder.
    A ``.txt`` or ``.md`` file is one document. A ``.jsonl`` file has one in each line, a ``.json`` file one in each
    object (or string) of its list, ``.csv`` and ``.parquet`` files one in each row, in the field that `Text` names. Any
    file may be compressed (``.xz``, ``.gz``, ``.zst``). ``"-"`` reads standard input: as lines of JSON if the first
    line is a JSON object, else as one document. ``"hf:owner/name[split]"`` or ``"hf:owner/name:config[split]"`` loads a
    dataset with the ``datasets`` library; the split is ``train`` by default. ``"python:docs"`` is what
    `stdlib_documents` finds. Blank documents and missing values are dropped.

    Raises:
        FileNotFoundError: nothing is at the path.
        ModuleNotFoundError: a library of the extra ``data`` is needed and not installed.
        ValueError: the kind of a file is unknown, a file is damaged or not UTF-8, a line has no text, the field is
            missing or ambiguous, or there is no document at all.
    """
    path, field = (source.path, source.field) if isinstance(source, Text) else (source, None)
    found: Iterable[str | None]
    if str(path) == "-":
        found = _standard_input(field)
    elif str(path).startswith(DATASET):
        found = dataset_rows(str(path), field)
    elif str(path) == STDLIB:
        _refuse_field(field, path)
        found = stdlib_documents()
    else:
        found = (d for file in files_below(Path(path), field) for d in _in_file(file, Part(str(file), field)))
    documents = [d for d in found if d and d.strip()]
    if not documents:
        raise ValueError(f"read_documents: path must hold text ({kinds()}), got none in {path}")
    return documents


def read_part(part: Part, longest: int) -> Iterator[str]:
    """The documents of a part, each read when it is asked for.

    A document of more than ``longest`` characters is cut into several, at the ends of paragraphs, see `pieces`; so the
    memory does not grow with the length of a .txt file.
    """
    if part.path.startswith(DATASET):
        found = dataset_rows(part.path, part.field, (part.start, part.stop or 1))
    else:
        found = _in_file(Path(part.path), part, longest)
    for document in found:
        if document and document.strip():
            if len(document) <= longest:
                yield document
                continue
            within = (document[i : i + longest] for i in range(0, len(document), longest))
            yield from (piece for piece in pieces(within, longest) if piece.strip())


def pieces(fragments: Iterable[str], longest: int) -> Iterator[str]:
    """Cut a text, which comes in fragments, into pieces of at most ``longest`` characters.

    A piece ends with a paragraph, else with a line, else with a word, if one ends in its second half.
    """
    text = ""
    for fragment in fragments:
        text += fragment
        while len(text) > longest:
            ends = (text.rfind(mark, longest // 2, longest) + len(mark) for mark in ("\n\n", "\n", " "))
            end = next((end for end in ends if end > longest // 2), longest)
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def files_below(path: Path, field: str | None) -> list[Path]:
    """The files of a source: the file itself, or every known one in a folder, without hidden files and folders."""
    if not path.exists():
        raise FileNotFoundError(f"read_documents: path must exist, got {path}")
    found = [path]
    if path.is_dir():
        shown = (f for f in path.rglob("*") if not any(p.startswith(".") for p in f.relative_to(path).parts))
        found = sorted(f for f in shown if kind_of(f) and f.is_file())
    if found and not any(map(has_fields, found)):
        _refuse_field(field, path)
    return found


def has_fields(source: str | Path) -> bool:
    """Whether documents of a source may lie in fields, of which a `Text` names one; of a folder, some may."""
    kind = kind_of(Path(source))
    return str(source) != STDLIB and (kind is None or kind[0] not in WHOLE)


def _refuse_field(field: str | None, path: str | Path) -> None:
    if field is not None:
        raise ValueError(
            f"read_documents: field must be given for files that have fields, got {field!r} for {path}"
        )


def _in_file(path: Path, part: Part, longest: int | None = None) -> Iterator[str | None]:
    """The documents in a part of a file; with ``longest``, a text comes in pieces."""
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"read_documents: path must be a text file ({kinds()}), got {path}")
    suffix, packed = kind
    start, stop, field = part.start, part.stop, part.field
    if suffix == ".parquet" and not packed:
        return parquet_file(path, None, field, start, stop)

    def whole(file: BinaryIO) -> Iterator[str]:
        decoded = files.text(path, files.blocks(file, start, stop), start)
        return iter(["".join(decoded)]) if longest is None else pieces(decoded, longest)

    def json(file: BinaryIO) -> Iterator[str | None]:
        head = partial(files.reading, path, packed, partial(files.lines, path))
        return json_lines(path, files.lines(path, file, start, stop), field, start, head)

    read = {
        ".jsonl": json,
        ".json": lambda file: json_file(path, file, field),
        ".csv": lambda file: csv_file(path, file, field),
        ".parquet": lambda file: parquet_file(path, file, field),
    }
    return files.reading(path, packed, read.get(suffix, whole))


@cache  # a stage may read its text more than once, but a pipe can be read only once
def _piped() -> bytes:
    return sys.stdin.buffer.read()


def _standard_input(field: str | None) -> Iterator[str | None]:
    text = "".join(files.text("standard input", [_piped()]))
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    if field is not None or isinstance(parsed(first), dict):
        return json_lines("standard input", ((0, line) for line in lines), field)
    return iter([text])
