"""Bytes of a file as they stream: its kind, whatever packs it, its lines, and UTF-8 that is checked."""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

WHOLE = (".txt", ".md")  # one document
TEXT_SUFFIXES = (*WHOLE, ".jsonl", ".json", ".csv", ".parquet")
_BLOCK = 1 << 20  # bytes that are read at a time


def library(name: str, source: str | Path) -> Any:
    """A library of the extra ``data``, which ``source`` needs."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"read_documents: {source} needs {error.name}; pip install 'flextron[data]'", name=error.name
        ) from None


class _Zst(io.RawIOBase):
    """The content of a .zst file; the library's own reader does not notice that a file is truncated."""

    def __init__(self, path: Path) -> None:
        self._library = library("zstandard", path)
        self._file = path.open("rb")
        self._frame: Any = None
        self._rest = self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._content:
            packed = self._rest or self._file.read(_BLOCK)
            if not packed:
                if self._frame is not None and self._frame.eof:
                    return 0
                raise EOFError("a truncated file")
            if self._frame is None or self._frame.eof:  # a file may hold several frames
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._content = self._frame.decompress(packed)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from None
            self._rest = self._frame.unused_data if self._frame.eof else b""
        taken = min(len(target), len(self._content))
        target[:taken], self._content = self._content[:taken], self._content[taken:]
        return taken

    def close(self) -> None:
        self._file.close()
        super().close()


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".zst": lambda path: io.BufferedReader(_Zst(path), _BLOCK),
}
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)


def kinds() -> str:
    """The kinds of files that can be read, for messages."""
    return ", ".join(TEXT_SUFFIXES) + "; alone or with " + ", ".join(filter(None, _OPENERS))


def kind_of(path: Path) -> tuple[str, str] | None:
    """(kind of text, compression) by the name of the file; a compressed file without another suffix is plain text."""
    packed = path.suffix.lower() if path.suffix.lower() in _OPENERS else ""
    suffix = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return suffix, packed
    return (".txt", packed) if packed and not suffix else None


def reading(path: Path, packed: str, read: Callable[[BinaryIO], Iterator[Any]]) -> Iterator[Any]:
    """What ``read`` yields of an opened file; a file that is damaged becomes one sentence."""
    try:
        with _OPENERS[packed](path) as file:
            yield from read(file)
    except _DAMAGED as error:
        raise ValueError(
            f"read_documents: {path} must be readable, got {error or type(error).__name__}"
        ) from None


def blocks(file: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes of the lines that begin in [start, stop), in blocks of bounded size."""
    start = _to_line(file, start)
    if stop is None:
        yield from iter(lambda: file.read(_BLOCK), b"")
        return
    ended = True
    while (start < stop or not ended) and (block := file.readline(_BLOCK)):
        start += len(block)
        ended = block.endswith(b"\n")
        yield block


def lines(
    path: str | Path, file: BinaryIO, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, str]]:
    """(offset in bytes, text) of the lines that begin in [start, stop)."""
    start = _to_line(file, start)
    while (stop is None or start < stop) and (line := file.readline()):
        # Only \n ends a line: JSON strings may hold U+2028 and other characters that splitlines() takes for line ends.
        content = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
        yield start, _utf8(path, bytes.decode, content, start + len(line))
        start += len(line)


def text(path: str | Path, content: Iterable[bytes], start: int = 0) -> Iterator[str]:
    """Decode blocks of a file, which begin at byte ``start``."""
    decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
    for block in content:
        start += len(block)
        yield _utf8(path, decoder.decode, block, start)
    yield _utf8(path, lambda rest: decoder.decode(rest, final=True), b"", start)


def _to_line(file: BinaryIO, start: int) -> int:
    """Go to the first line that begins at byte ``start`` or later; the byte that it begins at."""
    if start == 0:
        return 0
    file.seek(start - 1)
    while (skipped := file.readline(_BLOCK)) and not skipped.endswith(b"\n"):
        pass
    return file.tell()


def _utf8(path: str | Path, decode: Callable[[bytes], str], content: bytes, end: int) -> str:
    """Decode ``content``, which ends at byte ``end`` of the file."""
    try:
        return decode(content)
    except UnicodeDecodeError as error:
        place = end - len(error.object) + error.start
        raise ValueError(f"read_documents: {path} must be UTF-8 text, got another byte at {place}") from None
