"""The attention of a layer, over a number of heads that may change between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from flextron.config import ElasticConfig
from flextron.nn import masks
from flextron.nn.anatomy import Anatomy
from flextron.nn.cache import ElasticCache
from flextron.nn.policy import AxisDecision
from flextron.nn.projection import bias_of, linear
from flextron.nn.rotary import once
from flextron.nn.setting import Setting, Settings
from flextron_ext import head_attention, head_attention_decode

_TOGETHER = 64  # tokens up to which queries and keys turn together: what the ops cost is their calls
_DECODE_TOKENS = 8  # up to so many new tokens per sequence the decode op is faster


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864), half-split: x [B, T, H, D]; cos, sin [B, T, R], R <= D."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    R = cos.shape[-1]
    turned, rest = (x, None) if x.shape[-1] == R else (x[..., :R], x[..., R:])
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for pairs side by side: x [B, T, H, D]; cos, sin [B, T, R / 2]."""
    dtype, R = x.dtype, 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    pairs = x[..., :R].to(cos.dtype).unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(dtype)
    return turned if x.shape[-1] == R else torch.cat((turned, x[..., R:]), dim=-1)


class ElasticAttention(nn.Module):
    """Multi-head attention over a prefix of its heads.

    ``heads`` counts key/value groups, each with all its query heads (unit ``kv_group``), or query heads of
    every group (unit ``query``). With ``kv == "selected"`` only the groups in use are projected and cached; with
    ``kv == "all"`` every token stores all of them, so that a later token may use more. Without heads it gives zeros.
    Takes over the projections (and norms) of a transformers attention; their names and tensors stay.

    Attributes:
        host: attends in our place, over a cache of its own: q [B, T, H, D] and k, v [B, T, G, D], at their positions,
            and the number of groups that H heads attend over, give [B * T, H, D]; H may be 0. It is set by what runs
            the layers for a server.
    """

    sinks: Tensor | None
    host: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None

    def __init__(
        self,
        attention: Any,
        anatomy: Anatomy,
        hf_config: PreTrainedConfig,
        config: ElasticConfig,
        settings: Settings,
        layer_idx: int,
    ) -> None:
        super().__init__()
        self.anatomy = anatomy
        self.projections = (*anatomy.qkv, anatomy.output)
        if anatomy.sinks:
            setattr(self, anatomy.sinks, getattr(attention, anatomy.sinks))
        for name, module in attention.named_children():
            if name in (*self.projections, *anatomy.head_norms):
                setattr(self, name, module)
        self.scaling: float = getattr(attention, anatomy.scale)
        self.rotates = anatomy.rotates(hf_config, layer_idx)
        self.window = anatomy.window(hf_config, layer_idx)
        self.softcap = getattr(hf_config, anatomy.softcap) if anatomy.softcap else None
        self.clip = getattr(hf_config, anatomy.clip) if anatomy.clip else None
        # the layer's place in this model; a layer taken from another place still carries its old number
        self.elastic, self.settings, self.layer_idx = config, settings, layer_idx

    @property
    def heads(self) -> int:
        return self.settings.now().widths.heads[self.layer_idx]

    @property
    def kv(self) -> str:
        return self.settings.now().kv

    def _qkv(
        self, x: Tensor, per_block: int, blocks: int, features: Tensor | None, stored: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, K] -> queries [B, T, blocks * per_block, D], keys and values [B, T, stored, D].

        The first ``per_block`` query heads of each of ``blocks`` equal blocks; of each token only the first
        ``features`` features of a block, the rest zeros.
        """
        c, names = self.elastic, self.anatomy.qkv
        D, inputs = c.head_dim, x.shape[-1]
        if self.anatomy.grouped:
            return self._grouped(x, per_block, blocks, stored)
        q_rows, k_rows, v_rows = (None, None, None) if len(names) == 3 else self.rows()
        q_proj, k_proj, v_proj = (self._modules[name] for name in (names if len(names) == 3 else 3 * names))
        q = linear(
            q_proj, x, inputs, per_block * D, out_extent=features, out_blocks=blocks, rows=q_rows
        ).unflatten(-1, (-1, D))
        k = linear(k_proj, x, inputs, stored * D, rows=k_rows).unflatten(-1, (-1, D))
        v = linear(v_proj, x, inputs, stored * D, rows=v_rows).unflatten(-1, (-1, D))
        return q, k, v

    def rows(self) -> list[slice]:
        """Where queries, keys and values lie in the one projection that has all three, one after another."""
        c, D = self.elastic, self.elastic.head_dim
        ends = [c.num_heads * D, (c.num_heads + c.num_kv_heads) * D, (c.num_heads + 2 * c.num_kv_heads) * D]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _grouped(self, x: Tensor, per_block: int, blocks: int, stored: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same where the rows of one projection are those of one group after another.

        All groups that are stored are computed whole: of the unit ``query`` too, whose queries are no prefix of them.
        """
        c, D = self.elastic, self.elastic.head_dim
        M = c.heads_per_group
        y = linear(self._modules[self.anatomy.qkv[0]], x, x.shape[-1], stored * (M + 2) * D)
        y = y.unflatten(-1, (stored, M + 2, D))
        groups, kept = (c.num_kv_heads, per_block) if c.unit == "query" else (per_block // M, M)
        return y[..., :groups, :kept, :].flatten(2, 3), y[..., M, :], y[..., M + 1, :]

    def _normalised(self, q: Tensor, k: Tensor, heads: int, extent: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys through their norms. Norms over all heads run over those that a token keeps."""
        c, over = self.elastic, self.anatomy.norm_over
        q_norm, k_norm = (getattr(self, name) for name in self.anatomy.head_norms)
        if over == "head":
            return q_norm(q), k_norm(k)
        G, M, D = c.num_kv_heads, c.heads_per_group, c.head_dim
        stored, by_group = k.shape[2], c.unit == "kv_group"
        groups, kept = (q.shape[2] // M, M) if by_group else (G, q.shape[2] // G)
        if over == "each":
            q_weight = q_norm.weight.view(G, M, D)[:groups, :kept].flatten(0, 1)
            return _with(q_norm, q_weight, q), _with(k_norm, k_norm.weight[:stored], k)
        q_weight = q_norm.weight.view(G, M, D)[:groups, :kept].flatten()
        k_weight = k_norm.weight[: stored * D]
        if extent is None and stored == c.kv_heads(heads):
            q, k = _with(q_norm, q_weight, q.flatten(2)), _with(k_norm, k_weight, k.flatten(2))
            return q.unflatten(2, (-1, D)), k.unflatten(2, (-1, D))
        B, T = q.shape[:2]
        count = torch.tensor(heads, device=q.device) if extent is None else extent
        count = count.expand(B * T).view(B, T, 1)
        used = count if by_group else torch.full_like(count, G)
        seen = k * (torch.arange(stored, device=k.device) < used)[..., None]
        features = count * D * (M if by_group else G)
        return _rms(q, q, q_weight, features, q_norm), _rms(k, seen, k_weight, used * D, k_norm)

    def _turned(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions, in the dtype of each: tables may be float32 beside 16-bit weights."""
        kind = self.anatomy.rotary
        turn = rotate if kind.startswith("half") else rotate_pairs
        if kind == "half_once":
            tables = tuple(torch.cat((table, table), dim=-1) for table in tables)
        elif kind != "half":
            tables = once(kind, *tables)
        if self.host is not None and q.shape[:2].numel() <= _TOGETHER:
            both = turn(torch.cat((q, k), dim=2), *tables).to(q.dtype)
            return both[:, :, : q.shape[2]], both[:, :, q.shape[2] :]
        return turn(q, *tables).to(q.dtype), turn(k, *tables).to(k.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
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
        if stored == 0:
            self.pass_over(hidden_states, cache)
            return torch.zeros_like(hidden_states), None
        extent = decision.extent if heads else None
        features = None if extent is None else extent * (per_block // heads * D)

        q, k, v = self._qkv(hidden_states, per_block, blocks, features, stored)
        norms_last = self.anatomy.norm_last
        if self.anatomy.head_norms and not norms_last:
            q, k = self._normalised(q, k, heads, extent)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        if self.rotates:
            assert position_embeddings is not None
            q, k = self._turned(q, k, position_embeddings)
        if self.anatomy.head_norms and norms_last:
            q, k = self._normalised(q, k, heads, extent)

        cached = 0
        if cache is not None:
            cached = cache.get_seq_length(self.layer_idx)
            keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            if cached:
                k, v = keys.transpose(1, 2), values.transpose(1, 2)
        if self.host is not None:
            out = self.host(q, k, v, used)
        if heads == 0:  # the tokens are stored, for later ones may use them
            return torch.zeros_like(hidden_states), None
        if self.host is None:
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
        output: Any = self._modules[self.anatomy.output]
        out = linear(
            output,
            out.reshape(B, T, -1),
            per_block * D,
            hidden_states.shape[-1],
            features,
            in_blocks=blocks,
        )
        return decision.without(out, bias_of(output), c.head_choices), None

    def pass_over(self, x: Tensor, cache: ElasticCache | None) -> None:
        """Count the tokens x [B, T, K] in the cache of a layer that stores nothing of them.

        Positions and masks are made from the length of the first layer's.
        """
        if cache is not None:
            nothing = x.new_empty(x.shape[0], 0, x.shape[1], self.elastic.head_dim)
            cache.update(nothing, nothing, self.layer_idx)

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
                q, k, v, lengths, *count, extent, k_start=k_start, scale=self.scaling, **self._kind(q)
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
            **self._kind(q),
        )
        return cast(Tensor, out)  # without the logarithms of the sums

    def _kind(self, q: Tensor) -> dict[str, Any]:
        """What makes this attention of queries [..., H, D] other than plain, as arguments of the ops."""
        kind = {"window": self.window, "softcap": self.softcap, "sinks": self._sinks(q.shape[-2])}
        return {name: value for name, value in kind.items() if value is not None}

    def _sinks(self, heads: int) -> Tensor | None:
        """The sinks [heads] of the query heads that are kept."""
        if not self.anatomy.sinks:
            return None
        c, sinks = self.elastic, getattr(self, self.anatomy.sinks)
        if c.unit == "kv_group":
            return sinks[:heads]
        return sinks.view(c.num_kv_heads, -1)[:, : heads // c.num_kv_heads].flatten()

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
        if self.softcap is None and not self.anatomy.sinks:
            out = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=self.scaling)
            return out.transpose(1, 2)
        scores = (q.transpose(1, 2) @ k.mT).float() * self.scaling
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        # not minus infinity, which would make a row that sees nothing NaN
        lowest = torch.finfo(torch.float32).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        if (sinks := self._sinks(q.shape[2])) is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        return (weights.to(v.dtype) @ v).transpose(1, 2)

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


def _with(norm: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """A norm with a part of its weight."""
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def _rms(x: Tensor, seen: Tensor, weight: Tensor, features: Tensor, norm: Any) -> Tensor:
    """x [B, T, H, D] by the root mean square of what is ``seen`` of it, of so many features [B, T, 1]."""
    square = seen.float().flatten(2).square().sum(-1, keepdim=True) / features.clamp(min=1)
    return (weight * (x.flatten(2).float() * (square + norm.variance_epsilon).rsqrt()).to(x.dtype)).view(
        x.shape
    )
