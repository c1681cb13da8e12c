"""A compiler launcher that writes down what each compile said and took: CMAKE_CXX_COMPILER_LAUNCHER, and CUDA's.

The command runs as it is, a .cu with ``-Xptxas=-v`` besides. Its record lies beside the object, so that
kernel_resources.py reads the one build there was instead of compiling everything again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compile:
    """One command of the build, run: what it printed, its CPU seconds, and its largest process."""

    file: str
    returncode: int
    output: str
    seconds: float
    peak_bytes: int

    def said(self) -> list[str]:
        """What the compiler printed, without the assembler's account of each kernel."""
        return [
            line
            for line in self.output.splitlines()
            if "ptxas info" not in line and " bytes stack" not in line
        ]


def measure(file: str, command: Sequence[str], folder: str | Path) -> Compile:
    """Run a compile in ``folder``."""
    extra = ["-Xptxas=-v"] if file.endswith(".cu") else []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([*command, *extra], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    return Compile(file, process.returncode, text, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def object_of(command: Sequence[str]) -> str | None:
    return command[command.index("-o") + 1] if "-c" in command and "-o" in command else None


def record_of(target: str | Path) -> Path:
    """Where the record of an object lies."""
    return Path(f"{target}.compile.json")


def essence(command: Sequence[str]) -> list[str]:
    """A command without what asks for a list of headers, which Ninja adds to those of compile_commands.json."""
    kept, words = [], iter(command)
    for word in words:
        if word in ("-MT", "-MF", "-MQ"):
            next(words, None)
        elif word not in ("-MD", "-MMD"):
            kept.append(word)
    return kept


def stored(file: str, command: Sequence[str], folder: str | Path) -> Compile | None:
    """The record of this very command, if the object that is there came from it."""
    target = Path(folder) / (object_of(command) or "")
    record = record_of(target)
    if not (record.is_file() and target.is_file() and target.stat().st_mtime <= record.stat().st_mtime):
        return None
    found = json.loads(record.read_text())
    if found.pop("command") != essence(command):
        return None
    return Compile(**{**found, "file": file})


def main(command: list[str]) -> int:
    target = object_of(command)
    if target is None:
        return subprocess.call(command)
    record_of(target).unlink(missing_ok=True)
    source = next((word for word in command if word.endswith((".cu", ".cpp"))), "")
    done = measure(source, command, ".")
    if said := done.said():
        print(*said, sep="\n", file=sys.stderr)
    if done.returncode == 0:
        record_of(target).write_text(json.dumps({**asdict(done), "command": essence(command)}))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
