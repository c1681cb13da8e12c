"""Memory of tensors that are gone is kept while a training runs, and returned after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from flextron.nn.allocator import kept

def faults(count=6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.empty(12_000_000).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

faults()
outside = faults()
with kept():
    faults()
    inside, held = faults(), resident()
print(outside, inside, held - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is asked for is glibc's")
def test_pages_are_cleared_once_and_returned_at_the_end():
    found = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    outside, inside, returned = map(int, found.stdout.split())
    pages = 6 * 48_000_000 // 4096
    assert inside < 0.1 * pages < 0.9 * outside
    assert returned > 0.9 * 48_000_000
