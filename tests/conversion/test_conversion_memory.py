"""A conversion holds a model once, in the parent's dtype, and says before it starts what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nn.models import small_model
from transformers import LlamaConfig

from flextron.nn.skeleton import fill, parameter_shapes, skeleton

MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from flextron.conversion import convert

def of(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

def run(directory):
    ids, told = torch.arange(24).view(3, 8), []
    convert(directory, directory + "-elastic", calibration=ids, device=torch.device("cpu"), planned=told.append)
    return told[0]

tiny, big = sys.argv[1:3]
run(tiny)  # what is imported and set up at the first call stays
gc.collect(); ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = of("VmRSS")
told = run(big)
print(json.dumps({"grown": of("VmHWM") - before, "told": told.total, "weights": told.weights, "said": str(told)}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
def test_a_conversion_takes_little_more_than_the_parent(tmp_path: Path) -> None:
    """The proportions of a Llama of a billion parameters, 90 million of them, in bfloat16 and two shards."""
    config = LlamaConfig(
        vocab_size=32768, hidden_size=512, intermediate_size=2048, num_hidden_layers=20, num_attention_heads=8,
        num_key_value_heads=2, dtype="bfloat16", tie_word_embeddings=True,
    )  # fmt: skip
    parent = skeleton(config)
    shapes = parameter_shapes(parent)
    some = torch.randn(32768 * 512) / 512**0.5
    drawn = {
        n: some[: torch.Size(s).numel()].view(s) if len(s) > 1 else torch.ones(s) for n, s in shapes.items()
    }
    fill(parent, {name: tensor.bfloat16() for name, tensor in drawn.items()})
    parent.save_pretrained(tmp_path / "big", max_shard_size="110MB")
    size = sum(p.stat().st_size for p in (tmp_path / "big").glob("*.safetensors"))
    assert len([*(tmp_path / "big").glob("*.safetensors")]) == 2 and size > 180e6
    small_model().bfloat16().save_pretrained(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path / "big"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["weights"] == pytest.approx(size, rel=1e-3)
    assert found["grown"] <= found["told"] <= 1.3 * size, found
    assert found["said"].startswith("memory of the conversion: about 0.2"), found
