"""A decode step as a function of tensors alone: tokens, lengths, and what each sequence keeps of each layer.

It computes what the modules compute. As it reads no value of a tensor on the host, one CUDA graph of it serves every
budget, see `flextron.nn.graph`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm

from flextron.nn.elastic_attention import rotate
from flextron.nn.forward import ElasticForward
from flextron.nn.policy import AxisDecision, menus_of
from flextron.nn.protocol import Elastic
from flextron.nn.rotary import rotary_of
from flextron.nn.router import AdaptiveRouter
from flextron.nn.static_cache import rows_at
from flextron_ext import elastic_linear, elastic_mlp, head_attention_decode

VARYING_ROPE = (
    "dynamic",
    "longrope",
)  # whose tables depend on the longest position, which the host would read


class Kept(NamedTuple):
    """What B sequences keep of L layers.

    Attributes:
        mlp, heads: [L, B] int64: neurons, and heads in the unit of the model. Not read where a router chooses.
        kv: [L, 1] int64: the key/value groups that are projected and stored; the others are stored as zeros.
    """

    mlp: Tensor
    heads: Tensor
    kv: Tensor


class Targets(NamedTuple):
    """What the adaptive router adds to its logits for each sequence, see `AdaptiveRouter.context`.

    Attributes:
        state, base: [L, B, hidden] and [L, B, C].
        active: [B] int64: 1, or 0 for a sequence that is not there and keeps nothing.
    """

    state: Tensor
    base: Tensor
    active: Tensor


class Room(NamedTuple):
    """Where keys and values lie: those of a `StaticCache`.

    Attributes:
        keys, values: [P, page, G, D] of each layer; the step writes the new tokens' own.
        table: [B, columns] int64.
    """

    keys: list[Tensor]
    values: list[Tensor]
    table: Tensor


class DecodeStep:
    """One token of each of B sequences through all layers of a model.

    Args:
        model: whose weights are read where they lie.
        forward: the same, gathered; `can_step` says whether a step can be made of it.
        is_paged: whether ``Room.table`` is to be followed; else sequence b lies in page b.
        router: the adaptive router that chooses; None: the widths are those of `Kept`.
    """

    def __init__(
        self, model: Elastic, forward: ElasticForward, is_paged: bool, router: AdaptiveRouter | None = None
    ) -> None:
        config, (attention, mlp) = model.elastic, forward.modules[0]
        self.config, self.forward, self.is_paged = config, forward, is_paged
        self.rotary, self.router = rotary_of(model, model.anatomy), router
        self.scale, self.activation = attention.scaling, mlp.activation
        self.eps, weights = forward.eps, forward.weights
        self.whole = {name: part for name, part in weights.items() if isinstance(part, Tensor)}
        self.layers = [
            {name: part[i] for name, part in weights.items() if not isinstance(part, Tensor)}
            for i in range(config.num_layers)
        ]
        self.menus = menus_of(config, forward.norm.device)
        by_group = config.unit == "kv_group"
        # unit "query": blocks are the groups, and `heads` query heads of each are kept
        self.blocks = 1 if by_group else config.num_kv_heads
        self.block_features = config.num_heads // self.blocks * config.head_dim
        self.features_per_head = (config.heads_per_group if by_group else 1) * config.head_dim
        self.places = self._places()

    def _places(self) -> list[int]:
        """Where the tensors are that `ElasticForward.snapshot` does not watch."""
        own = [] if self.router is None else [self.router.w1, self.router.w2]
        return [tensor.data_ptr() for tensor in (self.rotary.inv_freq, *own)]

    def holds(self) -> bool:
        """Whether RoPE's frequencies and the router still lie where a captured step reads them."""
        return self._places() == self.places

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        k_start: Tensor,
        kept: Kept,
        room: Room,
        targets: Targets | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Append a token to each sequence.

        Args:
            ids: [B] int64, the tokens.
            positions: [B] int64, their positions.
            lengths: [B] int64, how many tokens each sequence has stored.
            k_start: [B] int64, the first of them that is not padding.
            kept, room, targets: see there; without targets the widths are those of ``kept``.

        Returns:
            Logits [B, V], and where they are greatest, [B] int64.
        """
        x = embedding(ids, self.whole["embedding"])
        cos, sin = self.rotary(x, positions[:, None])
        rows = rows_at(room.table, room.keys[0].shape[1], lengths[:, None])[:, 0]
        seqlens = lengths + 1
        features, stored = kept.heads * self.features_per_head, kept.kv * self.config.head_dim
        for layer, w in enumerate(self.layers):
            h = self._norm(x, w["in_norm"])
            mlp, heads, width = kept.mlp[layer], kept.heads[layer], features[layer]
            if targets is not None:
                mlp, heads = self._chosen(h, layer, targets)
                width = heads * self.features_per_head
            q = self._heads(h, w, "q", self.block_features, width, self.blocks)
            k, v = (self._heads(h, w, name, None, stored[layer]) for name in "kv")
            q, k = self._turned(q, k, cos, sin)
            for cache, new in ((room.keys[layer], k), (room.values[layer], v)):
                cache.flatten(0, 1).index_copy_(0, rows, new)
            out = head_attention_decode(
                q[:, None],
                room.keys[layer],
                room.values[layer],
                seqlens,
                self.config.max_heads,
                self.config.unit,
                heads,
                room.table if self.is_paged else None,
                k_start,
                self.scale,
            )
            o, bias = w["o"], w.get("o_bias")
            sizes = self.block_features, len(o), width, None, self.blocks
            out = elastic_linear(out.flatten(1), o, bias, *sizes)
            x = x + AxisDecision(heads).without(out, bias, self.config.head_choices)
            weights = w.get("gate"), w["up"], w["down"]
            biases = w.get("gate_bias"), w.get("up_bias"), w.get("down_bias")
            h, neurons = self._norm(x, w["mlp_norm"]), self.config.intermediate_size
            out = elastic_mlp(h, *weights, *biases, neurons, self.activation, mlp)
            x = x + AxisDecision(mlp).without(out, biases[-1], self.config.mlp_choices)
        logits = linear(self._norm(x, self.whole["norm"]), self.whole["head"])
        return logits, logits.argmax(-1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # rounded before it is weighed, as transformers' norms do: in 16 bits each fourth value would be another
        return rms_norm(x, weight.shape, None, self.eps) * weight

    def _heads(
        self,
        h: Tensor,
        w: dict[str, Tensor],
        name: str,
        features: int | None,
        extent: Tensor,
        blocks: int = 1,
    ) -> Tensor:
        """The heads of a projection, [B, .., D], zeros beyond the extent; each through its norm where there is one."""
        weight = w[name]
        features = features or len(weight)
        y = elastic_linear(h, weight, w.get(f"{name}_bias"), h.shape[1], features, None, extent, 1, blocks)
        y = y.unflatten(1, (-1, self.config.head_dim))
        norm = w.get(f"{name}_norm")
        return y if norm is None else self._norm(y, norm)

    def _turned(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Both at their positions: together, since on a GPU the launches of so few numbers are what they cost."""
        both = rotate(torch.cat([q, k], 1)[:, None], cos, sin)[:, 0]
        q, k = both.split([q.shape[1], k.shape[1]], 1)
        return q, k

    def _chosen(self, h: Tensor, layer: int, targets: Targets) -> tuple[Tensor, Tensor]:
        """What the adaptive router gives each sequence, [B] of each axis; as `PerToken` decides."""
        assert self.router is not None
        context = targets.state[layer], targets.base[layer]
        logits = self.router.logits(h[:, None], layer, context)
        mlp, heads = (
            menu.index_select(0, rows.argmax(-1)) * targets.active
            for rows, menu in zip(logits, self.menus, strict=True)
        )
        return mlp, heads


def can_step(model: Elastic, forward: ElasticForward) -> bool:
    """Whether a step computes what the modules would: plain weights, transformers' layers, tables of RoPE that stay."""
    rotary = rotary_of(model, model.anatomy)
    return (
        forward.serves
        and model.anatomy.is_llama(model.config)
        and "head_bias" not in forward.weights
        and forward.format == "plain"
        and rotary.rope_type not in VARYING_ROPE
        and not (rotary._forward_hooks or rotary._forward_pre_hooks or "forward" in rotary.__dict__)
    )
