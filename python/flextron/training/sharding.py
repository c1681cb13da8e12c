"""A run on several processes: who has which rows of a batch, how gradients meet, and where weights lie.

Each process takes its part of every micro-batch. Losses are means over rows, so a process weighs its own by the share
of rows that it has; gradients are then the whole batch's, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flextron import ranks
from flextron.nn.protocol import Elastic


class Spread:
    """A model on the processes of a run.

    Attributes:
        forward: runs the model, and makes its gradients meet in the backward pass.
    """

    def __init__(self, model: Elastic, rows: range, batch_size: int) -> None:
        """``rows`` of the ``batch_size`` in a micro-batch are this process's."""
        self.ranks, self.batch_size = ranks.now(), batch_size
        self.part, self.rows = slice(rows.start, rows.stop), len(rows)
        # what a loss here counts in a mean over processes, so that it is the mean over rows: 1 if all have as many
        self.weight = self.ranks.size * len(rows) / batch_size
        self.forward: Any = model
        if self.ranks.size > 1:
            on = [model.device] if model.device.type == "cuda" else None
            self.forward = DistributedDataParallel(
                model, device_ids=on, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; gradients meet in the last one of a step."""
        with nullcontext() if last or self.ranks.size == 1 else self.forward.no_sync():
            yield

    def mean(self, values: Tensor) -> Tensor:
        """Means over the rows here -> over the rows of all processes. On the host it waits for no device."""
        if self.ranks.size == 1:
            return values
        found = values.double() * self.rows
        dist.all_reduce(found)
        return found / self.batch_size

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
