"""The loss of a model at given sub-networks, in nats per token, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flextron.config import Widths
from flextron.judge.objectives import cross_entropy
from flextron.nn import Dial


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a loss in nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < 709 else math.inf


@contextmanager
def restored(model: Any) -> Iterator[None]:
    """Give an elastic model its dial and its training mode back at the end of a ``with`` block."""
    before, training = model.dial, model.training
    try:
        yield
    finally:
        model.turn(before)
        model.train(training)


@torch.no_grad()
def evaluate(model: Any, tokens: Tensor, widths: Sequence[Widths | Dial], batch_size: int = 8) -> list[float]:
    """Mean loss of the next token at each sub-network, in nats, without noise.

    Args:
        model: an elastic model. Its dial and mode are restored, whatever happens.
        tokens: [n, length] int64, every window a sequence of its own.
        widths: the sub-networks; or dials, such as one whose router chooses for every token.
        batch_size: windows in a forward pass; it does not change the result beyond rounding.

    Returns:
        One loss for each of ``widths``.
    """
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"evaluate: tokens must have shape [n >= 1, length >= 2], got {list(tokens.shape)}")
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    with restored(model):
        model.eval()
        return [_loss_at(model, tokens, choice, batch_size) for choice in widths]


def _loss_at(model: Any, tokens: Tensor, widths: Widths | Dial, batch_size: int) -> float:
    model.turn(Dial.of(widths))
    device = next(model.parameters()).device
    total = 0.0
    for batch in tokens.split(batch_size):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits
        total += float(cross_entropy(logits, batch)) * len(batch)
    return total / len(tokens)
