"""elastic_mlp: a whole MLP at any width. Formula: csrc/ops/elastic_mlp.cpp; what computes it: csrc/ops/mlp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _common as common

OP = "elastic_mlp"
ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu")


def elastic_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    width: int,
    activation: str = "silu",
    extent: Tensor | None = None,
    gate: Tensor | None = None,
    choices: Sequence[int] | None = None,
) -> Tensor:
    """Run an MLP on its first neurons: one width, one per token, or a soft mixture of widths.

    ``h = act(x w_gate[:d]^T + b_gate) * (x w_up[:d]^T + b_up)``, or ``act(x w_up[:d]^T + b_up)`` without w_gate;
    ``y = (s * h) w_down[:, :d]^T + b_down`` with ``s_b = sum_{c: d_c > b} gate[t, c]``, 1 without gate.

    Args:
        x: [..., K], float32, float64, bfloat16 or float16.
        w_gate: [F, K], or None for a plain MLP.
        w_up: [F, K].
        w_down: [N, F].
        b_gate: [F] or None.
        b_up: [F] or None.
        b_down: [N] or None; is added once, whatever the width or the gate.
        width: how many neurons are used; ``d`` if extent is None.
        activation: one of "relu", "relu2", "gelu", "gelu_tanh", "silu".
        extent: int32 or int64, [1] or one per token, each in [0, width]: ``d`` per token. Not with gate.
        gate: [..., C] or [1, C], any floating dtype: weighs each choice. All neurons below the largest choice are
            computed, even if their weights add up to 0.
        choices: C ascending widths ``d_c``, none above width; required with gate.

    Returns:
        y: [..., N], the dtype of x.
    """
    y = common.call(
        torch.ops.flextron.elastic_mlp.default,
        *_arguments(x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation, extent, gate, choices),
    )
    return common.shaped_as(x, y)


def elastic_mlp_with_hidden(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    width: int,
    activation: str = "silu",
    extent: Tensor | None = None,
    gate: Tensor | None = None,
    choices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`elastic_mlp`, which also returns what its gradient needs. Autograd calls this op for elastic_mlp.

    Args:
        x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation, extent, gate, choices: what elastic_mlp takes.

    Returns:
        (y, up, gated): y of elastic_mlp; ``x w_up[:d]^T + b_up`` and ``x w_gate[:d]^T + b_gate`` before the
        activation, [T, the largest d there may be], the dtype of x, T the tokens of x in descending order of their
        extents, zeros beyond each; gated is [0] without w_gate. Only y has a gradient.
    """
    y, up, gated = torch.ops.flextron.elastic_mlp_with_hidden(
        *_arguments(x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation, extent, gate, choices)
    )
    return common.shaped_as(x, y), up, gated


def _arguments(
    x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation, extent, gate, choices
) -> tuple:
    """What the ops take: checked, x and gate as matrices."""
    rows = _check(x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation)
    _check_gate(x, rows, width, extent, gate, choices)
    return (
        common.as_rows(x, rows),
        w_gate,
        w_up,
        w_down,
        b_gate,
        b_up,
        b_down,
        width,
        activation,
        common.check_extent(OP, "extent", extent, rows),
        None if gate is None else common.as_rows(gate, rows),
        None if choices is None else list(choices),
    )


def _check(x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation) -> int:
    """Raise on what can be known before the call; return the number of rows."""
    common.check_tensor(OP, "x", x, common.FLOATING)
    common.check_same(OP, x, w_gate=w_gate, w_up=w_up, w_down=w_down, b_gate=b_gate, b_up=b_up, b_down=b_down)
    for name, value, dim in (("w_up", w_up, 2), ("w_down", w_down, 2)):
        common.check_tensor(OP, name, value, common.FLOATING)
        if value.dim() != dim:
            raise ValueError(f"{OP}: {name} must have {dim} dimensions, got {value.dim()}")
    if x.dim() < 1:
        raise ValueError(f"{OP}: x must have at least 1 dimension, got 0")
    neurons, inputs, outputs = w_up.shape[0], x.shape[-1], w_down.shape[0]
    common.check_shape(OP, "w_up", w_up, (neurons, inputs))
    common.check_shape(OP, "w_down", w_down, (outputs, neurons))
    for name, value, shape in (
        ("w_gate", w_gate, (neurons, inputs)),
        ("b_gate", b_gate, (neurons,)),
        ("b_up", b_up, (neurons,)),
        ("b_down", b_down, (outputs,)),
    ):
        if value is not None:
            common.check_shape(OP, name, value, shape)
    if b_gate is not None and w_gate is None:
        raise ValueError(f"{OP}: b_gate must be None without w_gate, got a tensor")
    common.check_range(OP, "width", width, 0, neurons)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
    return math.prod(x.shape[:-1])  # not numel(): it would fix a symbolic size


