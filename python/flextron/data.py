"""Text and tokens: reading documents, the corpus every CPython carries, and windows of a token stream."""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WHOLE = (".txt", ".md")  # one document
TEXT_SUFFIXES = (*_WHOLE, ".jsonl", ".json", ".csv", ".parquet")
_HUB = "hf:"
_LONGEST_FIELD = (
    2**31 - 1
)  # characters in a field of a .csv file; the csv module's own limit, 131072, is too low for documents


def _unzst(path: Path) -> io.BytesIO:
    """The content of a .zst file, whole; the library's own reader does not notice that a file is truncated."""
    zstandard, content = _library("zstandard", path), path.read_bytes()
    parts: list[bytes] = []
    while content or not parts:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(content))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        if not frame.eof:
            raise EOFError("a truncated file")
        content = frame.unused_data
    return io.BytesIO(b"".join(parts))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".zst": _unzst,
}
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)

# Folders below the standard library that hold test data or other packages, not documentation.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
_PROSE_SHARE = 0.85  # letters and spaces in a paragraph; code, tables and grammar rules fall below it
_SHORTEST_PARAGRAPH = 40  # characters; shorter ones are headings and signatures
_SHORTEST_DOCUMENT = 200  # characters


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


def read_documents(source: str | Path | Text) -> list[str]:
    """Read the documents in a file, in a folder (every known file, in the order of the paths), or in a dataset.

    A ``.txt`` or ``.md`` file is one document. A ``.jsonl`` file has one in each line, a ``.json`` file one in each
    object (or string) of its list, ``.csv`` and ``.parquet`` files one in each row, in the field that `Text` names. Any
    file may be compressed (``.xz``, ``.gz``, ``.zst``). ``"-"`` reads standard input: as lines of JSON if the first
    line is a JSON object, else as one document. ``"hf:owner/name[split]"`` or ``"hf:owner/name:config[split]"`` loads a
    dataset with the ``datasets`` library; the split is ``train`` by default. Blank documents and missing values are
    dropped.

    Raises:
        FileNotFoundError: nothing is at the path.
        ModuleNotFoundError: a library of the extra ``data`` is needed and not installed.
        ValueError: the kind of a file is unknown, a file is damaged or not UTF-8, a line has no text, the field is
            missing or ambiguous, or there is no document at all.
    """
    path, field = (source.path, source.field) if isinstance(source, Text) else (source, None)
    if str(path) == "-":
        found = _standard_input(field)
    elif str(path).startswith(_HUB):
        found = _dataset(str(path), field)
    else:
        found = _below(Path(path), field)
    documents = [d for d in found if d and d.strip()]
    if not documents:
        raise ValueError(f"read_documents: path must hold text ({_kinds()}), got none in {path}")
    return documents


def stdlib_documents() -> list[str]:
    """The English documentation that comes with CPython, one document for each topic and module.

    Language topics (``pydoc_data/topics.py``) come first, then the docstrings of each module of the standard
    library. Files are parsed, never imported. Only paragraphs of prose are kept, each once. Files are read in the
    order of their names, so one version of Python always gives the same corpus.

    Raises:
        ValueError: this Python was installed without the sources of its library.
    """
    return list(_stdlib(Path(sysconfig.get_path("stdlib"))))


def split_documents(documents: Sequence[str], held_out: float = 0.05) -> tuple[list[str], list[str]]:
    """Split documents into (train, validation) by a hash of their text, so that equal texts stay together.

    A document keeps its side when others are added. If one side would be empty, the document nearest to the border
    changes sides. A single document is cut at a paragraph near its end.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"split_documents: held_out must lie between 0 and 1, got {held_out}")
    if not documents:
        raise ValueError("split_documents: documents must not be empty, got []")
    ranks = {d: _rank(d) for d in documents}
    if len(ranks) == 1:
        return _cut(documents[0], held_out)
    border = max(held_out, min(ranks.values()))
    if border >= max(ranks.values()):
        border = sorted(ranks.values())[-2]
    train = [d for d in documents if ranks[d] > border]
    return train, [d for d in documents if ranks[d] <= border]


def encode(documents: Iterable[str], tokenizer: Any, max_tokens: int | None = None) -> Tensor:
    """Tokenise documents into one stream, [tokens] int64, with EOS after each document if the tokenizer has one.

    BOS precedes each document if the tokenizer itself would put it there. At most ``max_tokens`` tokens are kept, and
    reading stops when they are full.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"encode: max_tokens must be at least 1, got {max_tokens}")
    before, after = _separators(tokenizer)
    stream: list[int] = []
    for group in _groups(documents, 64):
        # verbose=False: a document longer than the model's context is no mistake here.
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*before, *ids, *after]
        if max_tokens is not None and len(stream) >= max_tokens:
            break
    return torch.tensor(stream[:max_tokens], dtype=torch.int64)


