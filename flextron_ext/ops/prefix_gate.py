"""prefix_gate, the worked example of docs/add-an-op.md. Its formula and loops are in csrc/kernels/prefix_gate.h."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _common as common

OP = "prefix_gate"


def prefix_gate(x: Tensor, gate: Tensor, width: Tensor) -> Tensor:
    """Scale each token by its gate, and zero the features beyond its width.

    ``y[t, n] = gate[t] * x[t, n]`` where ``n < width[t]``, 0 elsewhere.

    Args:
        x: [T, N], float32, float64, bfloat16 or float16.
        gate: [T], float32; scales the token.
        width: [T], int64, each in [0, N]; counts the features that the token keeps.

    Returns:
        y: [T, N], the dtype of x.
    """
    common.check_tensor(OP, "x", x, common.FLOATING)
    common.check_tensor(OP, "gate", gate, (torch.float32,))
    common.check_tensor(OP, "width", width, (torch.int64,))
    if x.dim() != 2:
        raise ValueError(f"{OP}: x must have 2 dimensions, got {x.dim()}")
    common.check_shape(OP, "gate", gate, x.shape[:1])
    common.check_shape(OP, "width", width, x.shape[:1])
    return common.call(torch.ops.flextron.prefix_gate.default, x, gate, width)


@common.register_fake("prefix_gate")
def _shape(x, gate, width):
    return x.new_empty(x.shape)  # not empty_like: y is contiguous even where x is a transpose


@common.register_fake("prefix_gate_backward")
def _backward_shape(dy, x, gate, width, output_mask):
    return (
        x.new_empty(x.shape if output_mask & 1 else (0,)),
        gate.new_empty(gate.shape if output_mask & 2 else (0,)),
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grad(ctx, dy):
    mask = common.wanted(ctx, 0, 1)
    backward = torch.ops.flextron.prefix_gate_backward.default
    gradients = common.call(backward, dy, *ctx.saved_tensors, mask)
    return *common.per_input(mask, gradients), None


common.register_gradient(OP, _save, _grad)
common.register_autocast(OP, 0)
common.refuse_gradient("prefix_gate_backward")
