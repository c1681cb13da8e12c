"""Timing of callables side by side, so that the drift of a shared machine falls on all of them alike."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time, sleep

import torch

from flextron.artefacts.noise import Noise

Setup = Callable[[str], object]
# A callable, and how often -> seconds for all of its calls.
Clock = Callable[[Callable[[], object], int], float]
# What `compare` has measured so far -> whether that is enough.
Enough = Callable[["Timing", Mapping[str, "Comparison"]], bool]
_MAX_REPEATS = 10_000
_SHORT = 0.5  # seconds below which the system's ticks, a hundredth of a second each, tell too little
_FEW = 6  # samples below which their ends say nothing of a drift
_PROCESSORS = Path("/proc/stat")  # Linux: what they have done, in ticks


@dataclass(frozen=True)
class Timing:
    """Seconds for one call: the median and quartiles of ``samples``, one sample for every round."""

    median: float
    p25: float
    p75: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], tuple(samples))
        p25, middle, p75 = quantiles(samples, n=4, method="inclusive")
        return cls(middle, p25, p75, tuple(samples))

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        return (self.p75 - self.p25) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Comparison:
    """One callable against a reference that was timed right before and right after it.

    Attributes:
        ratio: median over rounds of its time over the reference's.
        ratios: one for every round.
    """

    ratio: float
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Comparison:
        return cls(median(ratios), tuple(ratios))

    @property
    def half_spread(self) -> float:
        """Half the distance between the quartiles of the ratios."""
        timing = Timing.of(list(self.ratios))
        return (timing.p75 - timing.p25) / 2

    @property
    def error(self) -> float:
        """Standard error of the ratio, over the ratio, as that of a median of normally distributed numbers."""
        return 1.253 * self.half_spread / 0.6745 / len(self.ratios) ** 0.5 / self.ratio


class NoiseWatch:
    """What other programs do from its making on, beside work of ours on ``threads`` processors."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._began, self._ours, self._ticks = perf_counter(), process_time(), _ticks_of_ours()

    @classmethod
    def on(cls, device: torch.device) -> NoiseWatch:
        """Beside work on ``device``: a CPU's is torch's threads', a GPU's is launched by one."""
        return cls(torch.get_num_threads() if device.type == "cpu" else 1)

    def noise(self, samples: Sequence[float]) -> Noise:
        """The noise until now; ``samples`` are times of the same work, in the order in which they were measured."""
        timing = Timing.of(list(samples))
        third = len(samples) // 3
        drift = 0.0
        if len(samples) >= _FEW:
            drift = abs(median(samples[-third:]) / max(median(samples[:third]), 1e-12) - 1)
        return Noise(self._taken(), drift, timing.spread)

    def _taken(self) -> float | None:
        seconds, now = perf_counter() - self._began, _ticks_of_ours()
        if seconds < _SHORT or not self._ticks or self._ticks.keys() != now.keys():
            return None
        busy, total = 0, 0
        for name, ticks in now.items():
            spent = [after - before for before, after in zip(self._ticks[name], ticks, strict=True)]
            total += sum(spent)
            busy += sum(spent) - spent[3] - spent[4]
        ours = (process_time() - self._ours) / seconds  # processors
        others = max(0.0, len(now) * busy / max(total, 1) - ours)
        threads = min(self.threads, len(now))
        return max(0.0, others - (len(now) - threads)) / threads


def wait_until_idle(seconds: float = 60.0, share: float = 0.1) -> None:
    """Wait until other programs use at most ``share`` of the processors; after ``seconds`` say that they do not.

    Nothing is known, and nothing waited for, where there is no /proc/stat.
    """
    if not _PROCESSORS.exists():
        return
    end = perf_counter() + seconds
    while (busy := _busy()) > share:
        if perf_counter() > end:
            print(
                f"timing: the processors must be idle, got {busy:.0%} busy after {seconds:.0f} s of waiting"
            )
            return


def wall_clock(run: Callable[[], object], repeats: int) -> float:
    """Seconds on the host's clock until the device, if there is one, has done all of it."""
    _wait_for_device()
    start = perf_counter()
    for _ in range(repeats):
        run()
    _wait_for_device()
    return perf_counter() - start


def device_clock(run: Callable[[], object], repeats: int) -> float:
    """Seconds between two events on the current CUDA stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock of what runs on ``device``: events on a GPU, which count no wait of the host for its results."""
    return device_clock if device.type == "cuda" else wall_clock


