"""Read and write checkpoint files; what they contain is in ``format.py``.

One file is written beside its place, flushed to the disk and renamed, so it is the old one or the new
one. Several files that belong together go through `commit`: they are staged in a folder, it is renamed
(at that moment the new set begins to count) and its files are moved into place. A crash before the rename
leaves the old set; one after it is finished by `recover`, which every reader and the next writer call first.
A reader opens all files of a directory at one moment (`opened`): what is saved later changes nothing for it.
Checksums in the JSON sidecar catch what happens outside these rules. One writer at a time: ``lock.py``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flextron.checkpoint.format import LFS_POINTER, CheckpointError, check_safetensors, listed
from flextron.checkpoint.lock import BusyError, locked

_STAGE, _COMMITTED = ".staged", ".committed"
_DROPPED = ".dropped.json"  # in a stage: names that go when the new set begins to count
_PATIENCE = 60.0  # seconds that a reader waits for a save to be moved into place
_STEP = 0.002  # seconds between two looks
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OPENED = (".json", ".safetensors")  # what a reader of a directory opens
_SHARED = "flextron.shared"  # key in the safetensors metadata: {second name: first name} of tied tensors


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as JSON, atomically.

    Raises:
        CheckpointError: ``obj`` holds something JSON cannot say (a NaN, a tensor). The old file stays.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: contents must be plain JSON, got {error}") from None
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object whose numbers are finite.

    Raises:
        CheckpointError: no such file, or not such an object.
    """
    path = _existing(path)
    with path.open("rb") as file:
        return _json(path, file)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line; a last line without its end, which a killed run left, is none.

    Raises:
        CheckpointError: no such file, or another line is no such object.
    """
    path = _existing(path)
    *lines, _ = path.read_bytes().split(b"\n")
    return [_parsed(line, f"{path}: line {number}", "a JSON object") for number, line in enumerate(lines, 1)]


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write tensors as one safetensors file, atomically. Tied tensors are stored once.

    Args:
        path: the file; its directory must exist.
        tensors: by name, on any device.
        metadata: strings kept in the file's header.

    Returns:
        The sha256 of the file, for `load_tensors` and `verify_checksums`.
    """
    kept, shared = _untie(tensors)
    header = {"format": "pt", **(metadata or {})}
    if shared:
        header[_SHARED] = json.dumps(shared)
    with _replacing(Path(path)) as temporary:
        try:
            save_file(kept, temporary, metadata=header)
        except SafetensorError as error:  # a full disk, too
            raise CheckpointError(f"{path}: must be written whole, got {error}") from None
        return checksum_of(temporary)


def load_tensors(
    path: str | Path,
    expected: Mapping[str, Any] | None = None,
    checksum: str | None = None,
) -> dict[str, Tensor]:
    """Read a safetensors file; every check is made before anything is returned.

    Args:
        path: the file.
        expected: name -> shape; or name -> tensor, whose dtype must agree too. Names must agree exactly.
        checksum: sha256 that the file must have.

    Returns:
        The tensors by name, on the CPU; tied names share one tensor.

    Raises:
        CheckpointError: one sentence that says what is wrong with the file.
    """
    path = _existing(path)
    with path.open("rb") as file:
        return _tensors(path, file, expected, checksum)