def _check_gate(x, rows, width, extent, gate, choices) -> None:
    if (gate is None) != (choices is None):
        missing = "gate" if gate is None else "choices"
        raise ValueError(
            f"{OP}: {missing} must be given with {'choices' if gate is None else 'gate'}, got None"
        )
    if gate is None:
        return
    if extent is not None:
        raise ValueError(f"{OP}: extent must be None when gate is given, got both")
    common.check_tensor(OP, "gate", gate, common.FLOATING)
    if len(choices) == 0 or list(choices) != sorted(set(choices)):
        raise ValueError(f"{OP}: choices must be ascending and not empty, got {list(choices)}")
    for choice in choices:
        common.check_range(OP, "choices", choice, 0, width)
    if gate.dim() < 1 or gate.shape[-1] != len(choices) or math.prod(gate.shape[:-1]) not in (1, rows):
        shapes = f"[1, {len(choices)}] or [{rows}, {len(choices)}]"
        raise ValueError(f"{OP}: gate must have shape {shapes}, got {list(gate.shape)}")
    if gate.device != x.device:
        raise ValueError(f"{OP}: gate must be on {x.device}, got {gate.device}")


@common.register_fake("elastic_mlp")
def _shape(
    x,
    w_gate,
    w_up,
    w_down,
    b_gate,
    b_up,
    b_down,
    width,
    activation="silu",
    extent=None,
    gate=None,
    choices=None,
):
    return x.new_empty(x.shape[0], w_down.shape[0])


@common.register_fake("elastic_mlp_with_hidden")
def _shapes(
    x,
    w_gate,
    w_up,
    w_down,
    b_gate,
    b_up,
    b_down,
    width,
    activation="silu",
    extent=None,
    gate=None,
    choices=None,
):
    hidden = x.shape[0], choices[-1] if choices else width
    return (
        x.new_empty(x.shape[0], w_down.shape[0]),
        x.new_empty(hidden),
        x.new_empty(0 if w_gate is None else hidden),
    )


@common.register_fake("elastic_mlp_backward")
def _backward_shape(
    dy, x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation, extent, gate, *rest
):
    output_mask = rest[-1]
    inputs = (x, w_gate, w_up, w_down, b_gate, b_up, b_down, gate)
    return tuple(
        x.new_empty(0) if value is None or not output_mask >> i & 1 else value.new_empty(value.shape)
        for i, value in enumerate(inputs)
    )


def _save(ctx, inputs, output):
    *tensors, width, activation, extent, gate, choices = inputs
    _, up, gated = output
    ctx.mark_non_differentiable(up, gated)
    ctx.save_for_backward(*tensors, extent, gate, up, gated)
    ctx.settings = width, activation, choices


def _grad(ctx, dy, *_):
    *tensors, extent, gate, up, gated = ctx.saved_tensors
    width, activation, choices = ctx.settings
    mask = common.wanted(ctx, 0, 1, 2, 3, 4, 5, 6, 10)
    backward = torch.ops.flextron.elastic_mlp_backward.default
    options = width, activation, extent, gate, choices
    gradients = common.call(backward, dy, *tensors, *options, up, gated, mask)
    *of_tensors, of_gate = common.per_input(mask, gradients)
    return *of_tensors, None, None, None, of_gate, None


_with_hidden = common.register_gradient(f"{OP}_with_hidden", _save, _grad)
common.register_autograd_kernel(OP, lambda *inputs: _with_hidden(*inputs)[0])
for op in (OP, f"{OP}_with_hidden"):
    common.register_autocast(op, 0, 1, 2, 3, 4, 5, 6)
common.refuse_gradient("elastic_mlp_backward")
