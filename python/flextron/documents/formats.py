"""The documents in a stream of .jsonl, .json, .csv or .parquet: one record after the other, in bounded memory."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from flextron.documents.files import library, lines

# A field that is not named is looked for in the first records of a file: so many, or so many characters.
_AHEAD, _AHEAD_CHARACTERS = 1000, 1 << 24
_ROWS = 256  # of a .parquet file that are read at a time
_LONGEST_FIELD = (
    2**31 - 1
)  # characters in a field of a .csv file; the csv module's own limit, 131072, is too low for documents

Line = tuple[int, str]  # where it begins, in bytes; its text
Record = tuple[str, Any, str]  # where it stands, for messages; its JSON value; its source text


def json_lines(
    path: str | Path,
    found: Iterable[Line],
    field: str | None,
    start: int = 0,
    head: Callable[[], Iterator[Line]] | None = None,
) -> Iterator[str | None]:
    """One document in each line.

    Args:
        path: the file, for messages.
        found: the lines.
        field: the key that holds the text.
        start: byte that they begin at; lines of a file that is not read from its beginning have no numbers.
        head: the lines from the beginning of the file, which say what its field is.
    """
    if start and field is None and head is not None:
        _, field = _ahead(_records(path, head(), 0), None)
    yield from _texts(_records(path, found, start), field)


def _records(path: str | Path, found: Iterable[Line], start: int) -> Iterator[Record]:
    for number, (offset, line) in enumerate(found, start=1):
        if line.strip():
            place = f"the line at byte {offset} of {path}" if start else f"line {number} of {path}"
            yield place, parsed(line), line


def json_file(path: Path, file: BinaryIO, field: str | None) -> Iterator[str | None]:
    """One document in each entry of a list, which is read whole; lines of JSON are often named .json, too."""
    found = lines(path, file)
    first: list[Line] = []
    for line in found:
        first.append(line)
        if sum(bool(text.strip()) for _, text in first) == 2:
            break
    begun = [text for _, text in first if text.strip()]
    if len(begun) == 2 and parsed(begun[0]) is not None:  # more after a value: no JSON as a whole
        yield from json_lines(path, chain(first, found), field)
        return
    every = [*first, *found]
    records = parsed("".join(text for _, text in every))
    if records is None:
        yield from json_lines(path, every, field)
        return
    records = records if isinstance(records, list) else [records]
    yield from _texts(
        ((f"entry {i} of {path}", r, json.dumps(r)) for i, r in enumerate(records, start=1)), field
    )


def parsed(text: str) -> Any:
    """The JSON value that a text is; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _texts(records: Iterator[Record], field: str | None) -> Iterator[str | None]:
    """The texts in records; a value is an object that holds the text, or a string."""
    ahead, field = _ahead(records, field)
    for place, record, shown in chain(ahead, records):
        value = record.get(field or "text", 0) if isinstance(record, dict) else record
        if not (isinstance(value, str) or (value is None and isinstance(record, dict))):
            raise ValueError(
                f'read_documents: {place} must be a JSON object with a "{field or "text"}" string, got {shown[:60]!r}'
            )
        if value is not None:
            _check_encodable(place, value)
        yield value


def _ahead(records: Iterator[Record], field: str | None) -> tuple[list[Record], str | None]:
    """(records that were read for it, the field that holds the text); no field where none of them is an object."""
    ahead: list[Record] = []
    names: dict[str, None] = {}
    strings: dict[str, None] = {}
    size = 0
    while field is None and (record := next(records, None)) is not None:
        ahead.append(record)
        size += len(record[2])
        if isinstance(record[1], dict):
            if "text" in record[1]:
                return ahead, "text"
            names |= dict.fromkeys(record[1])
            strings |= {key: None for key, value in record[1].items() if isinstance(value, str)}
        if strings and (len(ahead) >= _AHEAD or size >= _AHEAD_CHARACTERS):
            break
    if field is None and any(isinstance(value, dict) for _, value, _ in ahead):
        field = chosen_field(ahead[0][0], names, [name for name in names if name in strings], None)
    return ahead, field


def _check_encodable(place: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair, which no tokenizer takes
        raise ValueError(
            f"read_documents: {place} must hold Unicode text, got half of a surrogate pair at {error.start}"
        ) from None


def csv_file(path: Path, file: BinaryIO, field: str | None) -> Iterator[str | None]:
    """One document in each row."""
    longest = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.DictReader(_csv_lines(path, file), strict=True)
        names = list(reader.fieldnames or ())
        ahead: list[dict[str, str | None]] = []
        strings: set[str] = set()
        wanted, size = field or "text", 0
        for row in reader if field is None or field in names else ():
            ahead.append(row)
            size += sum(len(row[name] or "") for name in names)
            strings |= {name for name in names if not _is_number(row[name])}
            full = len(ahead) >= _AHEAD or size >= _AHEAD_CHARACTERS
            if wanted in strings or (strings and full and field is None):
                break
        field = chosen_field(path, names, [name for name in names if name in strings], field)
        for row in chain(ahead, reader):
            yield row[field]
    except csv.Error as error:
        raise ValueError(f"read_documents: {path} must be readable, got {error}") from None
    finally:
        csv.field_size_limit(longest)


def _csv_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for _, line in lines(path, file):
        yield from io.StringIO(line, newline="") if "\r" in line else (line,)  # a lone \r ends a line, too


def _is_number(value: str | None) -> bool:
    """Whether a cell of a .csv file is a number or empty; such files have no types."""
    try:
        return not value or float(value) is not None
    except ValueError:
        return False


def parquet_file(
    path: Path, packed: BinaryIO | None, field: str | None, start: int = 0, stop: int | None = None
) -> Iterator[str | None]:
    """One document in each row.

    Args:
        path: the file.
        packed: its content, where the file itself is compressed as a whole; it is then read whole.
        field: the column that holds the text.
        start, stop: row groups to read.
    """
    arrow = library("pyarrow", path)
    with parquet_errors(path):
        table = opened_parquet(path if packed is None else arrow.BufferReader(packed.read()), path)
        types = {c.name: c.type for c in table.schema_arrow}
        strings = [n for n, t in types.items() if arrow.types.is_string(t) or arrow.types.is_large_string(t)]
        field = chosen_field(path, types, strings, field)
        groups = range(table.num_row_groups)[start:stop]
        for batch in table.iter_batches(_ROWS, groups, columns=[field]):
            yield from batch.column(0).to_pylist()


def opened_parquet(source: Any, path: Path) -> Any:
    """A file of the library pyarrow, which reads a row group a page at a time."""
    return library("pyarrow.parquet", path).ParquetFile(source, pre_buffer=False)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what the library says about a damaged file into one sentence."""
    arrow = library("pyarrow", path)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"read_documents: {path} must be readable, got {reason}") from None


def chosen_field(place: str | Path, names: Iterable[str], strings: Sequence[str], field: str | None) -> str:
    """The field that holds the text: the requested one, ``"text"``, or the only field of strings."""
    if field is None and "text" in strings:
        return "text"
    if field is None and len(strings) == 1:
        return strings[0]
    if field is not None and field in strings:
        return field
    wanted = '"text", or just one with strings' if field is None else f'"{field}", with strings'
    raise ValueError(
        f"read_documents: {place} must have a field {wanted}, got {', '.join(map(str, names)) or 'none'}"
        + "; Text(path, field) (on the command line --field) chooses" * (field is None and bool(strings))
    )
