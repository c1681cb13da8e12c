"""The tensors of a run in a folder of safetensors files: written in the background, read by any number of processes.

torch's distributed checkpoint (DCP) does both. Each process writes its part of a sharded tensor, and as many bytes as
the others of what all processes have. Nothing is pickled: the place of each part is in the header of its file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from flextron import ranks
from flextron.checkpoint import CheckpointError, checksum_of, load_tensors, read_json, write_json
from flextron.checkpoint.io import check_checksum
from flextron.sentences import first_line, listed

_FILE = 2 << 30  # bytes of a file: DCP holds one in memory while it writes


class Writer:
    """Writes folders of tensors, at most one at a time, while training goes on."""

    def __init__(self) -> None:
        several = ranks.now().size > 1
        # a group of its own: messages of the background must not mix with those of training
        self._group = dist.new_group(backend="gloo") if several else None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def write(
        self, folder: Path, tensors: Mapping[str, Tensor], done: Callable[[dict[str, str]], None]
    ) -> None:
        """Copy tensors to the host's memory, and go on to write them after this has returned.

        Args:
            folder: made; all processes see it.
            tensors: by name, the same names on all processes.
            done: called on rank 0 with the sha256 of each file, once all are on the disk.
        """
        self.wait()
        _expect_one_process()
        writer = HuggingFaceStorageWriter(str(folder), _files(tensors), save_distributed=True)
        saved: Any = dcp.async_save(
            _own(tensors), storage_writer=writer, process_group=self._group, no_dist=self._group is None
        )
        self._pending = self._thread.submit(self._finish, saved, folder, done)

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            if lost := next((c for c in causes if not isinstance(c, OSError)), None):
                raise lost from None
            raise CheckpointError(
                f"train: a checkpoint must be written whole, got {first_line(causes[0])}"
            ) from None

    def close(self) -> None:
        """Wait, and end the background's thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def _finish(self, saved: Future[None], folder: Path, done: Callable[[dict[str, str]], None]) -> None:
        saved.result()
        me = ranks.now().rank
        own = {path.name: checksum_of(path) for path in folder.glob(f"shard-{me + 1:05d}-*.safetensors")}
        write_json(folder / f"rank-{me:05d}.json", own)
        if self._group is not None:
            dist.barrier(group=self._group)
        if ranks.is_first():
            lists = sorted(folder.glob("rank-*.json"))
            checksums = {name: value for path in lists for name, value in read_json(path).items()}
            for path in lists:
                path.unlink()
            done(checksums)


def check_files(folder: Path, checksums: Mapping[str, str]) -> None:
    """Refuse a folder whose files are not those that were written.

    All processes call this, and each reads its part of the files.
    """
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    if there != sorted(checksums):
        raise CheckpointError(f"{folder}: must hold the files that were saved, got {listed(there) or 'none'}")

    def check(name: str) -> None:
        with (folder / name).open("rb") as file:
            check_checksum(folder / name, file, checksums[name])

    ranks.divided(there, check, CheckpointError)


def names_in(place: Path) -> set[str]:
    """The names of the tensors in a folder, or in one file of an earlier version."""
    if place.is_dir():
        return set(HuggingFaceStorageReader(str(place)).read_metadata().state_dict_metadata)
    return set(load_tensors(place))


def read(place: Path, targets: dict[str, Tensor]) -> None:
    """Copy stored tensors into ``targets``, which may be sharded, on all processes; names and shapes must agree.

    Raises:
        CheckpointError: they do not.
    """
    if place.is_file():
        _read_file(place, targets)
        return
    reader = HuggingFaceStorageReader(str(place))
    stored = reader.read_metadata().state_dict_metadata
    wrong = [name for name in {*targets, *stored} if not _agree(targets.get(name), stored.get(name))]
    if wrong:
        raise CheckpointError(f"{place}: tensors must be those of the run, got other {listed(sorted(wrong))}")
    _expect_one_process()
    dcp.load(targets, storage_reader=reader, no_dist=ranks.now().size == 1)


def _agree(target: Tensor | None, stored: object) -> bool:
    size, properties = getattr(stored, "size", None), getattr(stored, "properties", None)
    return target is not None and size == target.shape and getattr(properties, "dtype", None) == target.dtype


def _read_file(path: Path, targets: Mapping[str, Tensor]) -> None:
    """The one file of an earlier version's checkpoint; what only that version needed is left."""
    tensors = load_tensors(path)
    wrong = [n for n, t in targets.items() if n not in tensors or tensors[n].shape != t.shape]
    if wrong:
        raise CheckpointError(f"{path}: tensors must be those of the run, got other {listed(sorted(wrong))}")
    with torch.no_grad():
        for name, target in targets.items():
            value = tensors[name]
            if isinstance(target, DTensor):
                value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
            target.copy_(value)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process writes: sharded tensors, and its part of those that every process has."""
    me, loads = ranks.now(), [0] * ranks.now().size
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            own[name] = tensor
            continue
        least = loads.index(min(loads))
        loads[least] += tensor.nbytes + 1
        if least == me.rank:
            own[name] = tensor
    return own


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, of each process, that a tensor goes to."""
    found, size = {}, 0
    for name, tensor in tensors.items():
        found[name] = 1 + size // _FILE
        size += tensor.nbytes // ranks.now().size
    return found


def _expect_one_process() -> None:
    """DCP warns in every save and load of a process that is alone."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed.checkpoint")
