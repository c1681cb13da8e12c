"""Read and write one checkpoint file; what it contains is in ``format.py``, several files are in ``transaction.py``.

A file is written beside its place, flushed to the disk and renamed, so it is the old one or the new one. Checksums in
the JSON sidecar catch what happens outside these rules.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flextron.checkpoint.format import LFS_POINTER, CheckpointError, check_safetensors
from flextron.sentences import listed

_PIECE = 1 << 22  # values that are written at once
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
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
    with replacing(Path(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object whose numbers are finite.

    Raises:
        CheckpointError: no such file, or not such an object.
    """
    path = existing(path)
    with path.open("rb") as file:
        return parse_json(path, file)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line; a last line without a line end, which a killed run left, is dropped.

    Raises:
        CheckpointError: no such file, or another line is no such object.
    """
    path = existing(path)
    *lines, _ = path.read_bytes().split(b"\n")
    return [_parsed(line, f"{path}: line {number}", "a JSON object") for number, line in enumerate(lines, 1)]


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write tensors as one safetensors file, atomically. Tied tensors are stored once.

    Args:
        path: the file; its directory must exist.
        tensors: tensors by name, on any device.
        metadata: strings kept in the file's header.

    Returns:
        The sha256 of the file, for `load_tensors` and `Files.verify`.
    """
    kept, shared = _untie(tensors)
    header = {"format": "pt", **(metadata or {})}
    if shared:
        header[_SHARED] = json.dumps(shared)
    with replacing(Path(path)) as temporary:
        try:
            save_file(kept, temporary, metadata=header)
        except SafetensorError as error:  # a full disk, too
            raise CheckpointError(f"{path}: must be written whole, got {error}") from None
        return checksum_of(temporary)


class Pending(NamedTuple):
    """A tensor that is made when its turn to be written has come, and can be forgotten then."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def stream_tensors(path: str | Path, tensors: Mapping[str, Pending]) -> str:
    """Write tensors as one safetensors file, atomically and one after the other, in the library's own order.

    Args:
        path: the file; its directory must exist.
        tensors: tensors by name, on any device; each is stored.

    Returns:
        The sha256 of what was written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype, _ = tensors[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with replacing(Path(path)) as temporary:
        try:
            with temporary.open("wb") as file:
                for content in _contents(header, (tensors[name] for name in names)):
                    digest.update(content)
                    file.write(content)
        except OSError as error:  # a full disk, too
            raise CheckpointError(f"{path}: must be written whole, got {error}") from None
    return digest.hexdigest()


def _contents(header: bytes, tensors: Iterable[Pending]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece."""
    yield struct.pack("<Q", len(header))
    yield header
    for one in tensors:
        tensor = one.make()
        if (tuple(tensor.shape), tensor.dtype) != one[:2]:
            raise ValueError(
                f"save: a tensor must be {one[:2]} as announced, got {tensor.shape} {tensor.dtype}"
            )
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            yield memoryview(piece.cpu().view(torch.uint8).numpy())
        del tensor  # before the next is made


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
    path = existing(path)
    with path.open("rb") as file:
        return parse_tensors(path, file, expected, checksum)


def stored_dtypes(path: str | Path) -> dict[str, str]:
    """The dtype of each tensor in a safetensors file, as its header writes it (``BF16``); no tensor is read."""
    path = existing(path)
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


def existing(path: str | Path) -> Path:
    """The path of a file; CheckpointError says what is in its place."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: must be a file, got {'a directory' if path.is_dir() else 'nothing there'}"
        )
    return path


def parse_json(path: Path, file: BinaryIO) -> dict[str, Any]:
    """As `read_json`, from a file that is open."""
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


def parse_tensors(
    path: Path, file: BinaryIO, expected: Mapping[str, Any] | None, checksum: str | None
) -> dict[str, Tensor]:
    """As `load_tensors`, from a file that is open."""
    check_safetensors(path, file)
    if checksum is not None:
        check_checksum(path, file, checksum)
    with reading(path):
        with safe_open(reopened(path, file), framework="pt", device="cpu") as opened_file:
            shared = json.loads((opened_file.metadata() or {}).get(_SHARED, "{}"))
            tensors = {name: opened_file.get_tensor(name) for name in opened_file.keys()}  # noqa: SIM118 (not a dict)
        tensors |= {second: tensors[first] for second, first in shared.items()}
    if expected is not None:
        check_tensors(path, tensors, expected)
    return tensors


def parse_shapes(path: Path, file: BinaryIO) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors file that is open; no tensor is read."""
    check_safetensors(path, file)
    with reading(path), safe_open(reopened(path, file), framework="pt") as opened_file:
        return {name: tuple(opened_file.get_slice(name).get_shape()) for name in opened_file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the safetensors library raises over a file becomes one sentence."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: must be a readable safetensors file, got {error!r}") from None


def reopened(path: Path, file: BinaryIO) -> str:
    """A path that opens the same file again even if another has taken its place, where the system has one."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.exists(name := f"{folder}/{file.fileno()}"):
            return name
    return str(path)


def check_checksum(path: Path, file: Any, checksum: Any) -> None:
    """Refuse an open file that is not the one whose sha256 was recorded."""
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        raise CheckpointError(f"{path}: its recorded sha256 must be 64 hexadecimal digits, got {checksum!r}")
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != checksum:
        raise CheckpointError(
            f"{path}: sha256 must be {checksum[:16]}... as recorded when it was saved, got {found[:16]}...; "
            "the file was damaged or replaced"
        )


def check_tensors(path: Path, tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse tensors, or shapes of them, whose names, shapes or (where both have them) dtypes are not expected."""
    faults = []
    if missing := [name for name in expected if name not in tensors]:
        faults.append(f"missing {listed(missing)}")
    if extra := [name for name in tensors if name not in expected]:
        faults.append(f"unexpected {listed(extra)}")
    shapes, dtypes = [], []
    for name in expected.keys() & tensors.keys():
        have, want = tensors[name], expected[name]
        found, shape = (tuple(getattr(one, "shape", one)) for one in (have, want))
        if found != shape:
            shapes.append(f"{name} {list(found)} instead of {list(shape)}")
        if isinstance(have, Tensor) and isinstance(want, Tensor) and have.dtype != want.dtype:
            dtypes.append(f"{name} {have.dtype} instead of {want.dtype}")
    if shapes:
        faults.append(f"wrong shape {listed(sorted(shapes))}")
    if dtypes:
        faults.append(f"wrong dtype {listed(sorted(dtypes))}")
    if faults:
        raise CheckpointError(f"{path}: tensors must be those of the model, got {'; '.join(faults)}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``; the file written there replaces it when the block ends without an error."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: its directory must exist, got nothing at {path.parent}")
    if path.is_dir():
        raise CheckpointError(f"{path}: must be a file, got a directory")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
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
