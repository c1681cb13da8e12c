"""packed_mlp: elastic_mlp on weights in panels, for inference on a CPU. Loops: csrc/kernels/elastic_gemm_block.h."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..panels import PanelFormat, check_format
from . import _common as common
from .elastic_mlp import ACTIVATIONS
from .packed_linear import DTYPES, PANEL, check_panels, pack_linear

OP = "packed_mlp"


class PackedMlp(NamedTuple):
    """An MLP's weights in panels, in the order that `packed_mlp` takes them."""

    # [1, 2 * ceil(F / 16), words(K), 16, elements], the gate's and the up projection's in turn; half as many if plain
    up_panels: Tensor
    down_panels: Tensor  # [1, ceil(N / 16), words(F), 16, elements]
    up_scales: Tensor | None  # where the format has scales, as `pack_linear`'s
    down_scales: Tensor | None
    format: PanelFormat


def pack_mlp(
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    format: PanelFormat | str | None = None,
    up_products: Tensor | None = None,
    down_products: Tensor | None = None,
) -> PackedMlp:
    """Copy an MLP's weights into panels, the gate's and the up projection's in turn.

    Args:
        w_gate: [F, K], or None for a plain MLP.
        w_up: [F, K], float32, bfloat16 or float16, on the CPU.
        w_down: [N, F].
        format: how the panels store the weights, as in `pack_linear`.
        up_products: as there, of the inputs of the gate and the up projection.
        down_products: as there, of the hidden neurons.
    """
    up, up_scales, stored = pack_linear(w_up, format=format, products=up_products)
    down, down_scales, _ = pack_linear(w_down, format=format, products=down_products)
    if w_gate is not None:
        gate, gate_scales, _ = pack_linear(w_gate, format=format, products=up_products)
        up = torch.stack((gate, up), 2).flatten(1, 2)
        if up_scales is not None and gate_scales is not None:
            up_scales = torch.stack((gate_scales, up_scales), 2).flatten(1, 2)
    return PackedMlp(up, down, up_scales, down_scales, stored)


def packed_mlp(
    x: Tensor,
    up_panels: Tensor,
    down_panels: Tensor,
    up_scales: Tensor | None,
    down_scales: Tensor | None,
    format: PanelFormat | str,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    width: int,
    out_features: int,
    gated: bool = True,
    activation: str = "silu",
    extent: Tensor | None = None,
) -> Tensor:
    """Run a packed MLP on its first neurons: one width, or one per token; no gradient.

    ``h = act(x w_gate[:d]^T + b_gate) * (x w_up[:d]^T + b_up)``, or ``act(x w_up[:d]^T + b_up)`` unless gated;
    ``y = h w_down[:, :d]^T + b_down``. h stays float32. A row's result is the same, bit for bit, whatever other rows
    there are and wherever the width ends.

    Args:
        x: [..., K], float32, bfloat16 or float16, on the CPU.
        up_panels: [1, P, words(K), 16, elements], P panels of the gate and the up projection in turn, from `pack_mlp`.
        down_panels: [1, ceil(N / 16), words(F), 16, elements].
        up_scales: where the format has scales, from `pack_mlp`; None otherwise.
        down_scales: likewise.
        format: how the panels store the weights: in the dtype of x, or in any format that has scales.
        b_gate: [F] or None.
        b_up: [F] or None.
        b_down: [N] or None.
        width: neurons used: ``d`` where extent is None.
        out_features: N.
        gated: whether there is a gate among up_panels.
        activation: one of "relu", "relu2", "gelu", "gelu_tanh", "silu".
        extent: int32 or int64, [1] or one per token, each in [0, width]: ``d`` per token.

    Returns:
        y: [..., N], the dtype of x.
    """
    common.check_tensor(OP, "x", x, DTYPES)
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must have at least 1 dimension, got 0")
    stored = check_format(OP, format)
    check_panels(OP, stored, "up_panels", up_panels, "up_scales", up_scales, x)
    check_panels(OP, stored, "down_panels", down_panels, "down_scales", down_scales, x)
    halves = 2 if gated else 1
    F = min(down_panels.shape[2] * stored.together, up_panels.shape[1] // halves * PANEL)
    of_input = PANEL, stored.elements
    up_shape = (1, -(-F // PANEL) * halves, stored.words(x.shape[-1]), *of_input)
    common.check_shape(OP, "up_panels", up_panels, up_shape)
    common.check_shape(OP, "down_panels", down_panels, (1, down_panels.shape[1], stored.words(F), *of_input))
    common.check_range(OP, "width", width, 0, F)
    common.check_range(OP, "out_features", out_features, 0, down_panels.shape[1] * PANEL)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    rows = math.prod(x.shape[:-1])  # not numel(): it would fix a symbolic size
    y = common.call(
        torch.ops.flextron.packed_mlp.default,
        common.as_rows(x, rows),
        up_panels,
        down_panels,
        up_scales,
        down_scales,
        stored.value,
        b_gate,
        b_up,
        b_down,
        width,
        out_features,
        gated,
        activation,
        common.check_extent(OP, "extent", extent, rows),
    )
    return common.shaped_as(x, y)


@common.register_fake("packed_mlp")
def _shape(
    x,
    up_panels,
    down_panels,
    up_scales,
    down_scales,
    format,
    b_gate,
    b_up,
    b_down,
    width,
    out_features,
    gated=True,
    activation="silu",
    extent=None,
):
    return x.new_empty(x.shape[0], out_features)


common.refuse_gradient(OP)
