"""What a run tells of itself beside its loss: speed, memory, and the loss by the size of the sub-network."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from flextron import ranks
from flextron.devices import known

_BUCKETS = 4
_DECAY = 0.9  # a bucket's average remembers about its last ten micro-batches


class Meter:
    """Adds to a step's record what was measured of it.

    ``tokens_per_s`` of all processes; ``mfu``, model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B): the
    operations of the sub-networks that were trained, over what the GPUs' data sheet says that they could have computed
    in bfloat16, and absent where there is no such sheet; ``peak_bytes``, the most memory that this process has had: on
    the GPU what torch allocated, else what was resident; ``loss_by_size``, the moving average of the loss of
    micro-batches whose sub-network is at most so large, in equal parts from the smallest size to the full one.

    Args:
        device: the model's.
        bf16: whether the run computes in bfloat16.
        smallest: share of the full model that the smallest sub-network is.
        records: those of the steps so far, of a run that goes on.
    """

    def __init__(
        self, device: torch.device, bf16: bool, smallest: float, records: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self.device = device
        self.peak = peak_flops(device) if bf16 else None
        self.bounds = [smallest + (1 - smallest) * i / _BUCKETS for i in range(1, _BUCKETS + 1)]
        self.averages: dict[str, float] = {}
        for record in records:
            self.averages |= record.get("loss_by_size", {})

    def measured(
        self, tokens: int, flops: float, seconds: float, seen: Iterable[tuple[float, float]]
    ) -> dict[str, Any]:
        """What to add to a step's record.

        Args:
            tokens: trained on in the step, by all processes.
            flops: operations of the step, of all processes; NaN where they are not known.
            seconds: the step's duration.
            seen: (size, loss) of each micro-batch.
        """
        for size, loss in seen:
            name = self._bucket(size)
            self.averages[name] = _DECAY * self.averages.get(name, loss) + (1 - _DECAY) * loss
        found: dict[str, Any] = {"tokens_per_s": tokens / seconds}
        if self.peak is not None and math.isfinite(flops):
            found["mfu"] = flops / seconds / (self.peak * ranks.now().size)
        by_size = {name: self.averages[name] for name in sorted(self.averages)}
        return found | {"peak_bytes": peak_bytes(self.device), "loss_by_size": by_size}

    def _bucket(self, size: float) -> str:
        bound = next((b for b in self.bounds if size <= b), 1.0)
        return f"{bound:.2f}"


def peak_flops(device: torch.device) -> float | None:
    """Operations a second in bfloat16 by the device's data sheet; None where none is known."""
    if device.type != "cuda":
        return None
    sheet = known(torch.cuda.get_device_name(device))
    return None if sheet is None else sheet.bf16_flops


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had: allocated by torch on a GPU, resident elsewhere; 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # not a Unix
        return 0
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def line(record: Mapping[str, Any]) -> str:
    """A step's record in a few words: "loss 3.214, 5.3k tokens/s, MFU 41 %, 12.3 GB"."""
    rate = record["tokens_per_s"]
    parts = [f"loss {record['loss']:.3f}", f"{_short(rate)} tokens/s"]
    if "mfu" in record:
        parts.append(f"MFU {100 * record['mfu']:.0f} %")
    return ", ".join([*parts, f"{record['peak_bytes'] / 1e9:.1f} GB"])


def _short(number: float) -> str:
    """Two digits or more, and the letter of a power of a thousand."""
    power = min(3, int(math.log10(max(number, 1)) / 3))
    number /= 1000**power
    return f"{number:.{int(number < 10)}f}{('', 'k', 'M', 'G')[power]}"
