"""elastic_linear: a linear layer on a prefix of its features. Formula: csrc/kernels/elastic_linear.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _common as common

OP = "elastic_linear"


def elastic_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    in_extent: Tensor | None = None,
    out_extent: Tensor | None = None,
    in_blocks: int = 1,
    out_blocks: int = 1,
) -> Tensor:
    """Apply the first features of a linear layer, inside each block of inputs and outputs.

    ``y[t, ob, n] = bias[ob, n] + sum_{ib, i < in_t} x[t, ib, i] * weight[ob, n, ib, i]`` where ``n < out_t``,
    0 elsewhere.

    Args:
        x: [..., in_blocks * kx], float32, float64, bfloat16 or float16; kx >= in_features.
        weight: [out_blocks * nw, in_blocks * kw], kw >= in_features, nw >= out_features. Never copied.
        bias: [out_blocks * nw] or None.
        in_features: how many inputs of each block are used; ``in_t`` if in_extent is None.
        out_features: how many outputs of each block are made; ``out_t`` if out_extent is None.
        in_extent: int32 or int64, [1] or one per token, each in [0, in_features]: ``in_t``.
        out_extent: int32 or int64, [1] or one per token, each in [0, out_features]: ``out_t``. Not with in_extent.
        in_blocks: how many blocks the inputs are cut into.
        out_blocks: how many blocks the outputs are cut into.

    Returns:
        y: [..., out_blocks * out_features], the dtype of x.
    """
    rows = _check(x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks, out_blocks)
    in_extent = common.check_extent(OP, "in_extent", in_extent, rows)
    out_extent = common.check_extent(OP, "out_extent", out_extent, rows)
    y = common.call(
        torch.ops.flextron.elastic_linear.default,
        common.as_rows(x, rows),
        weight,
        bias,
        in_features,
        out_features,
        in_extent,
        out_extent,
        in_blocks,
        out_blocks,
    )
    return common.shaped_as(x, y)


def _check(x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks, out_blocks) -> int:
    """Raise on what can be checked before the call; return the number of rows."""
    common.check_tensor(OP, "x", x, common.FLOATING)
    common.check_tensor(OP, "weight", weight, common.FLOATING)
    common.check_same(OP, x, weight=weight, bias=bias)
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must have at least 1 dimension, got 0")
    if weight.dim() != 2:
        raise ValueError(f"{OP}: weight must have 2 dimensions, got {weight.dim()}")
    shape, (outputs, weight_inputs) = x.shape, weight.shape
    if bias is not None:
        common.check_shape(OP, "bias", bias, (outputs,))
    for name, size, blocks_name, blocks in (
        ("x.shape[-1]", shape[-1], "in_blocks", in_blocks),
        ("weight.shape[1]", weight_inputs, "in_blocks", in_blocks),
        ("weight.shape[0]", outputs, "out_blocks", out_blocks),
    ):
        common.check_range(OP, blocks_name, blocks, 1, max(1, size))
        if size % blocks:
            raise ValueError(f"{OP}: {name} must be divisible by {blocks_name} ({blocks}), got {size}")
    inputs = min(shape[-1], weight_inputs) // in_blocks
    common.check_range(OP, "in_features", in_features, 0, inputs)
    common.check_range(OP, "out_features", out_features, 0, outputs // out_blocks)
    if in_extent is not None and out_extent is not None:
        raise ValueError(f"{OP}: in_extent must be None when out_extent is given, got both")
    return math.prod(shape[:-1])  # not numel(): it would fix a symbolic size


@common.register_fake("elastic_linear")
def _shape(
    x, weight, bias, in_features, out_features, in_extent=None, out_extent=None, in_blocks=1, out_blocks=1
):
    return x.new_empty(x.shape[0], out_blocks * out_features)


@common.register_fake("elastic_linear_backward")
def _backward_shape(
    dy, x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks, out_blocks, output_mask
):
    return (
        x.new_empty(x.shape if output_mask & 1 else (0,)),
        x.new_empty(weight.shape if output_mask & 2 else (0,)),
        x.new_empty(weight.shape[:1] if output_mask & 4 and bias is not None else (0,)),
    )


def _save(ctx, inputs, output):
    x, weight, bias, in_features, out_features, in_extent, out_extent, in_blocks, out_blocks = inputs
    ctx.save_for_backward(x, weight, bias, in_extent, out_extent)
    ctx.sizes = in_features, out_features, in_blocks, out_blocks


def _grad(ctx, dy):
    x, weight, bias, in_extent, out_extent = ctx.saved_tensors
    in_features, out_features, in_blocks, out_blocks = ctx.sizes
    mask = common.wanted(ctx, 0, 1, 2)
    sizes = in_features, out_features, in_extent, out_extent, in_blocks, out_blocks
    backward = torch.ops.flextron.elastic_linear_backward.default
    gradients = common.call(backward, dy, x, weight, bias, *sizes, mask)
    return *common.per_input(mask, gradients), None, None, None, None, None, None


common.register_gradient(OP, _save, _grad)
common.register_autocast(OP, 0, 1, 2)
common.refuse_gradient("elastic_linear_backward")
