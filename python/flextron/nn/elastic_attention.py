"""The attention of a Llama-family layer, over a number of heads that may change between calls."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flextron.config import ElasticConfig
from flextron.nn import masks
from flextron.nn.cache import ElasticCache
from flextron.nn.policy import AxisDecision
from flextron.nn.projection import Projection, linear
from flextron.nn.setting import Setting, Settings
from flextron_ext import head_attention, head_attention_decode

_DECODE_TOKENS = 8  # up to so many new tokens per sequence the decode op is faster


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864), half-split: x [B, T, H, D]; cos, sin [B, T, R], R <= D."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    R = cos.shape[-1]
    turned, rest = (x, None) if x.shape[-1] == R else (x[..., :R], x[..., R:])
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


class ElasticAttention(nn.Module):
    """Multi-head attention over a prefix of its heads.

    ``heads`` counts key/value groups, each with all its query heads (unit ``kv_group``), or query heads of
    every group (unit ``query``). With ``kv == "selected"`` only the groups in use are projected and cached; with
    ``kv == "all"`` every token stores all of them, so that a later token may use more.
    Takes over the projections (and norms) of a transformers attention; their names and tensors stay.
    """

    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

    q_proj: Projection
    k_proj: Projection
    v_proj: Projection
    o_proj: Projection
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    scaling: float

    def __init__(self, attention: Any, config: ElasticConfig, settings: Settings, layer_idx: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.q_norm = attention.q_norm if config.qk_norm else None
        self.k_norm = attention.k_norm if config.qk_norm else None
        self.scaling = attention.scaling
        # the layer's place in this model; a layer taken from another place still carries its old number
        self.elastic, self.settings, self.layer_idx = config, settings, layer_idx

    @property
    def heads(self) -> int:
        return self.settings.now().widths.heads[self.layer_idx]

    @property
    def kv(self) -> str:
        return self.settings.now().kv

    def _project(
        self, proj: Projection, x: Tensor, heads: int, blocks: int = 1, extent: Tensor | None = None
    ) -> Tensor:
        """The first ``heads`` heads of each of ``blocks`` equal blocks, [B, T, blocks*heads, D]; of each token
        only the first ``extent`` features of a block, the rest zeros."""
        D = self.elastic.head_dim
        y = linear(proj, x, proj.in_features, heads * D, out_extent=extent, out_blocks=blocks)
        return y.unflatten(-1, (blocks * heads, D))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: ElasticCache | None = None,
        setting: Setting | None = None,
        decision: AxisDecision | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, K]; attention_mask as in `flextron.nn.masks`; setting and decision from the layer."""
        c, D = self.elastic, self.elastic.head_dim
        B, T = hidden_states.shape[:2]
        setting = setting or self.settings.now()
        if decision is None:
            decision = setting.by_width("ElasticAttention")
        heads = setting.widths.heads[self.layer_idx]
        # unit "query": blocks are the groups, and `per_block` query heads of each are kept
        blocks, per_block = (c.num_kv_heads, heads) if c.unit == "query" else (1, c.query_heads(heads))
        stored, used = setting.kv_heads[self.layer_idx], c.kv_heads(heads)
        extent = decision.extent
        features = None if extent is None else extent * (per_block // heads * D)

        q = self._project(self.q_proj, hidden_states, per_block, blocks, features)
        k = self._project(self.k_proj, hidden_states, stored)
        v = self._project(self.v_proj, hidden_states, stored)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)

        cached = 0
        if cache is not None:
            cached = cache.get_seq_length(self.layer_idx)
            keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            if cached:
                k, v = keys.transpose(1, 2), values.transpose(1, 2)
        k, v = k[:, :, :used], v[:, :, :used]

        k_start, mask = masks.split(attention_mask)
        if mask is not None:
            out = self._attend_masked(q, k, v, mask, heads)
        else:
            # the number of a token's heads; without one, all that are here, in whatever unit
            count = (used, "kv_group") if extent is None else (heads, c.unit)
            out = self._attend(q, k, v, k_start, count, extent, cached > 0)
        if decision.mixture is not None:
            out = out.reshape(B * T, -1, D) * self._scale(decision.mixture).to(out.dtype)[..., None]
        out = linear(
            self.o_proj,
            out.reshape(B, T, -1),
            per_block * D,
            self.o_proj.out_features,
            features,
            in_blocks=blocks,
        )
        return out, None

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_start: Tensor | None,
        count: tuple[int, str],
        extent: Tensor | None,
        cached: bool,
    ) -> Tensor:
        """q [B, T, H, D], k and v [B, S, G, D] -> the ops' attention, [B, T, H, D] or [B * T, H, D]."""
        (B, T), S = q.shape[:2], k.shape[1]
        few = _DECODE_TOKENS if extent is None else 1  # there the op's extents are per sequence
        if cached and few >= T:
            lengths = torch.full((B,), S, dtype=torch.int64, device=q.device)
            return head_attention_decode(
                q, k, v, lengths, *count, extent, k_start=k_start, scale=self.scaling
            )
        sequence = torch.arange(B + 1, device=q.device)
        out = head_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            *count,
            extent,
            "token" if extent is not None else "sequence",
            cu_seqlens_q=sequence * T,
            cu_seqlens_k=sequence * S,
            k_start=k_start,
            scale=self.scaling,
        )
        return cast(Tensor, out)  # without the logarithms of the sums

    def _attend_masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
        """q [B, T, H, D], k and v [B, S, G, D] -> torch's attention under any mask, [B, T, H, D].

        Of a token's heads beyond its own number, whose queries are zeros, the output projection reads none.
        """
        c = self.elastic
        masks.check_masked(mask, q.shape[0], q.shape[1], k.shape[1])
        if mask.shape[1] == c.num_heads > 1:
            first = slice(heads) if c.unit == "query" else slice(None)
            grouped = mask.unflatten(1, (c.num_kv_heads, c.heads_per_group))
            mask = grouped[:, : k.shape[2], first].flatten(1, 2)
        elif mask.shape[1] != 1:
            raise ValueError(
                f"flextron: attention_mask must have a mask for all or for each of {c.num_heads} heads, "
                f"got {mask.shape[1]}"
            )
        each = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(each, dim=2).transpose(1, 2) for x in (k, v))
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=self.scaling)
        return out.transpose(1, 2)

    def _scale(self, mixture: Tensor) -> Tensor:
        """mixture [N, C] -> [N, H]: each head's share, the sum over the choices that keep it.

        ``y = sum_c mixture_c MHA_c(x)`` is attention at all heads, each scaled by its share before W_o, as elastic_mlp
        scales neurons. With an extent the heads beyond are zeros, cost nothing and get no gradient.
        """
        c = self.elastic
        rank = torch.arange(c.num_heads, device=mixture.device)
        rank = rank // c.heads_per_group if c.unit == "kv_group" else rank % c.heads_per_group
        kept_by = torch.tensor(c.head_choices, device=mixture.device)[:, None] > rank  # [C, H]
        return mixture @ kept_by.to(mixture.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads} of {self.elastic.max_heads} ({self.elastic.unit}), kv={self.kv}"
