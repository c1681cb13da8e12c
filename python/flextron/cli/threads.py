"""How many threads compute on the CPU, and how long an idle one spins; settled before torch reads its environment."""

from __future__ import annotations

import os
from pathlib import Path

SPINS = "1000"  # 20 microseconds on an AMD EPYC (Zen 4)


def settle() -> None:
    """Keep torch's threads to the processor time that this process may use, and let idle ones give way soon.

    torch starts a thread for each core that the affinity allows. Of a container's quota (`cpu.max`, in Linux' control
    groups) it knows nothing, and threads beyond it are stopped in the midst of a loop that the others then wait for.
    Waiting, the threads of libgomp spin for milliseconds, in which two programs on the same cores wait for each other.
    A variable that is set is left alone.
    """
    if "OMP_NUM_THREADS" not in os.environ and (allowed := quota()) is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if allowed < cores:
            os.environ["OMP_NUM_THREADS"] = str(allowed)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Processors that the control groups of this process give it, at least 1; None where they set no limit."""
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for names, place in groups:
        if names in ("", "cpu", "cpu,cpuacct"):  # version 2, or the controller of version 1
            limits += [_limit(folder) for folder in _upwards(root / names, place)]
    found = [limit for limit in limits if limit is not None]
    return max(1, int(min(found))) if found else None


def _upwards(root: Path, place: str) -> list[Path]:
    """The folder of a group, and those of all that it is in: each may set a limit."""
    folder = root / place.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _limit(folder: Path) -> float | None:
    """Processors, from files of either version."""
    limit, period = _words(folder / "cpu.max", 2)
    if not limit:
        limit, period = (_words(folder / f"cpu.cfs_{name}_us", 1)[0] for name in ("quota", "period"))
    return None if limit in ("", "max", "-1") or not period else float(limit) / float(period)


def _words(path: Path, count: int) -> list[str]:
    try:
        words = path.read_text().split()
    except OSError:
        words = []
    return words if len(words) == count else [""] * count
