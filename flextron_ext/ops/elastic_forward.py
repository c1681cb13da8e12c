"""elastic_forward: tokens through every layer of a Llama-family model. Formula: csrc/kernels/elastic_forward.h."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..panels import PanelFormat
from . import _common as common

OP = "elastic_forward"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def elastic_forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Sequence[Tensor],
    parts: str,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    cached: int,
    widths: Sequence[int],
    heads: Sequence[int],
    kv_heads: Sequence[int],
    neurons: int,
    query_heads: int,
    groups: int,
    norm: Tensor,
    head: Tensor,
    head_scales: Tensor | None,
    vocabulary: int,
    eps: float,
    keep: int = 1,
    unit: str = "kv_group",
    activation: str = "silu",
    k_start: Tensor | None = None,
    scale: float | None = None,
    router: Sequence[Tensor] | None = None,
    mlp_choices: Sequence[int] | None = None,
    head_choices: Sequence[int] | None = None,
    format: PanelFormat | str = "plain",
) -> Tensor:
    """Take tokens through all layers of a Llama-family model on a CPU, and return their logits; no gradient.

    Each layer is ``x += o(attention(norm(x)))``, ``x += mlp(norm(x))`` with RMSNorms, rotary embedding, biases and
    head norms where there are any, on the first heads and neurons only; then ``norm(x) head^T``. The new tokens'
    keys and values are written into ``keys`` and ``values`` at ``cached``.

    A projection's weight is plain, ``[outputs, inputs]``, or its panels (`pack_linear`; for query blocks of unit
    "query" one block per group). An MLP has ``gate`` and ``up`` plain, or both in the panels of ``up`` (`pack_mlp`).

    Args:
        x: [B, T, K], float32, bfloat16 or float16, on the CPU: the tokens' embeddings.
        cos: [B or 1, T, R], R even and at most D: of the rotary embedding, the dtype of x.
        sin: the same.
        weights: what ``parts`` names, for each layer in turn. The dtype of x; panels may be int8, scales float32.
        parts: names of a layer's weights, in order, separated by spaces: in_norm q k v o mlp_norm up down, and where
            the model has them gate, q_bias k_bias v_bias o_bias gate_bias up_bias down_bias, q_norm k_norm, and
            q_scales k_scales v_scales o_scales up_scales down_scales of int8 panels.
        keys: of each layer [B, room, G', D], room >= cached + T: the cache, the first `cached` tokens valid. No two
            elements share memory.
        values: the same.
        cached: tokens in the cache.
        widths: neurons used in each layer: L of them, or for each layer in turn one for each sequence, L * B.
        heads: the same of heads: groups with all their query heads (unit "kv_group"), or query heads of every group
            (unit "query").
        kv_heads: groups projected and written in each layer, at least those that any sequence or token may use.
        neurons: F, query_heads: H, groups: G of the full layer.
        norm: [K], the last norm.
        head: [vocabulary, K], or its panels.
        head_scales: of int8 panels.
        vocabulary: logits of a token.
        eps: of the norms, at least 0.
        keep: how many of the last tokens of each sequence get logits.
        unit: "kv_group" or "query".
        activation: one of "relu", "relu2", "gelu", "gelu_tanh", "silu".
        k_start: int32 or int64 [B], the first key seen in each sequence (left padding).
        scale: of the scores, any finite number; D ** -0.5 where None.
        router: what chooses widths and heads for every token (they are then empty), float32: W1 [L, hidden, K],
            W2 [L, C, hidden], and of R requests, each of B / R sequences in a row, state [L, R, hidden] and
            base [L, R, C]. C counts the choices of the MLP, then those of the heads. Formula in
            csrc/kernels/elastic_forward.h.
        mlp_choices: neurons of each choice.
        head_choices: heads of each choice.
        format: how all weights are stored: "plain", or in panels of this format.

    Returns:
        logits: [B, keep, vocabulary], the dtype of x.
    """
    common.check_tensor(OP, "x", x, DTYPES)
    for name, value in (("cos", cos), ("sin", sin), ("norm", norm), ("head", head)):
        common.check_tensor(OP, name, value, (*DTYPES, torch.int8))
    given = (
        x,
        cos,
        sin,
        weights,
        parts,
        keys,
        values,
        cached,
        widths,
        heads,
        kv_heads,
        neurons,
        query_heads,
        groups,
        norm,
        head,
        head_scales,
        vocabulary,
        eps,
        keep,
        unit,
        activation,
        k_start,
        scale,
        router,
        mlp_choices,
        head_choices,
        str(format),
    )
    _check_settings(eps, scale)
    return common.call_writing([*keys, *values], torch.ops.flextron.elastic_forward.default, *given)


def _check_settings(eps: float, scale: float | None) -> None:
    common.check_finite(OP, "eps", eps)
    if eps < 0:
        raise ValueError(f"{OP}: eps must not be negative, got {eps}")
    common.check_finite(OP, "scale", scale)


@common.register_fake("elastic_forward")
def _shape(
    x,
    cos,
    sin,
    weights,
    parts,
    keys,
    values,
    cached,
    widths,
    heads,
    kv_heads,
    neurons,
    query_heads,
    groups,
    norm,
    head,
    head_scales,
    vocabulary,
    eps,
    keep=1,
    *options,
    **named,
):
    return x.new_empty(x.shape[0], keep, vocabulary)


common.refuse_gradient_of_mutating(OP)


class HeldForward:
    """`elastic_forward` with weights that are held between calls, which saves to unpack and to check them anew.

    The weights may change in place; one that gets other memory is refused by the next call. A copy, also a pickled one,
    would hold other weights than its own model's: there is none.

    Args:
        embedding: [vocabulary, K], contiguous: the tokens' embeddings. Its dtype is the model's.
        weights, parts, neurons, query_heads, groups, norm, head, head_scales, eps, unit, activation, scale, format: as
            of `elastic_forward`.
        head_size: D, at most 1024.
    """

    def __init__(
        self,
        embedding: Tensor,
        weights: Sequence[Tensor],
        parts: str,
        neurons: int,
        query_heads: int,
        groups: int,
        head_size: int,
        norm: Tensor,
        head: Tensor,
        head_scales: Tensor | None,
        eps: float,
        unit: str = "kv_group",
        activation: str = "silu",
        scale: float | None = None,
        format: PanelFormat | str = "plain",
    ) -> None:
        common.check_tensor(OP, "embedding", embedding, DTYPES)
        for name, value in (("norm", norm), ("head", head)):
            common.check_tensor(OP, name, value, (*DTYPES, torch.int8))
        _check_settings(eps, scale)
        shape = (neurons, query_heads, groups, head_size)
        with torch.no_grad():
            self.number = torch.ops.flextron.elastic_forward_hold(
                embedding,
                weights,
                parts,
                *shape,
                norm,
                head,
                head_scales,
                eps,
                unit,
                activation,
                scale,
                str(format),
            )
        # at the end of the process the memory goes by itself
        weakref.finalize(self, torch.ops.flextron.elastic_forward_drop, self.number).atexit = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("HeldForward: it must not be copied, since it holds the weights of one model")

    def __call__(
        self,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        cached: int,
        widths: Sequence[int],
        heads: Sequence[int],
        kv_heads: Sequence[int],
        keep: int = 1,
        k_start: Tensor | None = None,
        router: Sequence[Tensor] | None = None,
        mlp_choices: Sequence[int] | None = None,
        head_choices: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take tokens through the model.

        Args:
            ids: [B, T] int64, each in [0, vocabulary).
            cos, sin, keys, values, cached, widths, heads, kv_heads, keep, k_start, router, mlp_choices, head_choices:
                as of `elastic_forward`.

        Returns:
            logits: [B, keep, vocabulary].
            best: [B] int64, where the last token's logits are greatest, as of ``argmax(-1)``; [0] where keep is 0.
        """
        return common.call_writing(
            [*keys, *values],
            torch.ops.flextron.elastic_forward_held.default,
            ids,
            cos,
            sin,
            self.number,
            keys,
            values,
            cached,
            widths,
            heads,
            kv_heads,
            keep,
            k_start,
            router,
            mlp_choices,
            head_choices,
        )


common.refuse_gradient_of_mutating("elastic_forward_held")
