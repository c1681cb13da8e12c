"""A run on several processes: who has which rows of a batch, how gradients meet, and where weights lie.

Each process takes its part of every micro-batch. Losses are means over rows, so a process weighs its own by the share
of rows that it has; gradients are then the whole batch's, whatever the number of processes. Weights, gradients and the
optimiser's states are on every process (DDP), or each process has its part of every layer (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flextron import ranks
from flextron.artefacts.elastic_model import Cut
from flextron.checkpoint.io import Pending
from flextron.config import ElasticConfig, Widths
from flextron.judge.loss import evaluate
from flextron.nn.protocol import Elastic
from flextron.nn.storage import storage
from flextron.nn.widened import is_narrow
from flextron.recipes import StepConfig, TrainConfig
from flextron.scale.memory import FLOAT, USABLE, estimate

T = TypeVar("T")
_SHARDS = "shards"  # the dimension of a mesh along which weights are sharded
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Spread:
    """A model on the processes of a run. Its parameters may be other objects afterwards.

    Attributes:
        forward: runs the model, and makes its gradients meet in the backward pass.
        weight: what a loss of this process counts in a mean over processes, so that it is the mean over rows.
    """

    def __init__(
        self, model: Elastic, teacher: nn.Module | None, config: TrainConfig, bf16: bool, rows: range
    ) -> None:
        """``rows`` of a micro-batch are this process's."""
        self.ranks, self.batch_size = ranks.now(), config.batch_size
        self.part, self.rows = slice(rows.start, rows.stop), len(rows)
        self.weight = self.ranks.size * len(rows) / config.batch_size
        self.model = model
        self.forward: Any = model
        value = (
            max((p.itemsize for p in teacher.parameters()), default=FLOAT) if teacher is not None else FLOAT
        )
        self.shard = chosen(model.elastic, config, bf16, model.device, value)
        if self.shard != "none":
            if whole := [m for m in (model, teacher) if m is not None and not is_sharded(m)]:
                mesh = mesh_of(self.ranks, self.shard)
                for module in whole:
                    cut(module, mesh, bf16)
            step = step_of(config, bf16, self.shard, value, model.device)
            whole_gradient = 4 * sum(p.numel() for p in model.parameters())
            taken = estimate(model.elastic, step, self.ranks.size).total + whole_gradient
            self.once = taken <= USABLE * memory_of(model.device)
        elif self.ranks.size > 1:
            on = [model.device] if model.device.type == "cuda" else None
            self.forward = DistributedDataParallel(
                model, device_ids=on, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; gradients meet in the last one of a step.

        Gradients that wait for it are as large as the whole model. Where shards leave no room for that, they meet in
        every micro-batch, and between nodes in the last one.
        """
        if self.shard == "none":
            return nullcontext() if last or self.ranks.size == 1 else self.forward.no_sync()
        if self.once:
            self.forward.set_requires_gradient_sync(last)
        else:
            self.forward.set_requires_all_reduce(last)
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Means over the rows here -> over the rows of all processes. On the host it waits for no device."""
        if self.ranks.size == 1:
            return values
        found = values.double() * self.rows
        dist.all_reduce(found)
        return found / self.batch_size

    def evaluated(self, tokens: Tensor, widths: Sequence[Widths]) -> list[float]:
        """`evaluate`, by all processes together: each has its part of every batch, and runs as many forwards."""
        if self.ranks.size == 1:
            return evaluate(self.model, tokens, widths, self.batch_size)
        total = torch.zeros(len(widths), dtype=torch.float64)
        for rows in tokens.split(self.batch_size):
            own = rows[ranks.part(len(rows))]
            mine, weight = (
                (own, len(own)) if len(rows) >= self.ranks.size else (rows, len(rows) / self.ranks.size)
            )
            total += torch.tensor(evaluate(self.model, mine, widths, len(mine)), dtype=torch.float64) * weight
        dist.all_reduce(total)
        return (total / len(tokens)).tolist()

    def whole(self, values: Tensor) -> Tensor:
        """A number of each row here -> of each row of the batch.

        Its gradient is that of a loss which is the same on all processes, as `weight` weighs it.
        """
        if self.ranks.size == 1:
            return values
        found = values.new_zeros(self.batch_size)
        found[self.part] = values.detach()
        dist.all_reduce(found)
        own = nn.functional.pad(values, (self.part.start, self.batch_size - self.part.stop))
        return found + (own - own.detach()) * (self.batch_size / self.rows)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients of parameters that `forward` does not know of those of the whole batch."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.ranks.size == 1 or not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.ranks.size
        for gradient, found in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(found.view_as(gradient))


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def computes_in_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run autocasts to bfloat16."""
    return bf16_is_fast(device) if config.bf16 is None else config.bf16


def cut_of(
    shape: ElasticConfig, config: TrainConfig, device: torch.device, teacher: int = FLOAT
) -> Cut | None:
    """What shards the models of a run while they are read; None: each process has them whole. All ranks call this."""
    bf16 = computes_in_bf16(config, device)
    shard = chosen(shape, config, bf16, device, teacher)
    return None if shard == "none" else partial(cut, mesh=mesh_of(ranks.now(), shard), bf16=bf16)


def is_sharded(model: nn.Module | Elastic) -> bool:
    """Whether each process has a part of a model's parameters."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def sampled(tensor: Tensor, step: int) -> Tensor:
    """Every ``step``-th value of a tensor, flat, in the host's memory.

    Where it is sharded by rows, all processes call this, and only these values are exchanged.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.flatten()[::step].cpu()
    own, (chunk,) = tensor.to_local(), tensor.__create_chunk_list__()
    first = chunk.offsets[0] * (tensor.numel() // tensor.shape[0])  # of the values here, among all of them
    own = own.flatten()[-first % step :: step]
    # as integers, whose sum has the bits of the one that is not zero
    bits = own.view(_BITS[tensor.itemsize]).long()
    found = bits.new_zeros(-(-tensor.numel() // step))
    place = -(-first // step)
    found[place : place + len(bits)] = bits
    dist.all_reduce(found, group=tensor.device_mesh.get_group(_SHARDS))
    return found.to(_BITS[tensor.itemsize]).view(tensor.dtype).cpu()


def full(tensor: Tensor) -> Tensor:
    """A tensor whole, where this process has a part of it; all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_with_weights(model: Elastic, work: Callable[[Mapping[str, Pending] | None], T]) -> T:
    """`ranks.first` for work that stores a model's parameters.

    ``work`` is given them by name, where the model is sharded: each is gathered when it is made, in the dtype that it
    is stored in, so that one at a time is whole. A model that is whole gives None.
    """
    if not is_sharded(model):
        return ranks.first(lambda: work(None))
    dtypes, parameters = storage("save", model), dict(model.named_parameters())

    def whole(name: str) -> Tensor:
        return full(parameters[name].detach().to(dtypes[name]))

    def make(name: str) -> Tensor:
        ranks.ask(name)
        return whole(name).cpu()

    pending = {n: Pending(tuple(p.shape), dtypes[n], partial(make, n)) for n, p in parameters.items()}
    return ranks.first(lambda: work(pending), whole)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a process can have: the GPU's, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 40
    return machine // _on_this_node()


def _on_this_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.now().size))


