"""Python in a process of its own, whose CPU kernels are one instruction set's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INSTRUCTION_SETS = ("generic", "avx2", "avx512")


def run_python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What ``python ARGUMENTS`` printed with that FLEXTRON_ISA; the test is skipped where the machine lacks it."""
    environment = {**os.environ, "FLEXTRON_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if "must be one this machine has" in done.stdout + done.stderr:
        pytest.skip(f"this machine has no {isa}")
    return done
