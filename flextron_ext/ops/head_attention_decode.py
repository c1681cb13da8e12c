"""head_attention_decode: new tokens against a KV cache. Formula: csrc/kernels/head_attention_decode.h."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention as attention
from . import _common as common

OP = "head_attention_decode"


def head_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor,
    heads: int,
    unit: str = "kv_group",
    extent: Tensor | None = None,
    block_table: Tensor | None = None,
    k_start: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with a few new tokens per sequence to a cache that already holds their keys; active heads only.

    ``out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h // M]) v[b, j, h // M]``, with
    ``M = H // G``, over ``k_start[b] <= j <= i + seqlens[b] - T``, and with a window
    ``i + seqlens[b] - T - window < j``. A query that sees no key, and an inactive head, give exact zeros.

    Args:
        q: [B, T, H, D], float32, float64, bfloat16 or float16. Any strides.
        k_cache: contiguous [B, S_max, G, D], or pages [P, page, G, D] with block_table. The dtype of q, any
            strides.
        v_cache: the values, in the same layout.
        seqlens: int32 or int64 [B], how many keys of each sequence are valid, its T new ones included.
        heads: how many heads are active: the first `heads` groups with all their query heads (unit "kv_group"), or the
            first `heads` query heads of every group (unit "query").
        unit: what `heads` and `extent` count, "kv_group" or "query".
        extent: int32 or int64, [1] or [B], each in [0, heads]: the active heads of each sequence, instead of `heads`.
        block_table: int32 or int64 [B, max_pages]: key j of sequence b is in row ``j % page`` of page
            ``block_table[b, j // page]``. Entries beyond seqlens are not read. Sequences may share pages.
        k_start: int32 or int64 [B], the first key that each sequence sees; the keys before it are left padding.
        scale: multiplies the attention scores, any finite number; None means D ** -0.5.
        window: how many keys a query sees at most, up to and with its own, at least 1; None means all. What is before
            every query's window is never read.
        softcap: scores become ``softcap * tanh(score / softcap)`` after scaling, any positive number; None means as
            they are.
        sinks: [H], the dtype of q or float32: one more logit of each query head, neither scaled nor capped, in the
            softmax's denominator alone. Any finite number, or -inf for none.

    Returns:
        out: [B, T, H, D], the dtype of q.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, the unit or the number of heads is wrong.
        RuntimeError: on the CPU, a value in a tensor is out of range. On a GPU, where the host reads none, such a value
            is moved into its range.
    """
    _check(q, k_cache, v_cache, seqlens, heads, unit, extent, block_table, k_start)
    common.check_finite(OP, "scale", scale)
    attention.check_scores(OP, q, window, softcap, sinks)
    which = seqlens, heads, unit, extent, block_table, k_start, scale, window, softcap, sinks
    return common.call(torch.ops.flextron.head_attention_decode.default, q, k_cache, v_cache, *which)


def _check(q, k_cache, v_cache, seqlens, heads, unit, extent, block_table, k_start) -> None:
    """Raise on what can be checked without reading a value on a device."""
    attention.check_dims(OP, "q", q, 4)
    attention.check_dims(OP, "k_cache", k_cache, 4)
    attention.check_inputs(OP, q, k_cache=k_cache, v_cache=v_cache)
    B = q.shape[0]
    attention.check_heads(OP, heads, unit, q.shape[2], k_cache.shape[2])
    common.check_tensor(OP, "seqlens", seqlens, common.INTEGERS)
    attention.check_integers(OP, "seqlens", seqlens, B)
    attention.check_integers(OP, "k_start", k_start, B)
    attention.check_integers(OP, "extent", extent, 1, B)
    if block_table is None:
        if k_cache.shape[0] != B:
            raise ValueError(
                f"{OP}: k_cache.shape[0] must be {B} without block_table, got {k_cache.shape[0]}"
            )
        return
    common.check_tensor(OP, "block_table", block_table, common.INTEGERS)
    attention.check_dims(OP, "block_table", block_table, 2)
    common.check_shape(OP, "block_table", block_table, (B, block_table.shape[1]))


@common.register_fake("head_attention_decode")
def _shape(q, *arguments, **options):
    return q.new_empty(q.shape)


@common.register_fake("head_attention_decode_backward")
def _backward_shape(dout, q, k_cache, v_cache, *arguments):
    return attention.gradient_shapes(q, k_cache, v_cache, *arguments[-2:])


def _save(ctx, inputs, output):
    q, k_cache, v_cache, seqlens, heads, unit, extent, block_table, k_start, *scores, sinks = inputs
    ctx.save_for_backward(q, k_cache, v_cache, seqlens, extent, block_table, k_start, sinks)
    ctx.options = heads, unit, scores


def _grad(ctx, dout):
    q, k_cache, v_cache, seqlens, extent, block_table, k_start, sinks = ctx.saved_tensors
    heads, unit, scores = ctx.options
    mask = common.wanted(ctx, 0, 1, 2, 12)
    which = heads, unit, extent, block_table, k_start, *scores, sinks
    backward = torch.ops.flextron.head_attention_decode_backward.default
    gradients = common.call(backward, dout, q, k_cache, v_cache, seqlens, *which, mask)
    dq, dk, dv, dsinks = common.per_input(mask, gradients)
    return dq, dk, dv, *[None] * 9, dsinks


common.register_gradient(OP, _save, _grad)
common.register_autocast(OP, 0, 1, 2)
common.refuse_gradient("head_attention_decode_backward")
