"""What a training step sends between GPUs, and how long it takes: a model on paper, not a measurement. No torch here.

    compute   operations of the step / (MFU x the data sheet's rate); ElasticConfig.flops counts them
    optimiser bytes of weights, gradients and states that AdamW reads and writes / memory bandwidth
    traffic   collectives as rings: of M bytes, a rank sends (N - 1) / N M in an all-gather or a reduce-scatter and
              twice that in an all-reduce (ZeRO, arXiv 1910.02054, section 7; nccl-tests, doc/PERFORMANCE.md); over
              several nodes NCCL makes a ring for each adapter, so that each carries its part of what leaves a node

Traffic and compute overlap (FSDP2 prefetches, DDP reduces in buckets), so a step takes the longer of the two, and then
the optimiser's time. Latencies, stragglers and reading of data are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flextron.config import ElasticConfig
from flextron.devices import Device
from flextron.recipes import StepConfig, TrainConfig
from flextron.scale.memory import FLOAT, HALF
from flextron.scale.shapes import count, of_layer, of_root

# Share of the data sheet's rate that training reaches: an assumption. torchtitan reports 33 % for Llama 3.1 8B with
# FSDP2 on 8 and on 128 H100, without torch.compile (docs/performance.md of pytorch/torchtitan).
MFU = 0.33
_ADAMW = (
    8 * FLOAT
)  # bytes of a parameter: weight, gradient and two states read, all but the gradient written; the norm


@dataclass(frozen=True)
class Speed:
    """A step of one rank, in bytes and seconds.

    Attributes:
        node_bytes, network_bytes: what it sends to GPUs of its node, and to other nodes.
        compute, traffic, optimiser: how long each would take alone.
        tokens: of all ranks in a step.
    """

    node_bytes: float
    network_bytes: float
    compute: float
    traffic: float
    optimiser: float
    tokens: int

    @property
    def seconds(self) -> float:
        return max(self.compute, self.traffic) + self.optimiser

    @property
    def per_million(self) -> float:
        """Seconds for a million tokens."""
        return self.seconds / self.tokens * 1e6


def speed(shape: ElasticConfig, step: StepConfig, ranks: int, device: Device) -> Speed:
    """A step of a model on so many GPUs of a kind, ``step.node`` in each node."""
    parameters = shape.num_layers * count(of_layer(shape)) + count(of_root(shape))
    node, network = _traffic(shape, step, ranks, parameters)
    tokens = step.rows * step.length * step.accumulation
    return Speed(
        node_bytes=node,
        network_bytes=network,
        compute=_operations(shape, step) * tokens / (MFU * device.bf16_flops),
        traffic=max(node / device.link, network / device.network),
        optimiser=_ADAMW * parameters / step.shards(ranks) / device.bandwidth,
        tokens=tokens * ranks,
    )


def mean_flops(shape: ElasticConfig, length: int, full_probability: float) -> float:
    """Operations for a token, on average over the sub-networks that training draws (training/sampler.py)."""
    full = shape.full()
    whole = shape.flops(full, length)
    drawn = float(whole)  # operations are linear in the widths: of each axis, what its mean saves
    for axis in shape.axes:
        several = [replace(full, **{axis.name: (width,) * shape.num_layers}) for width in axis.menu]
        drawn += sum(shape.flops(widths, length) for widths in several) / len(several) - whole
    return full_probability * whole + (1 - full_probability) * drawn


def _operations(shape: ElasticConfig, step: StepConfig) -> float:
    """For a token: the student's, its forward again where layers are run again, and the teacher's forward."""
    student = mean_flops(shape, step.length, TrainConfig().full_probability)
    again = student / 3 if step.checkpoint_activations else 0
    teacher = shape.flops(shape.full(), step.length) / 3 if step.teacher in ("whole", "sharded") else 0
    return student + again + teacher


def _traffic(shape: ElasticConfig, step: StepConfig, ranks: int, parameters: int) -> tuple[float, float]:
    """Bytes that a rank sends in a step to GPUs of its node, and through its adapter to other nodes."""
    shards, nodes = step.shards(ranks), -(-ranks // step.node)
    if shards == 1:
        reduced = 2 * FLOAT * parameters
        return _part(ranks) * reduced, _part(nodes) * reduced / min(step.node, ranks)
    sharded = step.accumulation * _gathered_and_reduced(shape, step, parameters)
    if shards > step.node:
        return _part(shards) * sharded, _part(nodes) * sharded / step.node
    return _part(shards) * sharded, _part(ranks // shards) * 2 * FLOAT * parameters / shards


def _gathered_and_reduced(shape: ElasticConfig, step: StepConfig, parameters: int) -> int:
    """Bytes of a micro-batch's all-gathers and reduce-scatters, were all of them sent."""
    layers, root = shape.num_layers * count(of_layer(shape)), count(of_root(shape))
    gathered = 2 * layers + root  # the root stays whole until the backward
    if step.teacher == "sharded":
        gathered += parameters
    return (HALF if step.bf16 else FLOAT) * gathered + FLOAT * parameters


def _part(ranks: int) -> float:
    return (ranks - 1) / ranks
