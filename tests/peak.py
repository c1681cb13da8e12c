"""The most memory that a call takes beside what the process has, measured in a process of its own by Linux's /proc.

python tests/peak.py billion [FOLDER]     convert a random Llama of 1.2 billion parameters: minutes, and 8 GB of disk

The tests ask for the other measurements by `measured`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.models import small_model
from transformers import LlamaConfig

import flextron
from flextron.conversion import convert
from flextron.nn.skeleton import fill, parameter_shapes, skeleton

REFRESH = Path("/proc/self/clear_refs")
needs_proc = pytest.mark.skipif(not REFRESH.exists(), reason="the peak is read from Linux's /proc")

# Llama 3.2 1B: config.json of meta-llama/Llama-3.2-1B
BILLION = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


def peak_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """The bytes that this process grew by at most during a call, and what it returned."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    REFRESH.write_text("5")  # the high-water mark starts again
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measured(what: str, *arguments: object) -> Any:
    """What one of the measurements below finds in a process of its own."""
    command = [sys.executable, __file__, what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def random_llama(directory: Path, shard: str, **settings: Any) -> int:
    """Write a random Llama in bfloat16; returns the bytes of its weights."""
    parent = skeleton(LlamaConfig(dtype="bfloat16", **settings))
    shapes = {name: torch.Size(shape) for name, shape in parameter_shapes(parent).items()}
    some = torch.randn(max(shape.numel() for shape in shapes.values())) / settings["hidden_size"] ** 0.5
    drawn = {
        name: some[: shape.numel()].view(shape) if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    fill(parent, {name: tensor.bfloat16() for name, tensor in drawn.items()})
    parent.save_pretrained(directory, max_shard_size=shard)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def conversion(tiny: str, big: str, sequences: int = 3, length: int = 8) -> dict[str, Any]:
    """The growth during the conversion of ``big``, after that of ``tiny``; what `convert` says before it, in all."""

    def run(directory: str, *size: int) -> Any:
        told: list[Any] = []
        ids = torch.arange(size[0] * size[1]).view(size) % 61
        convert(directory, f"{directory}-elastic", calibration=ids, planned=told.append)
        return told[0]

    run(tiny, 3, 8)  # what is imported and set up at the first call stays
    grown, told = peak_of(lambda: run(big, sequences, length))
    return {"grown": grown, "told": told.total, "weights": told.weights, "said": str(told)}


def loading(tiny: str, big: str) -> dict[str, tuple[float, int]]:
    """The growth during each way to load ``big``, after ``tiny``: as a share of the weights, and their bytes."""
    ways: dict[str, Callable[[str], Any]] = {
        "stored": lambda directory: flextron.from_pretrained(directory, "auto", device="cpu"),
        "float32": lambda directory: flextron.from_pretrained(directory, "float32", device="cpu"),
        "plain": lambda directory: flextron.load_plain(directory, "auto", device="cpu"),
    }
    found = {}
    for directory in (tiny, big):
        for name, load in ways.items():
            grown, model = peak_of(lambda load=load, directory=directory: load(directory))
            size = sum(p.nbytes for p in model.parameters())
            found[name] = (grown / size, size)
            del model
    return found


def billion(folder: str | None = None) -> str:
    """The growth during a conversion with a whole proof: four sequences of 128 tokens."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tiny, big = Path(temporary, "tiny"), Path(temporary, "big")
        small_model().bfloat16().save_pretrained(tiny)
        size = random_llama(big, "1300MB", **BILLION)
        found = measured("conversion", tiny, big, 16, 256)
    grown, told = (found[key] / size for key in ("grown", "told"))
    return f"{size / 1e9:.3f} GB of weights: it grew by {grown:.3f} times that; it said {told:.3f}: {found['said']}"


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "conversion":
        print(json.dumps(conversion(*arguments[:2], *map(int, arguments[2:]))))
    elif what == "loading":
        print(json.dumps(loading(*arguments)))
    else:
        print({"billion": billion}[what](*arguments))
