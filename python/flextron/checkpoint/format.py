"""What a flextron checkpoint looks like on disk: names, version, and how to tell a file that is not one.

A directory holds ordinary Hugging Face files and one sidecar, ``flextron.json``, which records the format
version and the sha256 of the files that belong together. How they are written is in ``io.py``.

A file of ours may have fields that this version does not know. They are optional, and what the sidecar has of them is
kept when a stage writes it again; unless ``requires`` of the file names a feature that is not in `FEATURES`: then a
reader that passed over it would get another model, and the file is refused. The format's number changes only where a
file can no longer be read by its fields.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from flextron.config import SKIPPING

FORMAT = 2
_READABLE = (1, FORMAT)
FEATURES = (SKIPPING,)  # what a file's ``requires`` may ask of its reader
ELASTIC_FILE = "flextron.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"  # of weights in several files
CONFIG_FILE = "config.json"
LATENCY_FOLDER = "latency"  # of an elastic checkpoint: a file for each machine that it was profiled on
LFS_POINTER = b"version https://git-lfs"  # what git leaves in place of a large file that was not fetched

# First bytes of files that are offered in place of safetensors: (magic, what it is).
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (pickled .pt or .bin)"),
    (b"\x80\x02", "a pickle (.pt or .bin)"),
    (b"\x80\x03", "a pickle (.pt or .bin)"),
    (b"\x80\x04", "a pickle (.pt or .bin)"),
    (b"\x80\x05", "a pickle (.pt or .bin)"),
    (b"GGUF", "a GGUF file"),
    (LFS_POINTER, "a git-lfs pointer (`git lfs pull` fetches the file itself)"),
)
_LONGEST_MAGIC = max(len(magic) for magic, _ in _FOREIGN)
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


class CheckpointError(ValueError):
    """A file cannot be used; the message is one sentence that says which and why."""


def check_format(meta: dict[str, Any], path: str | Path) -> None:
    """Refuse a file of ours of an unknown format version, or one that requires what is not known here."""
    version = meta.get("format")
    if version not in _READABLE or isinstance(version, bool):
        raise CheckpointError(f"{path}: format must be {' or '.join(map(str, _READABLE))}, got {version!r}")
    required = meta.get("requires", [])
    unknown = required if not isinstance(required, list) else [one for one in required if one not in FEATURES]
    if unknown or not isinstance(required, list):
        raise CheckpointError(
            f"{path}: requires must be a list of features that this version knows ({', '.join(FEATURES)}), got "
            f"{unknown!r}; a later flextron may read it"
        )


def check_safetensors(path: Path, file: BinaryIO) -> None:
    """Refuse, in one sentence, an opened file whose first bytes or length are not those of a safetensors file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_LONGEST_MAGIC)
    if not head:
        raise CheckpointError(f"{path}: must be a safetensors file, got an empty file")
    # A pickle's magic is two bytes, and may begin an honest header length: "{" decides.
    is_header = head[8:9] == b"{"
    for magic, what in _FOREIGN:
        if head.startswith(magic) and not is_header:
            raise CheckpointError(f"{path}: must be a safetensors file, got {what}, which is never opened")
    length = struct.unpack("<Q", head[:8])[0] if is_header else 0
    if not is_header or length > _LARGEST_HEADER:
        raise CheckpointError(f"{path}: must be a safetensors file, got something else")
    if length > size - 8:
        raise CheckpointError(f"{path}: must hold a header of {length} bytes, got a truncated file")
    file.seek(8)
    expected = 8 + length + _data_length(file.read(length), path)
    if size != expected:
        state = "truncated" if size < expected else "overlong"
        raise CheckpointError(
            f"{path}: must be {expected} bytes long by its header, got a {state} file of {size}"
        )


def _data_length(header: bytes, path: Path) -> int:
    try:
        entries = json.loads(header)
        return max(
            (entry["data_offsets"][1] for k, entry in entries.items() if k != "__metadata__"), default=0
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: must be a safetensors file, got a damaged header") from None
