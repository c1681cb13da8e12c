"""Small work wakes no thread: many tiny forwards wait for no thread whose core another process has."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

# In a process of its own: torch makes its threads when the first loop is shared.
BEGIN = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from emulator import build as emulator
emulator.load_in_process()
from cases import CASES
import flextron_ext as ops

def linear(T, K):
    x, weight = torch.zeros(T, K), torch.zeros(K, K)
    return lambda: ops.elastic_linear(x, weight, None, K, K)
def mlp(T, K):
    x, weights = torch.zeros(T, K), torch.zeros(3, K, K)
    return lambda: ops.elastic_mlp(x, *weights, None, None, None, K)
def packed_mlp(T, K):
    x, panels = torch.zeros(T, K), ops.pack_mlp(*torch.zeros(3, K, K))
    return lambda: ops.packed_mlp(x, *panels, None, None, None, K, K)
def decode(S):
    q, caches, lengths = torch.zeros(1, 1, 8, 32), torch.zeros(2, 1, S, 4, 32), torch.tensor([S])
    return lambda: ops.head_attention_decode(q, *caches, lengths, 4)

def new_threads(call):
    def count():
        return len(os.listdir("/proc/self/task"))
    torch.set_num_threads(4)
    begun = count()
    call()
    return count() - begun
torch.set_num_threads(1)  # so that what makes the inputs shares nothing
"""
SMALL = """
calls = [linear(7, 128), mlp(2, 128), packed_mlp(2, 128), decode(200)]
for case in CASES:
    op, inputs = case.wrapper, next(iter(case.inputs("cpu", torch.float32)))
    calls.append(lambda op=op, inputs=inputs: op(**inputs))
logits = torch.zeros(1000, 3)
calls.append(lambda: ops.route(logits, seed=1))
for call in calls:
    assert new_threads(call) == 0, call
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + program, str(TESTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them")
def test_small_work_wakes_no_thread():
    run(SMALL)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them")
@pytest.mark.parametrize("large", ["linear(64, 512)", "mlp(64, 512)", "packed_mlp(64, 512)", "decode(9000)"])
def test_large_work_is_shared(large):
    run(f"assert new_threads({large}) > 0")
