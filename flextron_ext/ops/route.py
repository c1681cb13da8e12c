"""route: router logits to choices and buckets of tokens. Formula and noise are in csrc/kernels/route.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _common as common

OP = "route"


class Routing(NamedTuple):
    choice: Tensor
    order: Tensor
    offsets: Tensor


def route(logits: Tensor, seed: int | None = None) -> Routing:
    """Choose for each token, and sort the tokens into buckets of one choice, the largest first.

    ``choice[t] = argmax_c logits[t, c] + noise(seed, t, c)``; the first of equals wins and NaN counts as -inf.

    Args:
        logits: [T, C], float32, float64, bfloat16 or float16.
        seed: seeds standard Gumbel noise from a counter-based generator, which gives the same bits on every device.
            None means no noise.

    Returns:
        choice: [T], int64. Not differentiable, like the rest.
        order: [T], int64: the tokens by descending choice, in their own order where choices are equal.
        offsets: [C + 1], int64: ``order[offsets[i]:offsets[i + 1]]`` are the tokens of choice C - 1 - i.
    """
    common.check_tensor(OP, "logits", logits, common.FLOATING)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"{OP}: logits must have shape [T, C] with C >= 1, got {list(logits.shape)}")
    if seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        raise ValueError(f"{OP}: seed must be a 64-bit integer or None, got {seed}")
    return Routing(*torch.ops.flextron.route(logits.detach(), seed))


@common.register_fake("route")
def _shape(logits, seed=None):
    def integers(count):
        return logits.new_empty(count, dtype=torch.int64)

    return integers(logits.shape[0]), integers(logits.shape[0]), integers(logits.shape[1] + 1)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


common.register_gradient(OP, _save, lambda ctx, *gradients: (None, None), is_constant=True)
