"""Decoder: tokens through every layer of a model in one call. Formula: csrc/kernels/decoder.h."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from ..panels import PanelFormat
from . import _common as common

HOLD, STEP = "decoder_hold", "decoder_step"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OF_MODEL = (
    "embedding",
    "norm",
    "head",
    "head_scales",
    "head_bias",
    "norm_bias",
)  # one tensor each; every other name has one for each layer

_step = torch.ops.flextron.decoder_step.default


@dataclass(frozen=True)
class DecoderShape:
    """What the weights of a decoder do not say themselves.

    Args:
        layers: L, the number of layers.
        neurons: F, neurons of a full layer's MLP.
        query_heads: H, query heads of a full layer.
        groups: G, key/value heads of a full layer.
        head_size: D, at most 1024.
        eps: added to the mean square in every norm, at least 0.
        scale: multiplies the attention scores, any finite number; D ** -0.5 where None.
        unit: what a head counts: "kv_group", a group with all its query heads, or "query", a query head of every group.
        activation: one of "relu", "relu2", "gelu", "gelu_tanh", "silu".
        format: how all projections are stored: "plain", or in panels of this format.
        norms: "rms" (RMSNorm), "layer" (LayerNorm), or with 1 + weight in place of the weight "rms+1" (Gemma's) and
            "layer+1" (Nemotron's, where the sum is rounded to the weight's dtype).
        norm_over: what a norm of queries or keys runs over: "head", each head, with one weight for all; "each", each
            head, with a weight of its own; or "heads", all heads that a token keeps, together.
        norm_last: whether queries and keys are turned before their norms.
        clip: c bounds queries, keys and values, before they are turned, to [-c, c]; above 0.
        rotation: which elements of a head are turned together: "halves", i and i + R/2, or "pairs", 2i and 2i + 1.
        gated: whether an MLP is ``down(act(gate(x)) * up(x))``, and not ``down(act(up(x)))``.
        parallel: whether the MLP reads the stream that attention reads, and not what attention has added to.
        embedding_scale: multiplies the embeddings.
        residual_scale: multiplies what attention and MLP add to the stream.
        logit_scale: multiplies the logits, before a bias.
        logit_cap: c bounds the logits, ``c tanh(logits / c)``; above 0.
        softcap: bounds the attention scores in the same way.
        tables: of each layer, which table of the rotary embedding turns its heads, 1 or 2; 0: none. All 1 where None.
        windows: of each layer, how many keys a token sees, its own among them; 0: all. All 0 where None.
    """

    layers: int
    neurons: int
    query_heads: int
    groups: int
    head_size: int
    eps: float
    scale: float | None = None
    unit: str = "kv_group"
    activation: str = "silu"
    format: PanelFormat | str = "plain"
    norms: str = "rms"
    norm_over: str = "head"
    norm_last: bool = False
    clip: float | None = None
    rotation: str = "halves"
    gated: bool = True
    parallel: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    softcap: float | None = None
    tables: Sequence[int] | None = None
    windows: Sequence[int] | None = None


class DecoderRouter(NamedTuple):
    """What chooses the neurons and the heads of every token. Formula: csrc/kernels/decoder.h.

    C counts the choices of neurons, then those of heads. R requests have B / R adjacent sequences each.
    """

    tensors: Sequence[
        Tensor
    ]  # float32: W1 [L, hidden, K], W2 [L, C, hidden], state [L, R, hidden], base [L, R, C]
    mlp_choices: Sequence[int]  # neurons of each choice
    head_choices: Sequence[int]  # heads of each choice


class DecoderStep(NamedTuple):
    """What each layer uses: one number for all sequences, or one for each, layer after layer (L * B)."""

    widths: Sequence[int]  # neurons; empty with a router
    heads: Sequence[int]  # in the unit of the shape; empty with a router
    kv_heads: Sequence[
        int
    ]  # groups projected and cached in each layer: at least those that any token may use
    router: DecoderRouter | None = None


class Decoder:
    """A model's weights, held for any number of steps, which saves to unpack and check them anew; no gradient.

    Each layer is ``x += o(attention(norm(x)))``, ``x += mlp(norm(x))`` with rotary embedding (RoPE), biases, head norms
    and norms behind the two parts where they are given, on the first heads and neurons only; then ``norm(x) head^T``.
    To a token that uses no heads, or no neurons, the part adds nothing; where no token uses any, neither the part nor
    its norms are read.
    A `DecoderShape` of Llama's kind need not name what follows ``format``.

    The weights may change in place; a step refuses one that was given other memory. A copy, also a pickled one, would
    hold other weights than its own model's: there is none.

    Args:
        weights: maps names to tensors on the CPU, in float32, bfloat16 or float16; all have the dtype of
            ``embedding`` except panels of integers and scales. For the model: embedding [vocabulary, K], contiguous,
            norm [K], head [vocabulary, K]. For each layer, as a list: q [H * D, K], k, v [G * D, K], or in their place
            qkv [(H + 2 G) D, K], which has of each group its queries, its key and its value; o [K, H * D]; gate (of a
            gated MLP), up [F, K], down [K, F]; where the model has them in_norm, attention_post, mlp_norm, mlp_post
            [K], q_norm, k_norm [D] (over "heads" [H * D] and [G * D], of "each" [H, D] and [G, D]), and a bias of each
            norm and projection: q_bias, in_norm_bias, head_bias and so on. A part without a norm before it reads the
            stream itself; a parallel MLP, what attention reads. In a format of panels the head and the projections are
            those of `pack_linear` (q in one block per group with unit "query"), up and gate together in ``up``
            (`pack_mlp`), and formats with scales have head_scales, q_scales to down_scales beside them.
        shape: the sizes and settings that all layers share.
    """

    def __init__(self, weights: Mapping[str, Tensor | Sequence[Tensor]], shape: DecoderShape) -> None:
        self.weights, self.shape = dict(weights), shape
        tensors: list[Tensor] = []
        for name, value in weights.items():
            if name in OF_MODEL:
                tensors.append(cast(Tensor, value))
            else:
                tensors += _of_layers(name, cast(Sequence[Tensor], value), shape.layers)
        common.check_finite(HOLD, "eps", shape.eps)
        if shape.eps < 0:
            raise ValueError(f"{HOLD}: eps must not be negative, got {shape.eps}")
        common.check_finite(HOLD, "scale", shape.scale)
        for name in OF_MODEL[:3]:
            dtypes = DTYPES if name == "embedding" else (*DTYPES, torch.int8, torch.uint8)
            common.check_tensor(HOLD, name, weights.get(name), dtypes)
        for name in ("embedding_scale", "residual_scale", "logit_scale", "logit_cap", "softcap", "clip"):
            common.check_finite(HOLD, name, getattr(shape, name))
        scale = shape.head_size**-0.5 if shape.scale is None else shape.scale
        with torch.no_grad():
            self.number: int = torch.ops.flextron.decoder_hold(
                tensors,
                " ".join(weights),
                [shape.layers, shape.neurons, shape.query_heads, shape.groups, shape.head_size],
                [shape.eps, scale],
                shape.unit,
                shape.activation,
                str(shape.format),
                shape.norms,
                shape.gated,
                shape.parallel,
                [shape.embedding_scale, shape.residual_scale, shape.logit_scale],
                shape.logit_cap,
                shape.softcap,
                shape.tables,
                shape.windows,
                shape.rotation,
                shape.norm_over,
                shape.norm_last,
                shape.clip,
            )
        _alive[self.number] = self
        # at the end of the process the memory goes by itself
        weakref.finalize(self, torch.ops.flextron.decoder_drop, self.number).atexit = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("Decoder: it must not be copied, since it holds the weights of one model")

    def step(
        self,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        cached: int,
        step: DecoderStep,
        keep: int = 1,
        k_start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take T new tokens of B sequences through the model, and write their keys and values into the cache.

        Args:
            ids: [B, T] int64, each in [0, vocabulary).
            cos: [B or 1, T, R], R even and at most D: the table of the rotary embedding, in the dtype of the embedding,
                a factor for each element that is turned; [B or 1, T, 2 R], two of them side by side, where some layer
                takes the second.
            sin: the other table of the rotary embedding, in the shape of ``cos``.
            keys: the cache of each layer, [B, room, G', D] with room >= cached + T, in the dtype of the embedding. No
                two elements share memory.
            values: the values of the cache, laid out as ``keys``.
            cached: tokens that the cache holds already.
            step: what each layer uses.
            keep: how many of the last tokens of each sequence get logits.
            k_start: int32 or int64 [B], the first key that each sequence sees (left padding).

        Returns:
            logits: [B, keep, vocabulary], in the dtype of the embedding.
            best: [B] int64, the ``argmax(-1)`` of the last token's logits; [0] where keep is 0.
        """
        widths, heads, kv_heads, router = step
        return common.call_writing(
            [*keys, *values],
            _step,
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
            *(router or _NO_ROUTER),
        )


_NO_ROUTER = (None, None, None)
_alive: weakref.WeakValueDictionary[int, Decoder] = weakref.WeakValueDictionary()  # by number, for the fake


def _of_layers(name: str, value: Sequence[Tensor], layers: int) -> Sequence[Tensor]:
    if len(value) != layers:
        raise ValueError(f"{HOLD}: {name} must have {layers} entries, got {len(value)}")
    return value


@common.register_fake(STEP)
def _shapes(ids, cos, sin, held, keys, values, cached, widths, heads, kv_heads, keep=1, *options):
    decoder = _alive.get(int(held))
    if decoder is None:
        raise RuntimeError(f"{STEP}: held must be the number of a Decoder, got {held}")
    embedding = cast(Tensor, decoder.weights["embedding"])
    B, vocabulary = ids.shape[0], embedding.shape[0]
    logits = ids.new_empty(B, keep, vocabulary, dtype=embedding.dtype)
    return logits, ids.new_empty(B if keep and vocabulary else 0)


common.refuse_gradient_of_mutating(STEP)
