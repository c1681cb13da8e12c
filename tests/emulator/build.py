"""Builds the op library for kernels this machine lacks, loads it in the product's place, and is its face for tests."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
ORDERS = ("forward", "random", "ahead", "behind")

_library: ctypes.CDLL | None = None
_kind: str | None = None  # that is loaded
_order = (0, "forward")


KINDS = {"1": "emulator", "avx512": "emulator-avx512"}  # of FLEXTRON_EMULATE: CUDA kernels; AVX-512's loops


def build(kind: str = "1", sanitize: bool = False) -> Path:
    """The library in build/emulator (-avx512, -asan), compiled again where a source has changed."""
    import cmake
    import ninja

    folder = ROOT / "build" / (KINDS[kind] + ("-asan" if sanitize else ""))
    folder.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    options = {
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
        "FLEXTRON_VERSION": project["version"],
        "FLEXTRON_TORCH_DIR": Path(torch.__file__).parent,
        "FLEXTRON_EMULATE_CUDA": "ON" if kind == "1" else "OFF",
        "FLEXTRON_SANITIZE": "ON" if sanitize else "OFF",
    }
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    defines = [f"-D{name}={value}" for name, value in options.items()]
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers come here at once
        _run([program, "-G", "Ninja", "-S", Path(__file__).parent, "-B", folder, *defines])
        _run([program, "--build", folder])
    return folder / "libflextron.so"


def _run(command: list[Any]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nemulator: the build must succeed, got exit code {done.returncode}")


def load(kind: str = "1", sanitize: bool = False) -> None:
    """Makes ``torch.ops.flextron.*`` the built library's; to be called before flextron_ext is imported.

    flextron_ext's ``_C`` asks for libflextron.so, and the loader gives it the library of that name that is there.
    """
    global _kind, _library
    if _kind is not None:
        return
    if "flextron_ext" in sys.modules:
        raise RuntimeError("emulator: the library must be loaded before flextron_ext, got flextron_ext first")
    if kind not in KINDS:
        raise ValueError(f"emulator: FLEXTRON_EMULATE must be one of {', '.join(KINDS)}, got {kind}")
    path = str(build(kind, sanitize))
    torch.ops.load_library(path)
    _kind = kind
    if kind == "1":
        _library = ctypes.CDLL(path)


def load_asked() -> None:
    """What FLEXTRON_EMULATE asks for."""
    if kind := os.environ.get("FLEXTRON_EMULATE"):
        load(kind, os.environ.get("FLEXTRON_EMULATE_SANITIZE") == "1")


def load_in_process() -> None:
    """The same in a process that a test starts, which is asked for one of AVX-512's loops by FLEXTRON_ISA, too.

    Emulated CUDA kernels are the test's own alone: such a process runs on the CPU's.
    """
    if os.environ.get("FLEXTRON_EMULATE") != "1":
        load_asked()


def loaded() -> bool:
    """Whether CUDA kernels are emulated."""
    return _library is not None


def _call(name: str, *arguments: Any) -> str:
    function = getattr(_library, f"flextron_emulator_{name}")
    function.restype = ctypes.c_char_p
    answer = function(*arguments).decode()
    if answer[0] == "!":
        raise RuntimeError(answer[1:])
    return answer[1:]


def set_order(seed: int, name: str) -> None:
    """The order threads run in from here on: one of ORDERS, drawn from the seed."""
    global _order
    _call("set_order", ctypes.c_uint64(seed), name.encode())
    _order = (seed, name)


@contextlib.contextmanager
def order(seed: int, name: str) -> Iterator[None]:
    """``set_order`` for a while."""
    before = _order
    set_order(seed, name)
    try:
        yield
    finally:
        set_order(*before)


def watch(name: str, tensor: torch.Tensor) -> None:
    """Counts the bytes that kernels read from and write to the tensor's storage apart, under this name."""
    data = tensor.untyped_storage()
    _call("watch", name.encode(), ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(data.nbytes()))


def counters() -> list[dict[str, Any]]:
    """What each launch since the last call did; ``watched`` maps a name to its bytes read and written."""
    return json.loads(_call("take_counters"))


def reset(banks: bool = True) -> None:
    """Forgets watches and counters; ``banks``: counts those of shared memory from here on, a third of a run's time."""
    _call("count_banks", ctypes.c_int(banks))
    _call("clear_watches")
    _call("take_counters")


@dataclass(frozen=True)
class Fault:
    """A row of the table in faults.cu."""

    name: str
    outcomes: tuple[str, ...]  # any of them shows that it was caught
    words: tuple[str, ...]  # all of them are in an error's text

    def run(self, planted: bool = True) -> list[float]:
        """What the planted kernel computes, or its corrected twin."""
        values = _call("run_fault", f"{self.name}{'' if planted else '/fixed'}".encode())
        return [float(value) for value in values.split()]


def faults() -> list[Fault]:
    rows = json.loads(_call("fault_names"))
    return [Fault(r["name"], tuple(r["outcome"].split("|")), tuple(r["words"].split("|"))) for r in rows]


def words() -> list[str]:
    """The names of the checks in words.cu."""
    return json.loads(_call("word_names"))


def check_word(name: str) -> None:
    _call("check_word", name.encode())


if __name__ == "__main__":
    asked = sys.argv[1:]
    print(build("avx512" if "avx512" in asked else "1", "--sanitize" in asked))
