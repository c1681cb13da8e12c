"""Python in a process of its own, whose CPU kernels are one instruction set's."""

from __future__ import annotations

import pytest
from processes import Ended, Processes

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


def run_python(processes: Processes, isa: str, code: str, *arguments: str) -> Ended:
    """What the code printed with that FLEXTRON_ISA; the test is skipped where the machine lacks it."""
    done = processes.alone(["-c", code, *arguments], FLEXTRON_ISA=isa)
    if "must be one this machine has" in done.out + done.err:
        pytest.skip(f"this machine has no {isa}")
    return done