def step_of(config: TrainConfig, bf16: bool, shard: str, teacher: int, device: torch.device) -> StepConfig:
    """What a step of a run is, on these processes; ``teacher``: bytes of one of its teacher's weights."""
    facts: dict[str, Any] = {"bf16": bf16, "shard": shard, "node": _on_this_node(), "teacher_value": teacher}
    facts["cpu"] = device.type == "cpu"
    if config.distillation and not config.teacher_logits and shard != "none":
        facts["teacher"] = "sharded"
    return StepConfig.of(config, ranks.now().size, **facts)


def chosen(
    shape: ElasticConfig, config: TrainConfig, bf16: bool, device: torch.device, teacher: int = FLOAT
) -> str:
    """Who holds the weights: ``none``, ``full`` or ``hybrid``; the same on all ranks."""
    size, node = ranks.now().size, _on_this_node()
    if size == 1:
        return "none"  # its part is all, so that a run of several processes can be resumed by one
    if config.shard == "hybrid" and size % node:
        raise ValueError(
            "train: shard must be full or none where nodes have unequal numbers of processes, got hybrid with "
            f"{size} in all and {node} on this one"
        )
    if config.shard != "auto":
        return config.shard
    taken = estimate(shape, step_of(config, bf16, "none", teacher, device), size).total
    fits = ranks.mean(torch.tensor(float(taken <= USABLE * memory_of(device))))
    return "none" if float(fits) == 1 else "full"


def mesh_of(me: ranks.Ranks, shard: str) -> DeviceMesh:
    """One dimension, along which weights are sharded; with ``hybrid`` nodes come first, which all have all weights."""
    if shard == "full":
        return init_device_mesh(me.device.type, (me.size,), mesh_dim_names=(_SHARDS,))
    node = _on_this_node()
    return init_device_mesh(me.device.type, (me.size // node, node), mesh_dim_names=("nodes", _SHARDS))


def cut(model: Any, mesh: DeviceMesh, bf16: bool) -> None:
    """Shard a causal LM in place, a layer at a time: float32 masters, and in bfloat16 what is computed and gathered.

    What is held in less than float32, a teacher, is widened to it where nothing is computed in bfloat16.
    """
    policy = MixedPrecisionPolicy()
    if bf16 or is_narrow(model):
        policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else torch.float32, torch.float32)
    for layer in model.decoder_layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
