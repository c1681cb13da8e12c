"""What ptxas says of every kernel, held against tests/kernel_resources.csv: python tests/kernel_resources.py [--update]

Reads what compile_record.py wrote down while build/cmake was built; what has no record is compiled again, with the
build's own flags, and thrown away. Fails where a kernel has a stack frame, spills, takes more registers than its row
allows, has no row, or a row has no kernel; where a file takes more than a minute of a core; and where a clean build
would pass 10 minutes or 4 GiB on two cores. A build for the GPU at hand alone is held against the rows of its
architecture. Without nvcc it says so and passes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from compile_record import Compile, measure, stored

ROOT = Path(__file__).resolve().parents[1]
DATABASE = ROOT / "build" / "cmake" / "compile_commands.json"
TABLE = Path(__file__).with_suffix(".csv")
LAUNCHER = "compile_record.py"

CORES = 2  # what is compiled at once, and the machine the limits are for
MAX_SECONDS, MAX_FILE_SECONDS, MAX_BYTES = 600, 60, 4 << 30
REGISTER_SLACK = 8  # a register more or less is the compiler's choice; one allocation unit is not


@dataclass(frozen=True, order=True)
class Kernel:
    """A row of the table. ``shared_bytes`` is what the kernel declares, without what its launch adds."""

    file: str
    kernel: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.kernel, self.arch


def parse(file: str, text: str) -> list[Kernel]:
    """The kernels in what ``nvcc -Xptxas=-v`` printed, demangled or not, sorted."""
    found: dict[tuple[str, str], Kernel] = {}
    current = None
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(.+)' for '(sm_\w+)'", line):
            current = entry[1], entry[2]
            found[current] = Kernel(file, *current, 0, 0, 0, 0)
        elif current is None:
            continue
        elif stack := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            frame, stores, loads = map(int, stack.groups())
            row = found[current]  # functions that were not inlined count for the kernel they are listed under
            found[current] = replace(
                row, stack_bytes=row.stack_bytes + frame, spill_bytes=row.spill_bytes + stores + loads
            )
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[current] = replace(
                found[current], registers=int(used[1]), shared_bytes=int(shared[1]) if shared else 0
            )
    names = {row.kernel: readable(row.kernel) for row in found.values()}
    shared_by = Counter(names.values())
    return sorted(
        replace(
            row, kernel=short if shared_by[short := names[row.kernel]] == 1 else without_scopes(row.kernel)
        )
        for row in found.values()
    )


def without_scopes(name: str) -> str:
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\b(?:[a-z_]\w*::)+", "", name)
    return re.sub(r"\((?:int|long|unsigned int|unsigned long)\)(-?\d+)", r"\1", name).replace(" >", ">")


def readable(name: str) -> str:
    """A demangled kernel without its scopes and arguments: elastic_linear_kernel<bf16, 128, true>."""
    name = without_scopes(name).replace("(bool)1", "true").replace("(bool)0", "false")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def compare(recorded: Iterable[Kernel], found: Iterable[Kernel]) -> list[str]:
    """One line for everything that got worse, or that the table does not know."""
    rows, kernels = {row.key: row for row in recorded}, {row.key: row for row in found}
    wrong = []
    for key, kernel in kernels.items():
        name = " ".join(key)
        for what in ("stack", "spill"):
            if size := getattr(kernel, f"{what}_bytes"):
                wrong.append(f"{name}: {what}_bytes must be 0, got {size}")
        if key not in rows:
            wrong.append(f"{name}: must have a row, got none")
            continue
        row = rows[key]
        if kernel.registers > row.registers + REGISTER_SLACK:
            limit = f"{row.registers} + {REGISTER_SLACK}"
            wrong.append(f"{name}: registers must be at most {limit}, got {kernel.registers}")
        if kernel.shared_bytes > row.shared_bytes:
            wrong.append(
                f"{name}: shared_bytes must be at most {row.shared_bytes}, got {kernel.shared_bytes}"
            )
    wrong += [
        f"{' '.join(key)}: must be compiled, got a row without a kernel" for key in rows if key not in kernels
    ]
    return wrong


def read_table(path: Path = TABLE) -> list[Kernel]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Kernel(*row[:3], *map(int, row[3:])) for row in list(csv.reader(file))[1:]]


def write_table(rows: Sequence[Kernel], path: Path = TABLE) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Kernel))
        writer.writerows(map(astuple, sorted(rows)))


def commands(database: Path = DATABASE) -> Iterator[tuple[str, list[str], str]]:
    """File in the repository, command and its folder, for each entry of the build whose source is still there."""
    for entry in json.loads(database.read_text()):
        if Path(entry["file"]).exists():
            file = os.path.relpath(entry["file"], ROOT)
            command = shlex.split(entry["command"])
            launched = next((i + 1 for i, word in enumerate(command) if word.endswith(LAUNCHER)), 0)
            yield file, command[launched:], entry["directory"]


def architectures(command: Sequence[str]) -> set[str]:
    """The architectures that a command of nvcc assembles for: {"sm_80", "sm_90a"}."""
    return set(re.findall(r"\bsm_\w+", " ".join(command)))


def run(file: str, command: list[str], folder: str) -> Compile:
    """What the build recorded of this command, or the command run once more, its object thrown away."""
    if found := stored(file, command, folder):
        return found
    with tempfile.TemporaryDirectory() as scratch:
        command = command.copy()
        command[command.index("-o") + 1] = f"{scratch}/object.o"
        return measure(file, command, folder)


def demangle(text: str) -> str:
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None:
        raise SystemExit("kernel_resources: c++filt or cu++filt must be installed, got neither")
    return subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout


def report(kernels: Sequence[Kernel], compiles: Sequence[Compile], wall: float) -> list[str]:
    """Prints both tables; returns a line for each limit of the build that is passed."""
    print(f"{'file':<32}{'arch':<9}{'registers':>9}{'shared':>8}{'stack':>7}{'spills':>7}  kernel")
    for k in kernels:
        name = k.file.rsplit("/", 1)[-1]
        numbers = f"{k.registers:>9}{k.shared_bytes:>8}{k.stack_bytes:>7}{k.spill_bytes:>7}"
        print(f"{name:<32}{k.arch:<9}{numbers}  {k.kernel}")
    print(f"\n{'file':<56}{'CPU s':>7}{'peak MiB':>10}")
    for c in sorted(compiles, key=lambda c: -c.seconds):
        print(f"{c.file:<56}{c.seconds:>7.1f}{c.peak_bytes / 2**20:>10.0f}")
    seconds = max(sum(c.seconds for c in compiles) / CORES, *(c.seconds for c in compiles))
    peak = sum(sorted((c.peak_bytes for c in compiles), reverse=True)[:CORES])
    print(
        f"\n{len(compiles)} files, {len(kernels)} kernels: {seconds:.0f} s on {CORES} free cores"
        f" (here {wall:.0f} s), at most {peak / 2**30:.2f} GiB"
    )
    wrong = []
    if seconds > MAX_SECONDS:
        wrong.append(f"a clean build must take at most {MAX_SECONDS} s on {CORES} cores, got {seconds:.0f}")
    wrong += [
        f"{c.file}: must take at most {MAX_FILE_SECONDS} s of a core to compile, got {c.seconds:.0f}"
        for c in compiles
        if c.seconds > MAX_FILE_SECONDS
    ]
    if peak > MAX_BYTES:
        wrong.append(f"a clean build must take at most {MAX_BYTES >> 30} GiB, got {peak / 2**30:.2f}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--only", default="", help="the files whose path contains this, and no limits")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("kernel_resources: nvcc is not here, so no kernel was compiled and none was checked.")
        return 0
    if not DATABASE.exists():
        raise SystemExit(f"kernel_resources: the build must be there, got no {DATABASE.relative_to(ROOT)}")
    if arguments.update and arguments.only:
        parser.error("--only must not be given with --update, got both")

    jobs = [job for job in commands() if arguments.only in job[0]]
    built = {arch for _, command, _ in jobs for arch in architectures(command)}
    table = read_table()
    known_archs = {row.arch for row in table}
    if arguments.update and not known_archs <= built:
        wanted, got = (", ".join(sorted(archs)) for archs in (known_archs, built))
        parser.error(f"--update must be given a build for {wanted}, got one for {got}")
    known = {job[0] for job in jobs}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "kernels").glob("*.cu")}
    wrong = [
        f"{file}: must be in the build, got none of it"
        for file in sorted(sources - known)
        if arguments.only in file
    ]
    begin = time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        compiles = list(pool.map(lambda job: run(*job), jobs))
    wall = time.perf_counter() - begin
    for c in compiles:
        if c.returncode:
            print(*c.said(), sep="\n", file=sys.stderr)
            wrong.append(f"{c.file}: must compile, got exit code {c.returncode}")
    kernels = sorted(
        kernel for c in compiles if c.file.endswith(".cu") for kernel in parse(c.file, demangle(c.output))
    )
    limits = report(kernels, compiles, wall)
    if arguments.update and not wrong:
        write_table(kernels)
    if not arguments.only:
        wrong += limits
    if arguments.update:
        table, known_archs = read_table(), built
    recorded = [row for row in table if arguments.only in row.file and row.arch in built]
    wrong += compare(recorded, [kernel for kernel in kernels if kernel.arch in known_archs])
    for line in wrong:
        print(f"kernel_resources: {line}", file=sys.stderr)
    if wrong:
        advice = "; what is meant: python tests/kernel_resources.py --update"
        print(
            f"kernel_resources: {len(wrong)} to look at{'' if arguments.update else advice}", file=sys.stderr
        )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
