"""Several processes of one command, as torchrun would start them, without torchrun's own seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SECONDS = 120  # that a test waits for its processes: a hang is a failure, not a wait


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    rc: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(size: int, argv: Sequence[str], **environment: Any) -> list[subprocess.Popen[str]]:
    """Start ``python ARGV`` as ranks 0 to ``size - 1`` of one machine; a variable that is None is not set."""
    given = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **environment}
    found = []
    for rank in range(size):
        own = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "FLEXTRON_RANKS_TIMEOUT": 60, **given}
        env = {name: str(value) for name, value in own.items() if value is not None}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        found.append(subprocess.Popen([sys.executable, *argv], env=env, text=True, **pipes))
    return found


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float = SECONDS) -> list[Ended]:
    """Wait for processes; those that do not end in time are killed, and fail the test."""
    try:
        texts = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def run(size: int, argv: Sequence[str], **environment: Any) -> list[Ended]:
    """Start processes and wait for them."""
    return ended(start(size, argv, **environment))
