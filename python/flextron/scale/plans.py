"""Ways to train a model on so many GPUs, and the first of them that fits. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flextron.config import ElasticConfig
from flextron.devices import Device
from flextron.recipes import StepConfig
from flextron.scale.memory import USABLE, Memory, estimate
from flextron.scale.speed import Speed, speed


@dataclass(frozen=True)
class Plan:
    """A way to train, and what it takes on each GPU."""

    ranks: int
    step: StepConfig
    memory: Memory
    speed: Speed
    fits: bool

    @property
    def name(self) -> str:
        """``full, checkpointed``"""
        return self.step.shard + ", checkpointed" * self.step.checkpoint_activations

    def command(self, directory: str = "elastic/") -> str:
        """What to type, on every node."""
        step, local = self.step, min(self.ranks, self.step.node)
        nodes = self.ranks // local
        started = "flextron"
        if self.ranks > 1:
            where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint node0:29500 " * (nodes > 1)
            started = f"torchrun {where}--nproc-per-node {local} -m flextron"
        options = [f"--batch-size {step.rows * self.ranks}", f"--length {step.length}"]
        options += [f"--accumulation {step.accumulation}"] * (step.accumulation > 1)
        options += ["--distillation 1"] * (step.teacher != "none")
        options += ["--teacher-logits 64"] * (step.teacher == "cached")
        options += ["--checkpoint-activations"] * step.checkpoint_activations
        options += [f"--shard {step.shard}"] * (step.shard != "none")
        return " ".join([started, "train", directory, *options])


def plan(shape: ElasticConfig, step: StepConfig, ranks: int, device: Device) -> Plan:
    """What a step takes on so many GPUs of a kind."""
    memory = estimate(shape, step, ranks)
    return Plan(
        ranks, step, memory, speed(shape, step, ranks, device), memory.total <= USABLE * device.memory
    )


def first_that_fits(shape: ElasticConfig, step: StepConfig, ranks: int, device: Device) -> Plan:
    """The simplest plan that fits, or else the one that takes least.

    In this order: whole copies; the same with checkpointed activations; sharded over the node; over all.
    """
    plans = [plan(shape, each, ranks, device) for each in _variants(step, ranks)]
    return next((p for p in plans if p.fits), min(plans, key=lambda p: p.memory.total))


def _variants(step: StepConfig, ranks: int) -> Iterator[StepConfig]:
    shards = ["none", *["hybrid"] * (ranks > step.node), *["full"] * (ranks > 1)]
    for shard in shards:
        for again in (False, True):
            teacher = "sharded" if step.teacher == "whole" and shard != "none" else step.teacher
            yield replace(step, shard=shard, checkpoint_activations=again, teacher=teacher)
