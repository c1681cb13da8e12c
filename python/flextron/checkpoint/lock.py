"""One writer at a time: a lock on a directory that names its owner.

The lock is the kernel's (``flock``) on a file in the directory: a process that dies gives it up by dying, and what
it leaves of the file is taken over by the next one. The file is there only while a process writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flextron.checkpoint.format import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two writers apart
    fcntl = None

LOCK_FILE = ".flextron.lock"
_PATIENCE = 0.5  # seconds: a reader that finishes an interrupted save holds the lock for some milliseconds
_STEP = 0.02  # seconds between two tries
_SHOWN = 80  # characters of the owner's command

# (process, thread) that holds the lock of a directory: a stage that saves takes the lock it has already.
_held: dict[Path, tuple[int, int]] = {}


class BusyError(CheckpointError):
    """Another process or thread writes into the directory."""


@contextlib.contextmanager
def locked(directory: str | Path, who: str, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold the lock on writing into ``directory``; a thread may take a lock again that it holds.

    Args:
        directory: made when it is missing, and removed again when it is still empty at the end.
        who: begins the message.
        patience: seconds to wait for another writer.

    Raises:
        BusyError: one sentence that names the process that writes there.
        CheckpointError: no lock can be made there.
    """
    directory = Path(directory)
    place, me = Path(os.path.realpath(directory)), (os.getpid(), threading.get_ident())
    if _held.get(place) == me:
        yield
        return
    made = _make(directory, who)
    try:
        handle = _take(directory / LOCK_FILE, who, patience)
        _held[place] = me
        try:
            yield
        finally:
            del _held[place]
            _release(directory / LOCK_FILE, handle)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something by now
                os.rmdir(folder)


def _make(directory: Path, who: str) -> list[Path]:
    """Make a directory and those above it; the new ones, the innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CheckpointError(f"{who}: {directory} must be a directory, got a file") from None
    except OSError as error:
        raise CheckpointError(f"{who}: {directory} must be writable, got {error.strerror}") from None
    return missing


def _take(path: Path, who: str, patience: float) -> int | None:
    """The locked file's handle; None where the file system has no locks."""
    if fcntl is None:
        return None
    deadline = time.monotonic() + patience
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"{who}: {path.parent} must be writable, got {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                _sign(handle)
                return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                owner = _owner(handle)
                os.close(handle)
                raise BusyError(f"{who}: {path.parent} must have one writer at a time, got {owner}") from None
            time.sleep(_STEP)
        except OSError as error:
            os.close(handle)
            warnings.warn(
                f"{path.parent} is on a file system without locks ({error.strerror}): a second writer would not be "
                "noticed",
                stacklevel=4,
            )
            return None
        os.close(handle)  # another process's, or removed by its last owner between our two calls


def _release(path: Path, handle: int | None) -> None:
    if handle is None:
        return
    with contextlib.suppress(OSError):  # removed with its directory
        path.unlink()
    os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Write who holds the lock; on a full disk it is held all the same."""
    command = " ".join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": command if len(command) <= _SHOWN else f"{command[:_SHOWN]}...",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with contextlib.suppress(OSError):
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)


def _owner(handle: int) -> str:
    """Who holds the lock, as a part of a sentence."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}: {owner['command']!r}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