class Files:
    """The JSON and safetensors files of a directory as they were at one moment; see `opened`."""

    def __init__(self, directory: Path, handles: Mapping[str, BinaryIO]) -> None:
        self.directory = directory
        self._handles = handles

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def __truediv__(self, name: str) -> Path:
        """What messages call a file."""
        return self.directory / name

    def read_json(self, name: str) -> dict[str, Any]:
        """As `read_json`."""
        return _json(self / name, self._handle(name))

    def load_tensors(
        self, name: str, expected: Mapping[str, Any] | None = None, checksum: str | None = None
    ) -> dict[str, Tensor]:
        """As `load_tensors`."""
        return _tensors(self / name, self._handle(name), expected, checksum)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors of a safetensors file, which are not read."""
        path, handle = self / name, self._handle(name)
        check_safetensors(path, handle)
        with _reading(path), safe_open(_reopened(path, handle), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    def verify(self, checksums: Mapping[str, str]) -> None:
        """As `verify_checksums`."""
        for name, checksum in checksums.items():
            _check_checksum(self / name, self._handle(name), checksum)

    def _handle(self, name: str) -> BinaryIO:
        if name not in self._handles:
            _existing(self / name)  # says what is in its place
            raise CheckpointError(f"{self / name}: must be a file, got one that is not read or came later")
        handle = self._handles[name]
        handle.seek(0)
        return handle


@contextlib.contextmanager
def opened(directory: str | Path | Files) -> Iterator[Files]:
    """The files of a directory, all of one save; one that is opened already is passed on.

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
        handles = {}
        with contextlib.ExitStack() as attempt:
            for name in _names(directory):
                # removed since, or not for this user: missed where it is asked for
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    handles[name] = attempt.enter_context((directory / name).open("rb"))
            same = all(_same(handle, directory / name) for name, handle in handles.items())
            if same and not (directory / _COMMITTED).exists() and handles.keys() >= _names(directory):
                stack.push(attempt.pop_all())
                return handles


def _names(directory: Path) -> set[str]:
    with os.scandir(directory) as entries:
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


def stored_dtypes(path: str | Path) -> dict[str, str]:
    """The dtype of each tensor in a safetensors file, as its header writes it (``BF16``); no tensor is read."""
    path = _existing(path)
    with path.open("rb") as file:
        check_safetensors(path, file)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: must be a readable safetensors file, got {error!r}") from None


def checksum_of(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(directory: str | Path, checksums: Mapping[str, str]) -> None:
    """Refuse a directory in which a file is missing or is not the one that was written with the others."""
    for name, checksum in checksums.items():
        path = _existing(Path(directory) / name)
        with path.open("rb") as file:
            _check_checksum(path, file, checksum)


@contextlib.contextmanager
def commit(directory: str | Path, drop: Iterable[str] = ()) -> Iterator[Path]:
    """Write several files and folders into ``directory``, all or none.

    Yields a folder to write them into. When the block ends without an error they replace their namesakes in
    ``directory``, and the files and folders named in ``drop`` go, unless they are among the new ones; what else is
    there stays. An error, or a crash at any moment, leaves the old set or the new one, never a mixture (see
    `recover`).
    """
    directory = Path(directory)
    with locked(directory, "save"):
        recover(directory)
        stage = directory / _STAGE
        shutil.rmtree(stage, ignore_errors=True)  # of a writer that was killed
        stage.mkdir()
        try:
            yield stage
            if dropped := sorted({*drop} - {path.name for path in stage.iterdir()}):
                write_json(stage / _DROPPED, {"names": dropped})
            for path in stage.rglob("*"):
                _sync(path)
            _sync(stage)
            os.replace(stage, directory / _COMMITTED)
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise CheckpointError(f"{directory}: must have room for what is saved, got {error}") from None
            raise
        _sync(directory)
        recover(directory)


def recover(directory: str | Path) -> None:
    """Finish a `commit` that was interrupted after the new files began to count; otherwise do nothing.

    One that another process is finishing right now is waited for.
    """
    directory = Path(directory)
    committed = directory / _COMMITTED
    deadline = time.monotonic() + _PATIENCE
    while committed.is_dir():
        try:
            with locked(directory, "read", patience=0):
                _place(directory, committed)
        except BusyError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_STEP)
        except OSError as error:
            raise _unfinished(directory, error) from error
        except CheckpointError as error:
            raise _unfinished(directory, error) from None


def _unfinished(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{directory}: an interrupted save must be finished, which needs write access, got {error}"
    )


def _place(directory: Path, committed: Path) -> None:
    """Move what counts into its place; each step may be the last one, and be taken again."""
    if not committed.is_dir():  # another reader was faster
        return
    dropped = committed / _DROPPED
    for name in read_json(dropped)["names"] if dropped.is_file() else ():
        if not isinstance(name, str) or name in ("", "..") or name != Path(name).name:  # leads out of here
            raise CheckpointError(f"{dropped}: names must be plain ones, got {name!r}")
        _remove(directory / name)
    for path in sorted(committed.iterdir()):
        if path.name != _DROPPED:
            if path.is_dir():
                _remove(directory / path.name)
            os.replace(path, directory / path.name)
    dropped.unlink(missing_ok=True)
    _sync(directory)
    committed.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: must be a file, got {'a directory' if path.is_dir() else 'nothing there'}"
        )
    return path