def windows(tokens: Tensor, n: int, length: int) -> Tensor:
    """Take ``n`` windows, spread evenly over the stream, that do not overlap: [n, length] int64."""
    if n < 1:
        raise ValueError(f"windows: n must be at least 1, got {n}")
    _check_stream("windows", tokens, length)
    there = len(tokens) // length
    if there < n:
        raise ValueError(
            f"windows: tokens must hold {n} windows of {length} tokens, got {len(tokens)} tokens"
        )
    return tokens[: there * length].view(there, length)[torch.arange(n) * there // n]


class Batches:
    """Endless shuffled windows of a token stream: [batch_size, length] int64, every window once an epoch.

    The stream is cut into consecutive windows; a tail shorter than a window is left out. The order of an epoch
    depends only on the seed and the number of the epoch. A batch may span two epochs. So one integer says exactly
    where a run stands, whoever reads it: processes that share the batches count the same windows, and each gets
    its own consecutive rows of every batch (see `rows_of`).

    Args:
        tokens: [tokens] int64.
        batch_size: windows in a batch, over all processes.
        length: tokens in a window.
        seed: decides the order of every epoch.
        part: (rank, size): the process that reads, and how many there are; its batches have only its rows.
    """

    def __init__(
        self, tokens: Tensor, batch_size: int, length: int, seed: int = 0, part: tuple[int, int] = (0, 1)
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"Batches: batch_size must be at least 1, got {batch_size}")
        _check_stream("Batches", tokens, length)
        self.batch_size = batch_size
        self.rows = rows_of(batch_size, *part)
        self.seed = seed
        self._windows = tokens[: len(tokens) // length * length].view(-1, length)
        self._drawn = 0  # windows handed out since the beginning
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    @property
    def windows_per_epoch(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        rows = [self._row(self._drawn + i) for i in self.rows]
        self._drawn += self.batch_size
        return self._windows[rows]

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._drawn = int(state["drawn"])

    def _row(self, draw: int) -> int:
        epoch, place = divmod(draw, self.windows_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self.windows_per_epoch, generator=seeded(f"batches/{self.seed}/{epoch}"))
            self._epoch, self._order = epoch, order
        return int(self._order[place])


def rows_of(batch_size: int, rank: int, size: int) -> range:
    """The rows of a batch that are the part of process ``rank`` of ``size``: consecutive, at most one more or less.

    The parts of all processes are the batch. A mean over all its rows is that of the parts' means, weighted by their
    lengths.
    """
    if not 0 <= rank < size:
        raise ValueError(f"Batches: part must be a process and how many there are, got {rank} of {size}")
    if batch_size < size:
        raise ValueError(
            f"Batches: batch_size must be at least 1 for each of the {size} processes, got {batch_size} in all"
        )
    return range(rank * batch_size // size, (rank + 1) * batch_size // size)


def seeded(purpose: str) -> torch.Generator:
    """A CPU generator whose seed is a hash of ``purpose``, so that no two purposes share random numbers."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big"))


def _kinds() -> str:
    return ", ".join(TEXT_SUFFIXES) + "; alone or with " + ", ".join(filter(None, _OPENERS))


def _kind(path: Path) -> tuple[str, str] | None:
    """(kind of text, compression) by the name of the file; a compressed file without another suffix is plain text."""
    packed = path.suffix.lower() if path.suffix.lower() in _OPENERS else ""
    suffix = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return suffix, packed
    return (".txt", packed) if packed and not suffix else None


def _below(path: Path, field: str | None) -> list[str | None]:
    """The documents in a file or folder."""
    if not path.exists():
        raise FileNotFoundError(f"read_documents: path must exist, got {path}")
    files = sorted(f for f in path.rglob("*") if _kind(f) and f.is_file()) if path.is_dir() else [path]
    if field is not None and files and all((_kind(f) or ("",))[0] in _WHOLE for f in files):
        raise ValueError(
            f"read_documents: field must be given for files that have fields, got {field!r} for {path}"
        )
    return [d for file in files for d in _read_file(file, field)]


def _read_file(path: Path, field: str | None) -> list[str | None]:
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"read_documents: path must be a text file ({_kinds()}), got {path}")
    suffix, packed = kind
    try:
        with _OPENERS[packed](path) as file:
            content = file.read()
    except _DAMAGED as error:
        raise ValueError(
            f"read_documents: {path} must be readable, got {error or type(error).__name__}"
        ) from None
    if suffix == ".parquet":
        return _parquet(path, content, field)
    text = _utf8(path, content)
    if suffix in _WHOLE:
        return [text]
    return {".jsonl": _json_lines, ".json": _json, ".csv": _csv}[suffix](path, text, field)


def _utf8(path: str | Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"read_documents: {path} must be UTF-8 text, got another byte at {error.start}"
        ) from None


def _json_lines(path: str | Path, text: str, field: str | None) -> list[str | None]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = (
        (f"line {i} of {path}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()
    )
    return _texts(((place, _parsed(line), line) for place, line in lines), field)


def _json(path: Path, text: str, field: str | None) -> list[str | None]:
    records = _parsed(text)
    if records is None:  # lines of JSON are often named .json
        return _json_lines(path, text, field)
    records = records if isinstance(records, list) else [records]
    return _texts(((f"entry {i} of {path}", r, json.dumps(r)) for i, r in enumerate(records, start=1)), field)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _texts(records: Iterable[tuple[str, Any, str]], field: str | None) -> list[str | None]:
    """The texts in records (place, JSON value, source text); a value is an object that holds the text, or a string."""
    records = list(records)
    objects = [record for _, record, _ in records if isinstance(record, dict)]
    if field is None and objects and not any("text" in record for record in objects):
        names = dict.fromkeys(key for record in objects for key in record)
        strings = [key for key in names if any(isinstance(record.get(key), str) for record in objects)]
        field = _field(records[0][0], names, strings, None)
    found: list[str | None] = []
    for place, record, shown in records:
        value = record.get(field or "text", 0) if isinstance(record, dict) else record
        if not (isinstance(value, str) or (value is None and isinstance(record, dict))):
            raise ValueError(
                f'read_documents: {place} must be a JSON object with a "{field or "text"}" string, got {shown[:60]!r}'
            )
        if value is not None:
            _check_encodable(place, value)
        found.append(value)
    return found


def _check_encodable(place: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair, which no tokenizer takes
        raise ValueError(
            f"read_documents: {place} must hold Unicode text, got half of a surrogate pair at {error.start}"
        ) from None


def _csv(path: Path, text: str, field: str | None) -> list[str | None]:
    longest = csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names, rows = list(reader.fieldnames or ()), list(reader)
        strings = [name for name in names if not all(_is_number(row[name]) for row in rows)]
        field = _field(path, names, strings, field)
        return [row[field] for row in rows]
    except csv.Error as error:
        raise ValueError(f"read_documents: {path} must be readable, got {error}") from None
    finally:
        csv.field_size_limit(longest)


def _is_number(value: str | None) -> bool:
    """Whether a cell of a .csv file is a number or empty; such files have no types."""
    try:
        return not value or float(value) is not None
    except ValueError:
        return False


def _parquet(path: Path, content: bytes, field: str | None) -> list[str | None]:
    arrow, parquet = (_library(name, path) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        file = parquet.ParquetFile(arrow.BufferReader(content))
        kinds = {c.name: c.type for c in file.schema_arrow}
        strings = [n for n, t in kinds.items() if arrow.types.is_string(t) or arrow.types.is_large_string(t)]
        field = _field(path, kinds, strings, field)
        return file.read(columns=[field]).column(field).to_pylist()
    except arrow.ArrowException as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"read_documents: {path} must be readable, got {reason}") from None


def _dataset(source: str, field: str | None) -> list[str | None]:
    """``hf:name[split]``, ``hf:name:config[split]``."""
    found = re.fullmatch(_HUB + r"([^\[\]:]+)(?::([^\[\]]+))?(?:\[(.+)\])?", source)
    if not found:
        raise ValueError(f"read_documents: a dataset must be named as hf:owner/name[split], got {source}")
    name, config, split = found.groups()
    datasets = _library("datasets", source)
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split or "train")
    except (
        Exception
    ) as error:  # network, hub, file system, builder: the library's errors have no common base class
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ValueError(
            f"read_documents: {source} must be a dataset that can be read, got: {reason}"
        ) from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    kinds = {n: getattr(kind, "dtype", None) for n, kind in rows.features.items()}
    strings = [n for n, kind in kinds.items() if kind in ("string", "large_string")]
    return list(rows[_field(source, kinds, strings, field)])


@cache  # a stage may read its text more than once, but a pipe can be read only once
def _piped() -> bytes:
    return sys.stdin.buffer.read()


def _standard_input(field: str | None) -> list[str | None]:
    text = _utf8("standard input", _piped())
    first = next((line for line in text.split("\n") if line.strip()), "")
    if field is not None or isinstance(_parsed(first), dict):
        return _json_lines("standard input", text, field)
    return [text]


def _field(place: str | Path, names: Iterable[str], strings: Sequence[str], field: str | None) -> str:
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


def _library(name: str, source: str | Path) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"read_documents: {source} needs {error.name}; pip install 'flextron[data]'", name=error.name
        ) from None


@cache  # parsing takes about five seconds, and a run needs it more than once
def _stdlib(root: Path) -> tuple[str, ...]:
    seen: set[str] = set()
    documents = [*_topics(root / "pydoc_data" / "topics.py"), *_modules(root)]
    kept = [prose for text in documents if len(prose := _prose(text, seen)) >= _SHORTEST_DOCUMENT]
    if not kept:
        raise ValueError(
            f"stdlib_documents: the standard library must come with its sources, got none in {root}"
        )
    return tuple(kept)


def _topics(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).values()


def _modules(root: Path) -> Iterator[str]:
    """The docstrings of each module, joined in the order in which they stand."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - _SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                yield from _module(Path(folder, name))


def _module(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and samples of bad code
        return
    yield "\n\n".join(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield text
        for child in node.body:
            yield from _docstrings(child)


def _prose(text: str, seen: set[str]) -> str:
    """The paragraphs of prose in ``text`` that are not in ``seen`` yet; they are added to it."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        key = " ".join(paragraph.split())
        if len(key) < _SHORTEST_PARAGRAPH or key in seen or ">>>" in key:
            continue
        if sum(c.isalpha() or c == " " for c in key) >= _PROSE_SHARE * len(key):
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def _rank(document: str) -> float:
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:6], "big") / 2**48


def _cut(document: str, held_out: float) -> tuple[list[str], list[str]]:
    place = round(len(document) * (1 - held_out))
    # Cut at the next paragraph, else line, else word, if that leaves something to hold out.
    for mark in ("\n\n", "\n", " "):
        found = document.find(mark, place)
        if 0 < found < len(document.rstrip()):
            return [document[:found]], [document[found:]]
    raise ValueError(f"split_documents: documents must hold text to part, got {document[:60]!r}")


def _separators(tokenizer: Any) -> tuple[list[int], list[int]]:
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    begins = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
    return [bos] if bos is not None and begins else [], [] if eos is None else [eos]


def _groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _check_stream(name: str, tokens: Tensor, length: int) -> None:
    if length < 2:
        raise ValueError(f"{name}: length must be at least 2, got {length}")
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(
            f"{name}: tokens must be a stream [tokens] int64, got {list(tokens.shape)} {tokens.dtype}"
        )
    if len(tokens) < length:
        raise ValueError(f"{name}: tokens must hold at least {length} tokens, got {len(tokens)}")
