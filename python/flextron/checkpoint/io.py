"""Read and write checkpoint files; what they contain is in ``format.py``.

One file is written beside its place, flushed to the disk and renamed, so it is the old one or the new
one. Several files that belong together go through `commit`: they are staged in a folder, it is renamed
(at that moment the new set begins to count) and its files are moved into place. A crash before the rename
leaves the old set; one after it is finished by `recover`, which every reader and the next writer call first.
Checksums in the JSON sidecar catch what happens outside these rules. One writer at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flextron.checkpoint.format import CheckpointError, check_safetensors, listed

_STAGE, _COMMITTED = ".staged", ".committed"
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
    """Read a JSON object.

    Raises:
        CheckpointError: no such file, or not a JSON object.
    """
    path = _existing(path)
    try:
        obj = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: must be a JSON file, got something else or a damaged one") from None
    if not isinstance(obj, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(obj).__name__}")
    return obj


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
        save_file(kept, temporary, metadata=header)
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
    check_safetensors(path)
    if checksum is not None:
        _check_checksum(path, checksum)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            shared = json.loads((file.metadata() or {}).get(_SHARED, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        tensors |= {second: tensors[first] for second, first in shared.items()}
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: must be a readable safetensors file, got {error!r}") from None
    if expected is not None:
        _check_tensors(path, tensors, expected)
    return tensors


def checksum_of(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(directory: str | Path, checksums: Mapping[str, str]) -> None:
    """Refuse a directory in which a file is missing or is not the one that was written with the others."""
    for name, checksum in checksums.items():
        _check_checksum(_existing(Path(directory) / name), checksum)


@contextlib.contextmanager
def commit(directory: str | Path) -> Iterator[Path]:
    """Write several files and folders into ``directory``, all or none.

    Yields a folder to write them into. When the block ends without an error they replace their namesakes in
    ``directory``; what else is there stays. An error, or a crash at any moment, leaves the old set or the new
    one, never a mixture (see `recover`).
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: must be a directory, got a file")
    directory.mkdir(parents=True, exist_ok=True)
    recover(directory)
    stage = directory / _STAGE
    shutil.rmtree(stage, ignore_errors=True)  # of a writer that was killed
    stage.mkdir()
    try:
        yield stage
        for path in stage.rglob("*"):
            _sync(path)
        _sync(stage)
        os.replace(stage, directory / _COMMITTED)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _sync(directory)
    recover(directory)


def recover(directory: str | Path) -> None:
    """Finish a `commit` that was interrupted after the new files began to count; otherwise do nothing."""
    directory = Path(directory)
    committed = directory / _COMMITTED
    if not committed.is_dir():
        return
    try:
        for path in sorted(committed.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # another reader is recovering too
                if path.is_dir():
                    shutil.rmtree(directory / path.name, ignore_errors=True)
                os.replace(path, directory / path.name)
        _sync(directory)
        with contextlib.suppress(FileNotFoundError):
            committed.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{directory}: an interrupted save must be finished, which needs write access, got {error}"
        ) from error


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: must be a file, got {'a directory' if path.is_dir() else 'nothing there'}"
        )
    return path


def _check_checksum(path: Path, checksum: str) -> None:
    found = checksum_of(path)
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