def _json(path: Path, file: BinaryIO) -> dict[str, Any]:
    content = file.read()
    if content.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: must be a JSON file, got a git-lfs pointer (`git lfs pull` fetches the file itself)"
        )
    return _parsed(content, f"{path}:", "a JSON file")


def _parsed(content: bytes, who: str, what: str) -> dict[str, Any]:
    try:
        obj = json.loads(content.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{who} must be {what}, got something else or a damaged one") from None
    if not isinstance(obj, dict):
        raise CheckpointError(f"{who} must hold a JSON object, got {type(obj).__name__}")
    return obj


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _tensors(
    path: Path, file: BinaryIO, expected: Mapping[str, Any] | None, checksum: str | None
) -> dict[str, Tensor]:
    check_safetensors(path, file)
    if checksum is not None:
        _check_checksum(path, file, checksum)
    with _reading(path):
        with safe_open(_reopened(path, file), framework="pt", device="cpu") as opened_file:
            shared = json.loads((opened_file.metadata() or {}).get(_SHARED, "{}"))
            tensors = {name: opened_file.get_tensor(name) for name in opened_file.keys()}  # noqa: SIM118 (not a dict)
        tensors |= {second: tensors[first] for second, first in shared.items()}
    if expected is not None:
        _check_tensors(path, tensors, expected)
    return tensors


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: must be a readable safetensors file, got {error!r}") from None


def _reopened(path: Path, file: BinaryIO) -> str:
    """A path that opens the very file that is open, whatever is at its own by now, where the system has one."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.exists(name := f"{folder}/{file.fileno()}"):
            return name
    return str(path)


def _check_checksum(path: Path, file: BinaryIO, checksum: Any) -> None:
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        raise CheckpointError(f"{path}: its recorded sha256 must be 64 hexadecimal digits, got {checksum!r}")
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != checksum:
        raise CheckpointError(
            f"{path}: sha256 must be {checksum[:16]}... as recorded when it was saved, got {found[:16]}...; "
            "the file was damaged or replaced"
        )


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    """Refuse tensors whose names, shapes or (where ``expected`` has tensors) dtypes are others."""
    faults = []
    if missing := [name for name in expected if name not in tensors]:
        faults.append(f"missing {listed(missing)}")
    if extra := [name for name in tensors if name not in expected]:
        faults.append(f"unexpected {listed(extra)}")
    shapes, dtypes = [], []
    for name in expected.keys() & tensors.keys():
        have, want = tensors[name], expected[name]
        shape = tuple(getattr(want, "shape", want))
        if tuple(have.shape) != shape:
            shapes.append(f"{name} {list(have.shape)} instead of {list(shape)}")
        if isinstance(want, Tensor) and have.dtype != want.dtype:
            dtypes.append(f"{name} {have.dtype} instead of {want.dtype}")
    if shapes:
        faults.append(f"wrong shape {listed(sorted(shapes))}")
    if dtypes:
        faults.append(f"wrong dtype {listed(sorted(dtypes))}")
    if faults:
        raise CheckpointError(f"{path}: tensors must be those of the model, got {'; '.join(faults)}")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``; what is written there takes its place when the block ends well."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: its directory must exist, got nothing at {path.parent}")
    if path.is_dir():
        raise CheckpointError(f"{path}: must be a file, got a directory")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    if path.is_dir() and os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, contiguous and in memory of their own; {second name: first name} of tied ones."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            kind = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"save_tensors: {name} must be a dense tensor, got {kind}")
        value = value.detach()
        same = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and same in first:
            shared[name] = first[same]
            continue
        first[same] = name
        value = value.cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        # safetensors refuses two names in one storage, which views of one buffer have
        kept[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return kept, shared
