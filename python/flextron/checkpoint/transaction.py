"""Write several files of a directory, all or none.

Files that belong together are staged in a folder, which is renamed (at that moment the new set begins to count), and
its files are moved into place. A crash before the rename leaves the old set; one after it is finished by `recover`,
which every reader and the next writer call first. One writer at a time: ``lock.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from flextron.checkpoint.format import CheckpointError
from flextron.checkpoint.io import read_json, sync, write_json
from flextron.checkpoint.lock import BusyError, locked

_STAGE, COMMITTED = ".staged", ".committed"
_DROPPED = ".dropped.json"  # in a stage: names that go when the new set begins to count
_PATIENCE = 60.0  # seconds that a reader waits for a save to be moved into place
_STEP = 0.002  # seconds between two looks
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        shutil.rmtree(stage, ignore_errors=True)  # left by a writer that was killed
        stage.mkdir()
        try:
            yield stage
            if dropped := sorted({*drop} - {path.name for path in stage.iterdir()}):
                write_json(stage / _DROPPED, {"names": dropped})
            for path in stage.rglob("*"):
                sync(path)
            sync(stage)
            os.replace(stage, directory / COMMITTED)
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise CheckpointError(f"{directory}: must have room for what is saved, got {error}") from None
            raise
        sync(directory)
        recover(directory)


def recover(directory: str | Path) -> None:
    """Finish a `commit` that was interrupted after the new files began to count; otherwise do nothing.

    One that another process is finishing right now is waited for.
    """
    directory = Path(directory)
    committed = directory / COMMITTED
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
    """Move the new files into place; a crash may follow any step, and every step may be repeated."""
    if not committed.is_dir():  # another reader was faster
        return
    dropped = committed / _DROPPED
    for name in read_json(dropped)["names"] if dropped.is_file() else ():
        if (
            not isinstance(name, str) or name in ("", "..") or name != Path(name).name
        ):  # it leads out of the directory
            raise CheckpointError(f"{dropped}: names must be plain ones, got {name!r}")
        _remove(directory / name)
    for path in sorted(committed.iterdir()):
        if path.name != _DROPPED:
            if path.is_dir():
                _remove(directory / path.name)
            os.replace(path, directory / path.name)
    dropped.unlink(missing_ok=True)
    sync(directory)
    committed.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
