"""packed_linear: elastic_linear on a weight in panels, for inference on a CPU; csrc/ops/packed_linear.cpp."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..panels import PanelFormat, check_format
from ..rounding import rounded
from . import _common as common

OP = "packed_linear"
PANEL = 16  # features of a panel: kPanel of csrc/kernels/elastic_gemm.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedWeight(NamedTuple):
    """A linear layer's weight in panels, in the order that `packed_linear` takes them."""

    # [out_blocks, ceil(nw / 16), in_blocks * words(kw), 16, elements], of the format: `together` inputs of a feature
    # lie side by side in a word; what fills up the last words, and the last panel, is 0
    panels: Tensor
    # where the format has scales [out_blocks, ceil(nw / 16), 16] float32; of int4 scales and least values,
    # [out_blocks, ceil(nw / 16), in_blocks * ceil(kw / 32), 2, 16] float16
    scales: Tensor | None
    format: PanelFormat


def pack_linear(
    weight: Tensor,
    out_blocks: int = 1,
    format: PanelFormat | str | None = None,
    in_blocks: int = 1,
    products: Tensor | None = None,
) -> PackedWeight:
    """Copy a linear layer's weight into panels, in which a prefix of its features and of its inputs is contiguous.

    Args:
        weight: [out_blocks * nw, in_blocks * kw], float32, bfloat16 or float16, on the CPU.
        out_blocks: blocks the outputs are cut into; each has panels of its own.
        format: how the panels store the weight; None stores it in its own dtype.
        in_blocks: blocks the inputs are cut into.
        products: int4 alone: [in_blocks * kw, in_blocks * kw], sums of x^T x over inputs x of the layer. What rounding
            misses at an input is then made up for by the inputs behind it, so a prefix has the whole of what its own
            inputs give (GPTQ, Frantar et al., arXiv 2210.17323, in order of the inputs).
    """
    common.check_tensor("pack_linear", "weight", weight, DTYPES)
    if weight.dim() != 2 or weight.device.type != "cpu":
        shape = f"{weight.dim()} on {weight.device}"
        raise ValueError(f"pack_linear: weight must have 2 dimensions and be on cpu, got {shape}")
    for axis, (name, count) in enumerate((("out_blocks", out_blocks), ("in_blocks", in_blocks))):
        size = weight.shape[axis]
        common.check_range("pack_linear", name, count, 1, max(1, size))
        if size % count:
            raise ValueError(
                f"pack_linear: weight.shape[{axis}] must be divisible by {name} ({count}), got {size}"
            )
    plain = PanelFormat.plain(weight.dtype)
    stored = plain if format is None else check_format("pack_linear", format)
    if not stored.scaled and stored is not plain:
        raise ValueError(
            f"pack_linear: format must be {plain}, the weight's dtype, or have scales, got {stored}"
        )
    if products is not None:
        if stored is not PanelFormat.INT4:
            raise ValueError(
                f"pack_linear: products must be None unless format is int4, got a tensor for {stored}"
            )
        common.check_shape("pack_linear", "products", products, 2 * weight.shape[1:])
    weight = weight.detach()
    blocks = out_blocks, in_blocks
    if not stored.scaled:
        return PackedWeight(panels_of(weight, *blocks, stored), None, stored)
    if stored is PanelFormat.INT4:
        return PackedWeight(*_in_groups(weight, *blocks, products), stored)
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    rows = (weight.float() / scales.where(scales > 0, 1)).round().to(stored.storage)
    panels = stored.in_slices(panels_of(rows, *blocks, stored))
    return PackedWeight(panels, panels_of(scales, out_blocks, 1, PanelFormat.FLOAT32).flatten(2), stored)


