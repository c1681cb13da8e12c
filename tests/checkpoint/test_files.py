"""Checkpoint files: what was written is read back; anything else gives one sentence and changes nothing."""

from __future__ import annotations

import json
import pickle
import struct
import weakref
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flextron.checkpoint import (
    CheckpointError,
    check_format,
    checksum_of,
    load_tensors,
    opened,
    read_json,
    save_tensors,
    write_json,
)
from flextron.checkpoint.io import Pending, stream_tensors


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5),
        "b.weight": torch.randn(3).bfloat16(),
        "c.count": torch.tensor(4),
        "d.empty": torch.zeros(0, 2),
    }


@pytest.fixture
def saved(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> tuple[Path, str]:
    path = tmp_path / "x.safetensors"
    return path, save_tensors(path, tensors, {"step": "3"})


def refused(path: Path, **kwargs: object) -> str:
    """The message of the error; one line, naming the file."""
    with pytest.raises(CheckpointError) as error:
        load_tensors(path, **kwargs)
    message = str(error.value)
    assert isinstance(error.value, ValueError) and "\n" not in message and path.name in message
    return message


def test_tensors_come_back(saved: tuple[Path, str], tensors: dict[str, torch.Tensor]) -> None:
    path, checksum = saved
    loaded = load_tensors(path, expected=tensors, checksum=checksum)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert checksum == checksum_of(path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "3" and file.metadata()["format"] == "pt"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(100, 10)
    path = tmp_path / "tied.safetensors"
    save_tensors(path, {"embed": weight, "head": weight, "like": weight.clone()})
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"embed", "like"}
    loaded = load_tensors(path, {"embed": (100, 10), "head": (100, 10), "like": (100, 10)})
    assert loaded["head"] is loaded["embed"] and loaded["like"] is not loaded["embed"]
    assert torch.equal(loaded["head"], weight)


def test_views_of_one_buffer_are_stored_apart(tmp_path: Path) -> None:
    buffer = torch.randn(6, 4)
    views = {
        "rows": buffer[:3],
        "rest": buffer[3:],
        "columns": buffer[:, 1:3],
        "turned": buffer.T,
        "all": buffer,
    }
    save_tensors(tmp_path / "v.safetensors", views)
    loaded = load_tensors(tmp_path / "v.safetensors", views)
    for name, view in views.items():
        assert torch.equal(loaded[name], view)


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), 3.0])
def test_what_is_no_dense_tensor_is_not_saved(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="save_tensors: odd must be a dense tensor"):
        save_tensors(path, {"odd": value})
    assert not path.exists()


def test_strict_load_names_every_fault(saved: tuple[Path, str]) -> None:
    path, _ = saved
    right = {"a.weight": (7, 5), "b.weight": (3,), "c.count": (), "d.empty": (0, 2)}
    load_tensors(path, right)
    assert "missing new.bias" in refused(path, expected=right | {"new.bias": (2,)})
    assert "unexpected c.count" in refused(path, expected={k: v for k, v in right.items() if k != "c.count"})
    assert "wrong shape a.weight [7, 5] instead of [5, 7]" in refused(
        path, expected=right | {"a.weight": (5, 7)}
    )
    wanted = load_tensors(path) | {"b.weight": torch.zeros(3)}
    assert "wrong dtype b.weight torch.bfloat16 instead of torch.float32" in refused(path, expected=wanted)
    many = refused(path, expected={f"layer.{i}": (1,) for i in range(9)})
    assert "layer.4 and 4 more" in many and "layer.5" not in many


def test_every_truncation_is_refused(saved: tuple[Path, str], tmp_path: Path) -> None:
    data = saved[0].read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(12), len(data) // 2, len(data) - 160, len(data) - 1]:
        cut.write_bytes(data[:length])
        assert any(word in refused(cut) for word in ("truncated", "empty", "something else", "damaged"))
    cut.write_bytes(data + b"\0")
    assert "overlong" in refused(cut)


def test_every_flipped_bit_is_refused(saved: tuple[Path, str], tmp_path: Path) -> None:
    path, checksum = saved
    data = path.read_bytes()
    flipped = tmp_path / "flipped.safetensors"
    for place in range(0, len(data), 7):
        flipped.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        refused(flipped, checksum=checksum)
    flipped.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    assert "sha256 must be" in refused(flipped, checksum=checksum)


def test_a_damaged_header_is_refused_without_a_checksum(saved: tuple[Path, str], tmp_path: Path) -> None:
    data = saved[0].read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    damaged = tmp_path / "damaged.safetensors"
    for header in (
        b"{" * length,
        b"{" + b"\xff" * (length - 1),
        b'{"a":3}'.ljust(length),
        b'{"a":[1]}'.ljust(length),
    ):
        damaged.write_bytes(data[:8] + header + data[8 + length :])
        assert "damaged header" in refused(damaged)
    header = data[8 : 8 + length].replace(b'"BF16"', b'"F99" ')
    damaged.write_bytes(data[:8] + header + data[8 + length :])
    assert "readable safetensors" in refused(damaged)


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_named_and_never_opened(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(_Bomb(), protocol))
    assert "pickle" in refused(path)


