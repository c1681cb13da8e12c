"""head_attention: attention over a prefix or a list of heads. Formula: csrc/kernels/head_attention.h."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention as attention
from . import _common as common

OP = "head_attention"


def head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    unit: str = "kv_group",
    extent: Tensor | None = None,
    extent_per: str = "sequence",
    index: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    k_start: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with the active heads only. The others are zeros, and keys of unused groups are never read.

    ``out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h // M]) v[j, h // M]`` with ``M = H // G``, over the
    keys of t's sequence with ``k_start <= j``, if causal ``j <= i + S - T`` for query i of T and S keys, and with a
    window ``i + S - T - window < j``. A query that sees no key gives 0.

    Args:
        q: [T, H, D], float32, float64, bfloat16 or float16. Any strides.
        k: [S, G, D], the dtype of q; G divides H. Any strides.
        v: [S, G, D], the dtype of q. Any strides.
        heads: how many heads are active: the first `heads` groups with all their query heads (unit "kv_group"), or the
            first `heads` query heads of every group (unit "query"). With index, its length.
        unit: what `heads` and `extent` count, "kv_group" or "query".
        extent: int32 or int64, each in [0, heads]: the active heads of each sequence or token, instead of `heads`.
            [1] or [B] with extent_per "sequence", [T] with extent_per "token".
        extent_per: what has an extent of its own, "sequence" or "token".
        index: int32 or int64 [n], lists the active query heads in any order, each once. Not with extent.
        cu_seqlens_q: int32 or int64 [B + 1], where each sequence begins and ends in q; the first is 0. None means one
            sequence. Queries behind the last end are inactive.
        cu_seqlens_k: the same for k and v.
        k_start: int32 or int64 [B], the first key that each sequence sees; the keys before it are left padding.
        causal: whether a query sees only the keys up to its own; queries and keys are aligned at their ends.
        scale: multiplies the attention scores, any finite number; None means D ** -0.5.
        window: how many keys a query sees at most, up to and with its own, at least 1; None means all. What is before
            every query's window is never read. Not without causal.
        softcap: scores become ``softcap * tanh(score / softcap)`` after scaling, any positive number; None means as
            they are.
        sinks: [H], the dtype of q or float32: one more logit of each query head, neither scaled nor capped, in the
            softmax's denominator alone. Any finite number, or -inf for none.
        return_lse: also returns the logarithm of the softmax's denominator.

    Returns:
        out: [T, H, D], the dtype of q; with return_lse also lse: [T, H], float32 (float64 for float64), -inf
        where a head is inactive, or sees no key and has no sink. lse has no gradient.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, the unit or the number of heads is wrong.
        RuntimeError: on the CPU, a value in a tensor is out of range. On a GPU, where the host reads none, such a value
            is moved into its range.
    """
    _check(q, k, v, heads, unit, extent, extent_per, index, cu_seqlens_q, cu_seqlens_k, k_start)
    common.check_finite(OP, "scale", scale)
    attention.check_scores(OP, q, window, softcap, sinks, causal)
    which = heads, unit, extent, extent_per, index, cu_seqlens_q, cu_seqlens_k, k_start, causal
    scores = scale, window, softcap, sinks
    out, lse = common.call(torch.ops.flextron.head_attention.default, q, k, v, *which, *scores)
    return (out, lse) if return_lse else out


def _check(q, k, v, heads, unit, extent, extent_per, index, cu_seqlens_q, cu_seqlens_k, k_start) -> None:
    """Raise on what can be checked without reading a value on a device."""
    attention.check_dims(OP, "q", q, 3)
    attention.check_dims(OP, "k", k, 3)
    attention.check_inputs(OP, q, k=k, v=v)
    T, H, _ = q.shape
    if index is None:
        attention.check_heads(OP, heads, unit, H, k.shape[1])
    else:
        common.check_tensor(OP, "index", index, common.INTEGERS)
        attention.check_dims(OP, "index", index, 1)
        common.check_range(OP, "heads", heads, index.shape[0], index.shape[0])
        if extent is not None:
            raise ValueError(f"{OP}: extent must be None when index is given, got both")
    B = 1
    given = cu_seqlens_q if cu_seqlens_q is not None else cu_seqlens_k
    if given is not None:
        name = "cu_seqlens_q" if given is cu_seqlens_q else "cu_seqlens_k"
        attention.check_dims(OP, name, given, 1)
        if given.shape[0] < 1:
            raise ValueError(f"{OP}: {name} must have at least 1 element, got 0")
        B = given.shape[0] - 1
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is None and B != 1:
            raise ValueError(f"{OP}: {name} must have shape [{B + 1}], got None")
        attention.check_integers(OP, name, ends, B + 1)
    attention.check_integers(OP, "k_start", k_start, B)
    if extent_per not in ("sequence", "token"):
        raise ValueError(f"{OP}: extent_per must be sequence or token, got {extent_per}")
    attention.check_integers(OP, "extent", extent, *((T,) if extent_per == "token" else (1, B)))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@common.register_fake("head_attention")
def _shape(q, *arguments, **options):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_lse_dtype(q))


@common.register_fake("head_attention_backward")
def _backward_shape(dout, q, k, v, *arguments):
    return attention.gradient_shapes(q, k, v, *arguments[-2:])


def _save(ctx, inputs, output):
    q, k, v, heads, unit, extent, extent_per, index, cu_seqlens_q, cu_seqlens_k, *last = inputs
    k_start, causal, *scores, sinks = last
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, extent, index, cu_seqlens_q, cu_seqlens_k, k_start, sinks)
    ctx.options = heads, unit, extent_per, causal, scores


def _grad(ctx, dout, _):
    q, k, v, out, lse, extent, index, cu_seqlens_q, cu_seqlens_k, k_start, sinks = ctx.saved_tensors
    heads, unit, extent_per, causal, scores = ctx.options
    mask = common.wanted(ctx, 0, 1, 2, 15)
    which = heads, unit, extent, extent_per, index, cu_seqlens_q, cu_seqlens_k, k_start, causal
    backward = torch.ops.flextron.head_attention_backward.default
    gradients = common.call(backward, dout, q, k, v, out, lse, *which, *scores, sinks, mask)
    dq, dk, dv, dsinks = common.per_input(mask, gradients)
    return dq, dk, dv, *[None] * 12, dsinks


common.register_gradient(OP, _save, _grad)
common.register_autocast(OP, 0, 1, 2)
common.refuse_gradient("head_attention_backward")
