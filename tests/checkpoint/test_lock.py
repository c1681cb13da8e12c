"""One writer at a time, who is told of the other; and a reader sees one save, whatever is written meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
from test_crashes import NAMES, save_set

from flextron.checkpoint import (
    BusyError,
    CheckpointError,
    Files,
    commit,
    files,
    locked,
    opened,
    recover,
    write_json,
)
from flextron.checkpoint.lock import LOCK_FILE

_HOLDER = """
import sys
from flextron.checkpoint.lock import locked
with locked(sys.argv[1], "train"):
    print("held", flush=True)
    sys.stdin.read()
"""
_SAVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from typing import BinaryIO
from test_crashes import save_set
value = 2
while True:
    save_set(Path({directory!r}), value, size=20_000)
    if value == 2:
        print("saving", flush=True)
    value += 1
"""


@contextmanager
def child(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **pipes) as process:
        try:
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_the_second_writer_is_told_whose_the_lock_is(tmp_path: Path) -> None:
    with child(_HOLDER, tmp_path) as holder:
        with pytest.raises(BusyError) as error, commit(tmp_path):
            pass
        said = str(error.value)
        assert "\n" not in said and "must have one writer at a time" in said
        assert f"process {holder.pid} on" in said and "-c" in said
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        holder.stdin.close()
        holder.wait()
        save_set(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, "set.json"])


def test_the_lock_of_a_killed_writer_is_taken_over(tmp_path: Path) -> None:
    with child(_HOLDER, tmp_path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK_FILE).exists()  # what it left
    with locked(tmp_path, "test"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_thread_may_take_its_lock_again_and_another_may_not(tmp_path: Path) -> None:
    caught = []

    def other() -> None:
        try:
            with locked(tmp_path, "other", patience=0):
                pass
        except BusyError as error:
            caught.append(error)

    with locked(tmp_path, "outer"):
        with locked(tmp_path / ".", "inner"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1 and f"process {os.getpid()} on" in str(caught[0])
    with locked(tmp_path, "again", patience=0):
        pass


def test_a_writer_waits_for_a_short_one(tmp_path: Path) -> None:
    with child(_HOLDER, tmp_path) as holder:
        threading.Timer(0.2, holder.stdin.close).start()
        with locked(tmp_path, "test", patience=20):
            pass


def test_a_directory_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), commit(tmp_path / "a" / "b"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="must be a directory, got a file"),
        locked(tmp_path / "file", "test"),
    ):
        pass


def test_what_a_new_set_drops_goes_with_the_old_one(tmp_path: Path) -> None:
    save_set(tmp_path, 1)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "step").touch()
    (tmp_path / "mine.txt").touch()
    dropped = ("training", "a.safetensors", "b.safetensors", "never.json", "set.json")
    with commit(tmp_path, drop=dropped) as stage:
        write_json(stage / "set.json", {"value": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "set.json"]
    assert json.loads((tmp_path / "set.json").read_text()) == {"value": 2}
    with pytest.raises(ZeroDivisionError), commit(tmp_path, drop=["set.json"]):
        1 / 0  # noqa: B018
    assert (tmp_path / "set.json").exists()


@pytest.mark.parametrize("name", ["../victim", "/etc", "a/b", "..", ".", "", 3])
def test_an_interrupted_save_drops_nothing_outside(tmp_path: Path, name: object) -> None:
    (tmp_path / "victim").touch()
    (tmp_path / "model" / ".committed").mkdir(parents=True)
    write_json(tmp_path / "model" / ".committed" / ".dropped.json", {"names": [name]})
    with pytest.raises(CheckpointError, match="plain"):
        recover(tmp_path / "model")
    assert (tmp_path / "victim").exists()


def value_of(files: Files) -> int:
    meta = files.read_json("set.json")
    files.verify(meta["sums"])
    values = {int(v) for name in NAMES for v in files.load_tensors(name)["x"].unique()}
    assert values == {meta["value"]}
    return meta["value"]


def test_a_reader_sees_one_whole_set_while_another_process_saves(tmp_path: Path) -> None:
    """Hundreds of reads under back-to-back saves; of those that read file by file some mix two sets."""
    save_set(tmp_path, 1, size=20_000)
    seen = []
    code = _SAVER.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    with child(code):
        began = time.monotonic()
        # two seconds, and more where a busy disk makes the saves few
        while time.monotonic() < began + 2 or (len(set(seen)) < 12 and time.monotonic() < began + 60):
            with opened(tmp_path) as files:
                time.sleep(0.002 * (len(seen) % 3))  # a slow reader keeps what it opened
                seen.append(value_of(files))
    assert seen == sorted(seen) and len(set(seen)) >= 12
    with opened(tmp_path) as files:  # the saver was killed at some moment
        assert value_of(files) >= seen[-1]


def test_a_reader_waits_while_a_save_is_moved_into_place(tmp_path: Path) -> None:
    save_set(tmp_path, 1)
    save_set(tmp_path / "new", 2)
    with child(_HOLDER, tmp_path) as holder:  # as a writer between its rename and its last move
        (tmp_path / "new").rename(tmp_path / ".committed")
        threading.Timer(0.2, holder.stdin.close).start()
        with opened(tmp_path) as files:
            assert value_of(files) == 2


def test_a_save_that_ends_while_a_reader_compares_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saver has moved one file when the reader opens them, and moves the rest after its last look at one."""
    save_set(tmp_path, 1)
    save_set(tmp_path / "new", 2)
    begun, compared, same = [], [], files._same

    def between(directory: Path) -> None:
        if begun:
            recover(directory)
            return
        begun.append(directory)
        (tmp_path / "new").rename(tmp_path / ".committed")
        (tmp_path / ".committed" / NAMES[0]).replace(tmp_path / NAMES[0])

    def last(handle: BinaryIO, path: Path) -> bool:
        found = same(handle, path)
        compared.append(path)
        if len(compared) == len(NAMES) + 1:
            recover(tmp_path)
        return found

    monkeypatch.setattr(files, "recover", between)
    monkeypatch.setattr(files, "_same", last)
    with opened(tmp_path) as found:
        assert value_of(found) == 2