def test_torch_files_are_named_and_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": _Bomb()}, path)
    assert "pickled .pt or .bin" in refused(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert "pickle" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    assert "zip archive" in refused(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "an empty file"),
        (b"Once upon a time, there was a checkpoint.", "something else"),
        (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
        (b'{"a": 1}', "something else"),
        (bytes(1000), "something else"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert word in refused(path)


def test_a_header_as_long_as_a_pickles_magic_is_no_pickle(tmp_path: Path) -> None:
    """The first two bytes of a header of 0x0280 bytes are those of a pickle."""
    path = tmp_path / "x.safetensors"
    for padding in range(400, 700):
        save_file({"a": torch.ones(2)}, path, metadata={"note": "x" * padding})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no header of 640 bytes was made")
    assert torch.equal(load_tensors(path)["a"], torch.ones(2))


def test_other_files_of_the_right_kind_are_refused_by_name(tmp_path: Path, saved: tuple[Path, str]) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(2, 2)}, other)
    message = refused(other, expected={"a.weight": (7, 5)})
    assert "missing a.weight" in message and "unexpected conv.weight" in message


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert "nothing there" in refused(tmp_path / "none.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "a directory" in refused(tmp_path / "folder.safetensors")
    with pytest.raises(CheckpointError, match="must be a file, got a directory"):
        save_tensors(tmp_path / "folder.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="its directory must exist"):
        save_tensors(tmp_path / "no" / "x.safetensors", {"a": torch.zeros(1)})


def test_a_false_record_of_tied_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for record in ('{"head": "nowhere"}', "[1]", "{"):
        save_file({"a": torch.zeros(2)}, path, metadata={"flextron.shared": record})
        refused(path)


def test_json_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": [1, 2.5, None], "a": {"c": "ü"}})
    assert read_json(path) == {"b": [1, 2.5, None], "a": {"c": "ü"}}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"\xff\xfe{}", b'{"a": 1', pickle.dumps({"a": 1}), b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "flextron.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flextron\.json: must"):
        read_json(path)


@pytest.mark.parametrize("obj", [{"loss": float("nan")}, {"t": torch.zeros(1)}, {"s": {1}}])
def test_what_json_cannot_say_leaves_the_old_file(tmp_path: Path, obj: object) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(CheckpointError, match="plain JSON"):
        write_json(path, obj)
    assert read_json(path) == {"old": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("version", [0, 3, "1", None, True])
def test_other_format_versions_are_refused(tmp_path: Path, version: object) -> None:
    check_format({"format": 1}, tmp_path)
    with pytest.raises(CheckpointError, match="format must be 1"):
        check_format(json.loads(json.dumps({"format": version})), tmp_path)


def test_checksums_name_the_file_that_changed(tmp_path: Path) -> None:
    def verify() -> None:
        with opened(tmp_path) as files:
            files.verify(sums)

    (tmp_path / "a.json").write_text("1")
    (tmp_path / "b.json").write_text("2")
    sums = {name: checksum_of(tmp_path / name) for name in ("a.json", "b.json")}
    verify()
    (tmp_path / "b.json").write_text("3")
    with pytest.raises(CheckpointError, match=r"b\.json: sha256 must be"):
        verify()
    (tmp_path / "b.json").unlink()
    with pytest.raises(CheckpointError, match=r"b\.json: must be a file, got nothing there"):
        verify()


def test_tensors_that_are_made_one_by_one_give_the_file_that_the_library_writes(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7),
        "é": torch.randn(4, 6)[:, ::2],
        "none": torch.zeros(0, 2),
        "one": torch.tensor(1.5).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
    }
    alive: list[weakref.ref] = []

    def make(name):
        assert all(ref() is None for ref in alive)
        found = tensors[name].clone(memory_format=torch.preserve_format)
        alive.append(weakref.ref(found))
        return found

    pending = {n: Pending(tuple(t.shape), t.dtype, partial(make, n)) for n, t in tensors.items()}
    checksum = stream_tensors(tmp_path / "a.safetensors", pending)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "b.safetensors", {"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert checksum == checksum_of(tmp_path / "b.safetensors") and len(alive) == len(tensors)
    other = {"a": pending["a"]._replace(dtype=torch.float16)}
    with pytest.raises(ValueError, match=r"save: a tensor must be .* as announced, got"):
        stream_tensors(tmp_path / "a.safetensors", other)
    assert checksum_of(tmp_path / "a.safetensors") == checksum and len([*tmp_path.iterdir()]) == 2
