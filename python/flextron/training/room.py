"""What a run computes in, and whether its step fits on the device: said before the first step, or the next."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from flextron import ranks
from flextron.config import ElasticConfig
from flextron.recipes import StepConfig, TrainConfig
from flextron.scale.memory import FLOAT, USABLE, Memory, estimate
from flextron.training.sharding import chosen, computes_in_bf16, memory_of, step_of

_ERROR = 0.9  # the estimate may be a tenth too high: what is refused does not fit even then


class Room(NamedTuple):
    """What a step takes on each process, and what its device has, in bytes; whether it autocasts to bfloat16."""

    memory: Memory
    has: int
    device: str
    bf16: bool

    def __str__(self) -> str:
        m = self.memory
        parts = {
            "parameters": m.parameters,
            "optimiser states": m.states,
            "gradients": m.gradients,
            "activations": m.activations,
            "gathered": m.gathered,
            "teacher": m.teacher,
        }
        told = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
        computes = "in bfloat16, weights in float32" if self.bf16 else "in float32"
        return f"computes {computes}\nmemory of a step: {_gb(m.total)} ({told}); {self.device} has {_gb(self.has)}"


def room(
    who: str, shape: ElasticConfig, config: TrainConfig, device: torch.device, teacher: int = FLOAT
) -> Room:
    """The memory of a run's step on this process; a warning where it is close to what the device has.

    ``teacher``: bytes of one of its teacher's weights.

    Raises:
        ValueError: it cannot fit; the sentence says what to change.
    """
    size = ranks.now().size
    bf16 = computes_in_bf16(config, device)
    step = step_of(config, bf16, chosen(shape, config, bf16, device, teacher), teacher, device)
    found = Room(estimate(shape, step, size), memory_of(device), str(device), bf16)
    if _ERROR * found.memory.total > found.has:
        raise ValueError(
            f"{who}: a step must fit on {device}, got {_told(found)}; {_remedy(found, shape, step, size)}"
        )
    if found.memory.total > USABLE * found.has:
        warnings.warn(f"{who}: a step may not fit on {device}, got {_told(found)}", stacklevel=2)
    return found


def _told(found: Room) -> str:
    return f"{_gb(found.memory.total)} for the {_gb(found.has)} that it has"


def _remedy(found: Room, shape: ElasticConfig, step: StepConfig, size: int) -> str:
    """The first changes with which it would fit."""
    for change, other in _changes(step, size):
        total = estimate(shape, other, size).total
        if total <= USABLE * found.has:
            return f"it takes {_gb(total)} with {change}"
    return "no batch is small enough"


def _changes(step: StepConfig, size: int) -> Iterator[tuple[str, StepConfig]]:
    checkpointed = replace(step, checkpoint_activations=True)
    yield "--checkpoint-activations", checkpointed
    rows = step.rows
    while rows > 1:
        rows //= 2
        yield f"--checkpoint-activations --batch-size {rows * size}", replace(checkpointed, rows=rows)
    if size > 1 and step.shard == "none":
        yield "--shard full", replace(step, shard="full")
        yield "--checkpoint-activations --shard full", replace(checkpointed, shard="full")


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