def bench(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    min_seconds: float = 0.02,
    *,
    setup: Setup | None = None,
    on_round: Callable[[int], object] | None = None,
    clock: Clock = wall_clock,
) -> dict[str, Timing]:
    """Time several callables in interleaved rounds.

    Every round takes one sample of each, in the opposite order to the round before, so neither slow drift
    nor the neighbour's caches favour one of them. A sample repeats the call until ``min_seconds`` have
    passed; how often is settled in the warm-up, which is not counted.

    Args:
        candidates: name -> callable without arguments.
        rounds: samples of each.
        min_seconds: least duration of a sample.
        setup: called with the name before each sample, outside the clock.
        on_round: called with the number of rounds done, for a progress bar.
        clock: :func:`wall_clock`, which waits for the device, or :func:`device_clock`.

    Returns:
        name -> Timing, in seconds for one call.
    """
    _check(candidates, rounds, min_seconds)
    repeats = {name: _warm_up(name, run, min_seconds, setup, clock) for name, run in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(rounds):
        for name in _alternate(list(candidates), done):
            samples[name].append(_sample(name, candidates[name], repeats[name], setup, clock))
        if on_round is not None:
            on_round(done + 1)
    return {name: Timing.of(values) for name, values in samples.items()}


def compare(
    reference: tuple[str, Callable[[], object]],
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    min_seconds: float = 0.02,
    *,
    setup: Setup | None = None,
    on_round: Callable[[int], object] | None = None,
    clock: Clock = wall_clock,
    enough: Enough = lambda *_: True,
) -> tuple[Timing, dict[str, Comparison]]:
    """Time each candidate between two samples of one reference.

    A round runs reference, candidate, reference, candidate, .., reference; a candidate's ratio divides by
    the mean of its two neighbours, which cancels drift that is linear over those three samples. Rounds
    alternate the order of the candidates.

    Args:
        reference: its name (for ``setup``) and callable.
        candidates, rounds, min_seconds, setup, on_round, clock: what :func:`bench` takes.
        enough: asked after ``rounds`` rounds, and after each one from then on, whether what was measured is enough.

    Returns:
        The reference's Timing over all its samples, and name -> Comparison.
    """
    _check(candidates, rounds, min_seconds)
    base_name, base_run = reference
    base_repeats = _warm_up(base_name, base_run, min_seconds, setup, clock)
    repeats = {name: _warm_up(name, run, min_seconds, setup, clock) for name, run in candidates.items()}
    base: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    found: tuple[Timing, dict[str, Comparison]] | None = None
    for done in count():
        if done >= rounds:
            found = Timing.of(base), {name: Comparison.of(r) for name, r in ratios.items()}
            if enough(*found):
                break
        base.append(_sample(base_name, base_run, base_repeats, setup, clock))
        for name in _alternate(list(candidates), done):
            seconds = _sample(name, candidates[name], repeats[name], setup, clock)
            base.append(_sample(base_name, base_run, base_repeats, setup, clock))
            ratios[name].append(2 * seconds / (base[-2] + base[-1]))
        if on_round is not None:
            on_round(done + 1)
    assert found is not None
    return found


def _check(candidates: Mapping[str, object], rounds: int, min_seconds: float) -> None:
    if not candidates:
        raise ValueError("bench: candidates must have at least one callable, got none")
    if rounds < 1:
        raise ValueError(f"bench: rounds must be at least 1, got {rounds}")
    if min_seconds < 0:
        raise ValueError(f"bench: min_seconds must not be negative, got {min_seconds}")


def _busy() -> float:
    """The share of the processors' time that is used while this program sleeps."""
    before = _ticks()
    sleep(0.5)
    spent = [after - ticks for ticks, after in zip(before, _ticks(), strict=True)]
    idle = spent[3] + spent[4]  # and waiting for a disk
    return 1 - idle / max(sum(spent), 1)


def _ticks() -> list[int]:
    """Of all processors together: user, nice, system, idle, iowait, irq, softirq, steal."""
    return _read_ticks()["cpu"]


def _ticks_of_ours() -> dict[str, list[int]]:
    """The same of each processor that this program may use; empty where there is no /proc/stat."""
    if not _PROCESSORS.exists():
        return {}
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    return {name: ticks for name, ticks in _read_ticks().items() if name in ours}


def _read_ticks() -> dict[str, list[int]]:
    lines = (line.split() for line in _PROCESSORS.read_text().splitlines() if line.startswith("cpu"))
    return {name: [int(tick) for tick in ticks[:8]] for name, *ticks in lines}


def _alternate(names: list[str], done: int) -> list[str]:
    return names[::-1] if done % 2 else names


def _warm_up(
    name: str, run: Callable[[], object], min_seconds: float, setup: Setup | None, clock: Clock
) -> int:
    """Run twice (the first call may allocate or compile), and return how many calls fill a sample."""
    _sample(name, run, 1, setup, clock)
    once = _sample(name, run, 1, setup, clock)
    return max(1, min(_MAX_REPEATS, math.ceil(min_seconds / max(once, 1e-9))))


def _sample(name: str, run: Callable[[], object], repeats: int, setup: Setup | None, clock: Clock) -> float:
    if setup is not None:
        setup(name)
    return clock(run, repeats) / repeats


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def read_bandwidth() -> float:
    """Bytes per second of the fastest of some reductions over 256 MB, on torch's threads."""
    values = torch.ones(64 * 2**20)
    best = 0.0
    for reduce in (values.sum, values.amax, values.view(torch.int64).sum):
        for _ in range(5):
            begin = perf_counter()
            reduce()
            best = max(best, values.numel() * 4 / (perf_counter() - begin))
    return best
