"""Files on disk: safetensors and JSON, written atomically and read strictly. Builds no model."""

from flextron.checkpoint.files import Files, opened
from flextron.checkpoint.format import (
    CONFIG_FILE,
    ELASTIC_FILE,
    FORMAT,
    INDEX_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    check_format,
)
from flextron.checkpoint.io import (
    checksum_of,
    load_tensors,
    read_json,
    read_lines,
    save_tensors,
    stored_dtypes,
    write_json,
)
from flextron.checkpoint.lock import BusyError, locked
from flextron.checkpoint.origin import Origin
from flextron.checkpoint.transaction import commit, recover

__all__ = [
    "CONFIG_FILE",
    "ELASTIC_FILE",
    "FORMAT",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "BusyError",
    "CheckpointError",
    "Files",
    "Origin",
    "check_format",
    "checksum_of",
    "commit",
    "load_tensors",
    "locked",
    "opened",
    "read_json",
    "read_lines",
    "recover",
    "save_tensors",
    "stored_dtypes",
    "write_json",
]
