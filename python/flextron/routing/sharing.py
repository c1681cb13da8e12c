"""A batch of sequences shared between processes: its noise, and what is a sum or a mean over all of its rows.

A number that `whole` or `mean_of_all` returns is the same everywhere, and its gradient is that of the rows here: the
gradients of all processes add up to the batch's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flextron import ranks
from flextron.nn.router import GumbelSampler


class SharedNoise(GumbelSampler):
    """The noise of the rows here. Every process draws that of the whole batch, so that the parts are one process's."""

    def __init__(self, seed: int, batch: int) -> None:
        super().__init__(seed)
        self.batch = batch

    def _exponential(self, shape: torch.Size) -> Tensor:
        mine = ranks.part(self.batch)
        tokens = shape[0] // (mine.stop - mine.start)  # rows of a sequence
        noise = super()._exponential(torch.Size((self.batch * tokens, *shape[1:])))
        return noise[mine.start * tokens : mine.stop * tokens]


def whole(values: Tensor, batch: int) -> Tensor:
    """[b, ...] of the sequences here -> [batch, ...] of all of them."""
    if ranks.now().size == 1:
        return values
    found = values.new_zeros(batch, *values.shape[1:])
    found[ranks.part(batch)] = values
    return _everywhere(found)


def mean_of_all(values: Tensor, batch: int) -> Tensor:
    """A mean over the sequences here -> over all of them."""
    if ranks.now().size == 1:
        return values
    mine = ranks.part(batch)
    return _everywhere(values * ((mine.stop - mine.start) / batch))


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sums over the processes."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = ranks.total(parameter.grad)


def _everywhere(values: Tensor) -> Tensor:
    return ranks.total(values.detach()) + (values - values.detach())