def _in_groups(
    weight: Tensor, out_blocks: int, in_blocks: int, products: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Panels and scales of int4."""
    N, stored = len(weight), PanelFormat.INT4
    most = weight.abs().max().item() if weight.numel() else 0.0
    if not most <= torch.finfo(torch.float16).max:
        raise ValueError(f"pack_linear: weight must be of a size up to 65504 in int4, got {most}")
    codes, scales = rounded(weight, in_blocks, products)
    count = scales.shape[1] // in_blocks
    low, high = panels_of(codes, out_blocks, in_blocks, stored).split(4, -1)
    of_rows = scales.view(N, 2 * in_blocks * count)
    pairs = panels_of(of_rows, out_blocks, 1, PanelFormat.FLOAT32)  # [blocks, P, 2 * groups, 16, 1]
    return stored.in_slices(low | high << 4), stored.in_slices(pairs.flatten(3).unflatten(2, (-1, 2)))


def panels_of(weight: Tensor, out_blocks: int, in_blocks: int, format: PanelFormat) -> Tensor:
    """The panels of a weight [out_blocks * nw, in_blocks * kw], one element of the storage for each input."""
    rows, inputs = weight.shape[0] // out_blocks, weight.shape[1] // in_blocks
    count, words = -(-rows // PANEL), format.words(inputs)
    whole = weight.new_zeros(out_blocks, count * PANEL, in_blocks, words * format.together)
    whole[:, :rows, :, :inputs] = weight.view(out_blocks, rows, in_blocks, inputs)
    split = whole.view(out_blocks, count, PANEL, in_blocks * words, format.together)
    return split.transpose(2, 3).contiguous()


def relaid(panels: Tensor, in_blocks: int, in_features: int, format: PanelFormat) -> Tensor:
    """Panels of the same values in the layout of a format: of in_blocks blocks with in_features inputs together."""
    if panels.shape[4] == format.elements:
        return panels
    weight = panels.transpose(2, 3).flatten(3).flatten(0, 2)
    used = weight.unflatten(1, (in_blocks, -1))[..., : in_features // in_blocks]
    return panels_of(used.flatten(1), panels.shape[0], in_blocks, format)


def packed_linear(
    x: Tensor,
    panels: Tensor,
    scales: Tensor | None,
    format: PanelFormat | str,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    in_extent: Tensor | None = None,
    out_extent: Tensor | None = None,
    in_blocks: int = 1,
) -> Tensor:
    """Apply the first features of a packed linear layer, inside each block of inputs and outputs; no gradient.

    ``y[t, ob, n] = bias[ob, n] + sum_{ib, i < in_t} x[t, ib, i] * weight[ob, n, ib, i]`` where ``n < out_t``,
    0 elsewhere. A row's result is the same, bit for bit, whatever other rows there are and wherever a prefix ends.

    Args:
        x: [..., in_blocks * kx], float32, bfloat16 or float16, on the CPU; kx >= in_features.
        panels: [out_blocks, P, in_blocks * words(kw), 16, elements], from `pack_linear` with these in_blocks.
        scales: where the format has scales, from `pack_linear`; None otherwise.
        format: how the panels store the weight: in the dtype of x, or in any format that has scales.
        bias: [out_blocks * nw] or None.
        in_features: inputs used per block; ``in_t`` where in_extent is None.
        out_features: outputs made per block; ``out_t`` where out_extent is None.
        in_extent: int32 or int64, [1] or one per token, each in [0, in_features]: ``in_t``.
        out_extent: int32 or int64, [1] or one per token, each in [0, out_features]: ``out_t``. Not with in_extent.
        in_blocks: blocks the inputs are cut into.

    Returns:
        y: [..., out_blocks * out_features], the dtype of x.
    """
    common.check_tensor(OP, "x", x, DTYPES)
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must have at least 1 dimension, got 0")
    stored = check_format(OP, format)
    check_panels(OP, stored, "panels", panels, "scales", scales, x)
    common.check_range(OP, "in_blocks", in_blocks, 1, max(1, x.shape[-1]))
    each = stored.words(1)  # words that a block's are a multiple of
    for name, size, unit in (("x.shape[-1]", x.shape[-1], 1), ("panels.shape[2]", panels.shape[2], each)):
        if size % (in_blocks * unit):
            times = f" times {unit}" if unit > 1 else ""
            raise ValueError(f"{OP}: {name} must be divisible by in_blocks ({in_blocks}){times}, got {size}")
    inputs = min(x.shape[-1], panels.shape[2] * stored.together) // in_blocks
    common.check_range(OP, "in_features", in_features, 0, inputs)
    common.check_range(OP, "out_features", out_features, 0, panels.shape[1] * PANEL)
    if in_extent is not None and out_extent is not None:
        raise ValueError(f"{OP}: in_extent must be None when out_extent is given, got both")
    rows = math.prod(x.shape[:-1])  # not numel(): it would fix a symbolic size
    y = common.call(
        torch.ops.flextron.packed_linear.default,
        common.as_rows(x, rows),
        panels,
        scales,
        stored.value,
        bias,
        in_features,
        out_features,
        common.check_extent(OP, "in_extent", in_extent, rows),
        common.check_extent(OP, "out_extent", out_extent, rows),
        in_blocks,
    )
    return common.shaped_as(x, y)


def check_panels(
    op: str,
    format: PanelFormat,
    name: str,
    panels: Tensor,
    scales_name: str,
    scales: Tensor | None,
    x: Tensor,
) -> None:
    """Whether the tensors are what the format says, for inputs x."""
    common.check_tensor(op, name, panels, tuple(each.storage for each in PanelFormat))
    if not format.scaled and panels.dtype != x.dtype:
        raise TypeError(
            f"{op}: {name} must have the dtype of x, {x.dtype}, in format {format}, got {panels.dtype}"
        )
    if panels.dtype != format.storage:
        raise TypeError(f"{op}: {name} must be {format.storage} in format {format}, got {panels.dtype}")
    if panels.dim() != 5 or panels.shape[3:] != (PANEL, format.elements) or panels.shape[2] % format.words(1):
        words = "words" if format.words(1) == 1 else f"{format.words(1)} * groups"
        shape = f"[blocks, P, {words}, {PANEL}, {format.elements}]"
        raise ValueError(f"{op}: {name} must have shape {shape} in format {format}, got {list(panels.shape)}")
    if format.scaled:
        scales = common.check_tensor(op, scales_name, scales, (format.scales_dtype,))
        common.check_shape(op, scales_name, scales, format.scales_shape(panels))
    elif scales is not None:
        scaled = " or ".join(each for each in PanelFormat if each.scaled)
        raise ValueError(f"{op}: {scales_name} must be None unless {name} are {scaled}, got a tensor")


@common.register_fake("packed_linear")
def _shape(
    x, panels, scales, format, bias, in_features, out_features, in_extent=None, out_extent=None, in_blocks=1
):
    return x.new_empty(x.shape[0], panels.shape[0] * out_features)


common.refuse_gradient(OP)
