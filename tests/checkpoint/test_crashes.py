"""A save that is cut short at any moment leaves the old files or the new ones, never a mixture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flextron.checkpoint import (
    CheckpointError,
    commit,
    load_tensors,
    opened,
    read_json,
    recover,
    save_tensors,
    write_json,
)

NAMES = ("a.safetensors", "b.safetensors")


def save_set(directory: Path, value: int, size: int = 10) -> None:
    with commit(directory) as stage:
        sums = {name: save_tensors(stage / name, {"x": torch.full((size,), value)}) for name in NAMES}
        write_json(stage / "set.json", {"value": value, "sums": sums})


def value_of(directory: Path) -> int:
    """The one value that every file of the set has."""
    recover(directory)
    meta = read_json(directory / "set.json")
    with opened(directory) as files:
        files.verify(meta["sums"])
    values = {int(v) for name in NAMES for v in load_tensors(directory / name)["x"].unique()}
    assert values == {meta["value"]}
    return meta["value"]


class Crash(BaseException):
    """Not an Exception: nothing may catch it and go on."""


@pytest.mark.parametrize("call", ["replace", "fsync", "rmdir"])
def test_a_crash_at_any_step_leaves_one_whole_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Every call that changes the disk for good is in turn the last one."""
    owner = Path if call == "rmdir" else os
    real = getattr(owner, call)
    outcomes = []
    for last in range(100):
        directory = tmp_path / str(last)
        save_set(directory, 1)
        left = last

        def stop(*args: object, **kwargs: object) -> object:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, call, stop)
        try:
            save_set(directory, 2)
            crashed = False
        except Crash:
            crashed = True
        monkeypatch.undo()
        outcomes.append(value_of(directory))
        assert sorted(p.name for p in directory.iterdir()) == sorted([*NAMES, "set.json"])
        save_set(directory, 3)
        assert value_of(directory) == 3
        if not crashed:
            break
    assert outcomes == sorted(outcomes)  # once the new set counts, it counts for good
    assert outcomes[-1] == 2 and (call == "rmdir" or outcomes[0] == 1)
    assert last >= (1 if call == "rmdir" else 5)  # the call was really intercepted


# For each number on its input, a child that saves one set after another from that number on, until it is killed.
_WRITERS = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_crashes import save_set
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        print(os.getpid(), flush=True)
        for value in range(int(line), 10**9):
            save_set(Path({directory!r}), value, size=20_000)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_killed_writer_leaves_one_whole_set(tmp_path: Path) -> None:
    """SIGKILL at moments spread over many saves; the set that is there always loads, and never goes back."""
    directory = tmp_path / "set"
    save_set(directory, 1, size=20_000)
    code = _WRITERS.format(tests=str(Path(__file__).parent), directory=str(directory))
    seen = [1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as writers:
        for attempt in range(1, 9):
            writers.stdin.write(f"{attempt * 10**6}\n")
            writer = int(writers.stdout.readline())
            time.sleep(0.05 + 0.037 * attempt)
            os.kill(writer, signal.SIGKILL)
            assert int(writers.stdout.readline()) == signal.SIGKILL
            seen.append(value_of(directory))
        writers.stdin.close()
    assert seen == sorted(seen)
    assert max(seen) > 8 * 10**6  # some were killed between saves that counted


@pytest.mark.parametrize("write", [write_json, save_tensors])
def test_a_crash_while_one_file_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object
) -> None:
    path = tmp_path / "file"
    write(path, {"x": torch.zeros(2)} if write is save_tensors else {"x": 0})
    before = path.read_bytes()

    def stop(*_: object) -> None:
        raise OSError("no space left on device")

    for call in ("replace", "fsync"):
        monkeypatch.setattr(os, call, stop)
        with pytest.raises(OSError, match="no space"):
            write(path, {"x": torch.ones(2)} if write is save_tensors else {"x": 1})
        monkeypatch.undo()
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_block_changes_nothing(tmp_path: Path) -> None:
    save_set(tmp_path, 1)
    with pytest.raises(ZeroDivisionError), commit(tmp_path) as stage:
        write_json(stage / "set.json", {"value": 2})
        1 / 0  # noqa: B018
    assert value_of(tmp_path) == 1 and not (tmp_path / ".staged").exists()


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text("{}")
    (tmp_path / "training").mkdir()
    save_set(tmp_path, 1)
    assert (tmp_path / "latency.json").read_text() == "{}" and (tmp_path / "training").is_dir()


def test_a_set_interrupted_after_it_counts_is_finished_by_the_reader(tmp_path: Path) -> None:
    save_set(tmp_path, 1)
    save_set(tmp_path / "new", 2)
    committed = tmp_path / ".committed"
    (tmp_path / "new").rename(committed)
    assert value_of(tmp_path) == 2 and not committed.exists()


def test_a_set_interrupted_after_it_counts_is_finished_by_the_next_writer(tmp_path: Path) -> None:
    save_set(tmp_path / "new", 2)
    (tmp_path / "new" / "more.json").write_text("{}")
    (tmp_path / "new").rename(tmp_path / ".committed")
    save_set(tmp_path, 3)
    assert value_of(tmp_path) == 3 and (tmp_path / "more.json").exists()


def test_what_a_killed_writer_staged_is_dropped(tmp_path: Path) -> None:
    save_set(tmp_path, 1)
    (tmp_path / ".staged").mkdir()
    (tmp_path / ".staged" / "half.json").write_text("{")
    assert value_of(tmp_path) == 1
    save_set(tmp_path, 2)
    assert value_of(tmp_path) == 2 and not (tmp_path / "half.json").exists()


def test_a_folder_is_committed_whole_in_place_of_its_namesake(tmp_path: Path) -> None:
    for version, names in enumerate((("a", "b"), ("b", "c"))):
        with commit(tmp_path) as stage:
            (stage / "templates").mkdir()
            for name in names:
                (stage / "templates" / name).write_text(str(version))
    found = {file.name: file.read_text() for file in (tmp_path / "templates").iterdir()}
    assert found == {"b": "1", "c": "1"}


def test_what_a_commit_cannot_do_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="must be a directory, got a file"), commit(tmp_path / "file"):
        pass
