"""Read several files of a directory as they were at one moment, between two saves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from flextron.checkpoint.format import LATENCY_FOLDER, CheckpointError
from flextron.checkpoint.io import check_checksum, existing, parse_json, parse_shapes, parse_tensors
from flextron.checkpoint.transaction import COMMITTED, recover

_OPENED = (".json", ".safetensors")  # what a reader of a directory opens


class Files:
    """The JSON and safetensors files of a directory as they were at one moment; see `opened`."""

    def __init__(self, directory: Path, handles: Mapping[str, BinaryIO]) -> None:
        self.directory = directory
        self._handles = handles

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def names(self) -> Collection[str]:
        """What was opened; a file of a folder as ``folder/name``."""
        return self._handles.keys()

    def __truediv__(self, name: str) -> Path:
        """The path of a file, for messages."""
        return self.directory / name

    def read_json(self, name: str) -> dict[str, Any]:
        """As `read_json`."""
        return parse_json(self / name, self.handle(name))

    def load_tensors(
        self, name: str, expected: Mapping[str, Any] | None = None, checksum: str | None = None
    ) -> dict[str, Tensor]:
        """As `load_tensors`."""
        return parse_tensors(self / name, self.handle(name), expected, checksum)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors of a safetensors file, which are not read."""
        return parse_shapes(self / name, self.handle(name))

    def verify(self, checksums: Mapping[str, str]) -> None:
        """Refuse a file that is missing, or is not the one that was written with the others: name -> sha256."""
        for name, checksum in checksums.items():
            check_checksum(self / name, self.handle(name), checksum)

    def handle(self, name: str) -> BinaryIO:
        """A file, opened and at its beginning."""
        if name not in self._handles:
            existing(self / name)  # says what is in its place
            raise CheckpointError(f"{self / name}: must be a file, got one that is not read or came later")
        handle = self._handles[name]
        handle.seek(0)
        return handle


@contextlib.contextmanager
def opened(directory: str | Path | Files) -> Iterator[Files]:
    """Open the files of a directory, all of one save; an opened directory is passed on.

    They are opened together, between two saves. A save puts new files into the places of the old ones, which live
    on for whoever has opened them.

    Raises:
        CheckpointError: no such directory, or a save that was interrupted cannot be finished.
    """
    if isinstance(directory, Files):
        yield directory
        return
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: must be a directory, got {'a file' if directory.exists() else 'nothing there'}"
        )
    with contextlib.ExitStack() as stack:
        yield Files(directory, _at_one_moment(directory, stack))


def _at_one_moment(directory: Path, stack: contextlib.ExitStack) -> dict[str, BinaryIO]:
    while True:
        recover(directory)
        handles: dict[str, BinaryIO] = {}
        with contextlib.ExitStack() as attempt:
            for name in _names(directory):
                # removed since, or unreadable for this user: reported where the file is asked for
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    handles[name] = attempt.enter_context((directory / name).open("rb"))
            # In this order: a save that was under way while files were opened has ended by then, and what it replaced
            # is seen. Asked last, a save that ends meanwhile would hide that it was between two files.
            if (directory / COMMITTED).exists():
                continue
            same = all(_same(handle, directory / name) for name, handle in handles.items())
            if same and handles.keys() >= _names(directory):
                stack.push(attempt.pop_all())
                return handles


def _names(directory: Path) -> set[str]:
    names = _names_in(directory)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names |= {f"{LATENCY_FOLDER}/{name}" for name in _names_in(directory / LATENCY_FOLDER)}
    return names


def _names_in(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {
            e.name
            for e in entries
            if e.name.endswith(_OPENED)
            and not e.name.startswith(".")
            and e.is_file()
            and os.access(e, os.R_OK)
        }


def _same(handle: BinaryIO, path: Path) -> bool:
    """Whether an opened file is still the one at its place."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
