"""A teacher's logits on the disk, the largest ones of every token: computed once, read in every epoch.

``teacher-logits/N.safetensors`` in a run's folder holds `TopLogits` of so many windows; ``N.json``, written last, says
of which run and with which sha256. Windows have the order in which the run first draws them, so that a longer run
appends. A killed run goes on after the last whole file. `flextron clean` removes the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flextron import ranks
from flextron.checkpoint import CheckpointError, read_json, save_tensors, write_json
from flextron.checkpoint.io import check_checksum
from flextron.data import Batches
from flextron.judge.objectives import TopLogits, top_logits

FOLDER = "teacher-logits"
_FILE_BYTES = 1 << 26
_NAMES = TopLogits._fields

Told = Callable[[int, int], object]  # called with how many windows are done, and of how many


class TeacherLogits:
    """The top logits of the windows that a run draws.

    Args:
        directory: the run's folder.
        batches: the run's order of windows.
        draws: how many windows the run draws in all.
        k: how many logits of a token are kept.
        identity: JSON that says whose logits of what text these are.
    """

    def __init__(
        self, directory: Path, batches: Batches, draws: int, k: int, identity: Mapping[str, Any]
    ) -> None:
        self.folder, self.batches, self.k = directory / FOLDER, batches, k
        self.firsts, self.slots = _firsts(batches, draws)
        self.window_bytes = batches.length * (k * (4 + 4) + 4)
        self.per_file = max(1, _FILE_BYTES // self.window_bytes)
        facts = {**identity, "k": k, "per_file": self.per_file, "length": batches.length}
        self.identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._opened: dict[int, Any] = {}

    def fill(
        self, logits: Callable[[Tensor], Tensor], rows: int, temperature: float, told: Told | None
    ) -> None:
        """Compute what is not there yet, each process its part of the files.

        Every process calls the teacher equally often, as one that is sharded needs it.

        Args:
            logits: the teacher: [rows, length] tokens -> [rows, length, V].
            rows: windows in a call.
            temperature: what logits are divided by.
            told: called as it goes on.
        """
        missing = ranks.shared(self._missing() if ranks.is_first() else [])
        rank, size = ranks.now()[:2]
        for start in range(0, len(missing), size):
            number = missing[min(start + rank, len(missing) - 1)]
            tensors = self._computed(number, logits, rows, temperature)
            if start + rank < len(missing):
                self._write(number, tensors)
            if told is not None:
                done = self._count() - len(missing) + min(start + size, len(missing))
                told(min(done * self.per_file, len(self.firsts)), len(self.firsts))
        ranks.agree(
            "train", {"the teacher's logits": self.identity}
        )  # no process reads before all have written

    def read(self, draws: Sequence[int]) -> TopLogits:
        """Those of the windows of these draws: [n, length, k] and [n, length]."""
        found = []
        for draw in draws:
            number, row = divmod(self._slot(draw), self.per_file)
            file = self._file(number)
            found.append([file.get_slice(name)[row] for name in _NAMES])
        return TopLogits(*(torch.stack(parts) for parts in zip(*found, strict=True)))

    def check_room(self) -> None:
        """Refuse to begin what the disk cannot hold."""
        parent = next(p for p in self.folder.parents if p.is_dir())
        free, present = (
            shutil.disk_usage(parent).free,
            sum(f.stat().st_size for f in self.folder.glob("*.s*")),
        )
        needed = len(self.firsts) * self.window_bytes - present
        if needed > free:
            raise ValueError(
                f"train: {parent} must have room for the teacher's {self.k} largest logits of each token, "
                f"{needed / 1e9:.1f} GB, got {free / 1e9:.1f} GB free"
            )

    def _count(self) -> int:
        return -(-len(self.firsts) // self.per_file)

    def _slot(self, draw: int) -> int:
        stream, index = self.batches.place(draw)
        return int(self.slots[stream][index])

    def _draws(self, number: int) -> list[int]:
        return self.firsts[number * self.per_file : (number + 1) * self.per_file].tolist()

    def _computed(
        self, number: int, logits: Callable[[Tensor], Tensor], rows: int, temperature: float
    ) -> dict[str, Tensor]:
        draws = self._draws(number)
        # as often as for a whole file where other processes call it too
        windows = len(draws) if ranks.now().size == 1 else min(self.per_file, len(self.firsts))
        calls = -(-windows // rows)
        parts = []
        for call in range(calls):
            asked = draws[call * rows : (call + 1) * rows]
            found = logits(torch.stack([self.batches.window(draw) for draw in asked or draws[:1]]))
            if asked:
                parts.append(top_logits(found, self.k, temperature))
        whole = [torch.cat([part[i].cpu() for part in parts]) for i in range(len(_NAMES))]
        return dict(zip(_NAMES, whole, strict=True))

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(number, "json").unlink(missing_ok=True)
        checksum = save_tensors(self._path(number, "safetensors"), tensors)
        meta = {"identity": self.identity, "windows": len(self._draws(number)), "sha256": checksum}
        write_json(self._path(number, "json"), meta)

    def _missing(self) -> list[int]:
        found = [number for number in range(self._count()) if not self._is_whole(number)]
        if len(found) == self._count():  # those of another run, if any
            shutil.rmtree(self.folder, ignore_errors=True)
        return found

    def _is_whole(self, number: int) -> bool:
        try:
            meta = read_json(self._path(number, "json"))
            if (meta.get("identity"), meta.get("windows")) != (self.identity, len(self._draws(number))):
                return False
            path = self._path(number, "safetensors")
            with path.open("rb") as file:
                check_checksum(path, file, meta.get("sha256"))
        except (CheckpointError, OSError):
            return False  # of another run, damaged, or not written to its end: it is computed again
        return True

    def _file(self, number: int) -> Any:
        """A file, mapped into memory: only the rows that are read are loaded."""
        if number not in self._opened:
            self._opened[number] = safe_open(self._path(number, "safetensors"), framework="pt")
        return self._opened[number]


def _firsts(batches: Batches, draws: int) -> tuple[Tensor, list[Tensor]]:
    """The draws that give a window for the first time, and of each stream's windows their place among these."""
    slots = [torch.full((count,), -1) for count in batches.windows_of]
    firsts: list[int] = []
    for draw in range(draws):
        stream, index = batches.place(draw)
        if slots[stream][index] < 0:
            slots[stream][index] = len(firsts)
            firsts.append(draw)
            if len(firsts) == batches.windows_per_epoch:
                break
    return torch.tensor(firsts), slots
