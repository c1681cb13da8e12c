"""Each op in plain PyTorch, under its own name: what it means, at full cost. The kernels are tested against this."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.decoder import Decoder, DecoderShape
from .panels import GROUP, PanelFormat

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def _keep(x: Tensor, extent: int | Tensor) -> Tensor:
    """Zero, without multiplying, the last-dimension entries of x at or beyond ``extent`` (one, or one per token)."""
    position = torch.arange(x.shape[-1], device=x.device)
    if isinstance(extent, Tensor):
        extent = extent.reshape(-1, *[1] * (x.dim() - 1))  # [T or 1, 1, ...]
    return torch.where(position < extent, x, torch.zeros((), dtype=x.dtype, device=x.device))


def elastic_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    in_extent: Tensor | None = None,
    out_extent: Tensor | None = None,
    in_blocks: int = 1,
    out_blocks: int = 1,
) -> Tensor:
    T, N, K = x.shape[0], weight.shape[0], weight.shape[1]
    w = weight.view(out_blocks, N // out_blocks, in_blocks, K // in_blocks)[:, :out_features, :, :in_features]
    x = x.reshape(T, in_blocks, x.shape[1] // in_blocks)[:, :, :in_features]
    if in_extent is not None:
        x = _keep(x, in_extent)
    y = torch.einsum("tbi,onbi->ton", x, w)
    if bias is not None:
        y = y + bias.view(out_blocks, N // out_blocks)[:, :out_features]
    if out_extent is not None:
        y = _keep(y, out_extent)
    return y.reshape(T, out_blocks * out_features)


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
    choices: list[int] | None = None,
) -> Tensor:
    act = ACTIVATIONS[activation]

    up, gated = _hidden(x, w_gate, w_up, b_gate, b_up, width)
    h = act(up) if gated is None else act(gated) * up
    if gate is not None:
        neuron = torch.arange(width, device=x.device)
        reached = (
            neuron < torch.tensor(choices, device=x.device)[:, None]
        )  # [C, width]: choice c keeps the neuron
        h = h * (gate @ reached.to(gate.dtype)).to(h.dtype)
    if extent is not None:
        h = _keep(h, extent)
    return F.linear(h, w_down[:, :width], b_down)


def _hidden(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor | None]:
    """The hidden layer before the activation."""

    def linear(w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, w[:width], None if b is None else b[:width])

    return linear(w_up, b_up), None if w_gate is None else linear(w_gate, b_gate)


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
    choices: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    y = elastic_mlp(x, w_gate, w_up, w_down, b_gate, b_up, b_down, width, activation, extent, gate, choices)
    up, gated = _hidden(x, w_gate, w_up, b_gate, b_up, choices[-1] if choices else width)
    hidden = [up, x.new_empty(0) if gated is None else gated]
    if extent is not None:
        order = extent.expand(x.shape[0]).argsort(descending=True, stable=True)
        hidden = [_keep(h, extent)[order] if h.dim() == 2 else h for h in hidden]
    return y, hidden[0], hidden[1]


def _active(q: Tensor, G: int, heads: int, unit: str, count: Tensor, index: Tensor | None) -> Tensor:
    """[T, H] bool: which query heads each token uses; ``count`` [T or 1] in units of ``unit``."""
    T, H, _ = q.shape
    head = torch.arange(H, device=q.device)
    if index is not None:
        return torch.isin(head, index).expand(T, H)
    rank = head // (H // G) if unit == "kv_group" else head % (H // G)
    return (rank < count.clamp(max=heads).reshape(-1, 1)).expand(T, H)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    active: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence. q [T, H, D], k, v [S, G, D], visible [T, S], active [T, H] -> out [T, H, D], lse [T, H]."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    M = q.shape[1] // k.shape[1]
    used = active.view(active.shape[0], k.shape[1], M).any(2).any(0)[:, None]  # [G, 1]
    k, v = (torch.where(used, t, torch.zeros((), dtype=t.dtype)) for t in (k, v))
    seen = visible.any(0)[:, None, None]
    k, v = (torch.where(seen, t, torch.zeros((), dtype=t.dtype)).repeat_interleave(M, 1) for t in (k, v))
    q = torch.where(active[..., None], q, torch.zeros((), dtype=q.dtype))
    wide = torch.promote_types(q.dtype, torch.float32)
    score = torch.einsum("thd,shd->ths", q.to(wide), k.to(wide)) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~(visible[:, None] & active[..., None]), -math.inf)
    lse = torch.logsumexp(score, -1) if k.shape[0] else score.new_full(q.shape[:2], -math.inf)
    if sinks is not None:
        lse = torch.where(active, torch.logaddexp(lse, sinks.to(wide)), lse)
    weight = torch.where(
        torch.isinf(lse)[..., None], 0.0, torch.exp(score - lse.masked_fill(torch.isinf(lse), 0)[..., None])
    )
    return torch.einsum("ths,shd->thd", weight, v.to(wide)).to(q.dtype), lse


def _visible(T: int, S: int, first: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """[T, S]: keys from ``first`` on, and when causal the last ``window`` up to the query's own place (aligned at the
    end).
    """
    key, query = torch.arange(S, device=device), torch.arange(T, device=device)[:, None] + S - T
    visible = (key >= first) & ((key <= query) | (not causal))
    return visible if window is None else visible & (query - key < window)


def _unpacked(panels: Tensor, scales: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """[blocks, P, words, 16, elements] -> [blocks * P * 16, words * together]."""
    panels = PanelFormat(format).out_of_slices(panels)
    if (
        format == PanelFormat.INT4
    ):  # inputs 0 to 3 of a word are its bytes' lower halves, 4 to 7 the upper ones
        panels = torch.cat((panels & 15, panels >> 4), -1)
    weight = panels.transpose(2, 3).flatten(3).to(dtype)  # [blocks, P, 16, K]
    if format == PanelFormat.INT4:
        assert scales is not None
        scales = PanelFormat.INT4.out_of_slices(scales)
        each = scales.double().permute(3, 0, 1, 4, 2).repeat_interleave(GROUP, 4)  # [2, blocks, P, 16, K]
        weight = (weight.double() * each[0] + each[1]).to(dtype)
    elif scales is not None:
        weight = (weight.double() * scales[..., None].double()).to(dtype)
    return weight.flatten(0, 2)


def quantised(x: Tensor, blocks: int = 1) -> Tensor:
    """x [.., blocks * K] as panels of a quantised format read it: each 32 inputs of a block by a scale of their own.

    ``x = scale * round(x * (127 / most))`` with ``most = max |x|`` and ``scale = most / 127``, in float32; 0 where most
    is below 2 ** -100.
    """
    K = x.shape[-1] // blocks
    groups = F.pad(x.float().unflatten(-1, (blocks, K)), (0, -K % GROUP)).unflatten(-1, (-1, GROUP))
    most = groups.abs().amax(-1, keepdim=True)
    scaled = most.where(~(most < 2.0**-100), torch.inf)
    whole = (groups * (127 / scaled)).round().to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.where(scaled == torch.inf, 0 * most, most / 127)
    return (whole * scale).flatten(-2)[..., :K].flatten(-2).to(x.dtype)


def _as_read(x: Tensor, format: str, blocks: int = 1) -> Tensor:
    return quantised(x, blocks) if format != "plain" and PanelFormat(format).quantised else x


def packed_linear(
    x: Tensor,
    panels: Tensor,
    scales: Tensor | None,
    format: str,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    in_extent: Tensor | None = None,
    out_extent: Tensor | None = None,
    in_blocks: int = 1,
) -> Tensor:
    blocks = panels.shape[0]
    weight = _unpacked(panels, scales, format, x.dtype).unflatten(0, (blocks, -1))[:, :out_features]
    if bias is not None:
        bias = bias.view(blocks, -1)[:, :out_features].flatten()
    if format in (
        PanelFormat.W8A8,
        PanelFormat.INT4,
    ):  # an input that is not used has no part in a group's scale
        x = x.unflatten(-1, (in_blocks, -1))[..., :in_features]
        x = (x if in_extent is None else _keep(x, in_extent)).flatten(-2)
        x = quantised(x, in_blocks)
    return elastic_linear(
        x, weight.flatten(0, 1), bias, in_features, out_features, in_extent, out_extent, in_blocks, blocks
    )


def packed_mlp(
    x: Tensor,
    up_panels: Tensor,
    down_panels: Tensor,
    up_scales: Tensor | None,
    down_scales: Tensor | None,
    format: str,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    width: int,
    out_features: int,
    gated: bool = True,
    activation: str = "silu",
    extent: Tensor | None = None,
) -> Tensor:
    up, gate = _unpacked(up_panels, up_scales, format, x.dtype)[:, : x.shape[1]], None
    if gated:
        gate, up = (half.flatten(0, 1) for half in up.unflatten(0, (-1, 2, 16)).unbind(1))
    down = _unpacked(down_panels, down_scales, format, x.dtype)[:out_features]
    return _mlp(x, gate, up, down, b_gate, b_up, b_down, width, activation, extent, format)


def _mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    width: int,
    activation: str,
    extent: Tensor | None,
    format: str,
) -> Tensor:
    """elastic_mlp, of weights in panels of this format."""
    up, gated = _hidden(_as_read(x, format), w_gate, w_up, b_gate, b_up, width)
    act = ACTIVATIONS[activation]
    h = act(up) if gated is None else act(gated) * up
    if extent is not None:
        h = _keep(h, extent)
    return F.linear(_as_read(h, format), w_down[:, :width], b_down)


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
) -> tuple[Tensor, Tensor]:
    T, S = q.shape[0], k.shape[0]
    ends_q = [0, T] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    ends_k = [0, S] if cu_seqlens_k is None else cu_seqlens_k.tolist()
    count = torch.tensor([heads], device=q.device) if extent is None else extent
    if extent is not None and extent_per == "sequence" and count.numel() > 1:
        count = torch.cat([count[b].expand(ends_q[b + 1] - ends_q[b]) for b in range(len(ends_q) - 1)])
    active = _active(q, k.shape[1], heads, unit, count, index)
    parts = []
    for b in range(len(ends_q) - 1):
        t, s = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        first = 0 if k_start is None else int(k_start[b])
        visible = _visible(t.stop - t.start, s.stop - s.start, first, causal, window, q.device)
        parts.append(_attend(q[t], k[s], v[s], visible, active[t], scale, softcap, sinks))
    wide = torch.promote_types(q.dtype, torch.float32)
    if not parts:
        return q.new_zeros(q.shape), q.new_full(q.shape[:2], -math.inf, dtype=wide)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


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
    B, T = q.shape[:2]
    out = []
    for b in range(B):
        k, v = k_cache, v_cache
        if block_table is not None:
            used = block_table[b, : -(-int(seqlens[b]) // k.shape[1])].long()
            k, v = k[used].flatten(0, 1), v[used].flatten(0, 1)
        else:
            k, v = k[b], v[b]
        k, v = k[: int(seqlens[b])], v[: int(seqlens[b])]
        count = (
            torch.tensor([heads], device=q.device)
            if extent is None
            else extent[b if extent.numel() > 1 else 0].view(1)
        )
        active = _active(q[b], k.shape[1], heads, unit, count, None)
        visible = _visible(T, k.shape[0], 0 if k_start is None else int(k_start[b]), True, window, q.device)
        out.append(_attend(q[b], k, v, visible, active, scale, softcap, sinks)[0])
    return torch.stack(out) if out else torch.zeros_like(q)


def _norm(x: Tensor, w: dict[str, Tensor], name: str, s: DecoderShape) -> Tensor:
    """By the norm of this name; x where there is none."""
    if name not in w:
        return x
    weight, bias = w[name], w.get(f"{name}_bias")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if s.norms.startswith("layer"):
        weight = weight + 1 if s.norms == "layer+1" else weight
        return F.layer_norm(x, weight.shape, weight, bias, s.eps)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + s.eps)
    y = (y * (1 + weight.to(wide.dtype))).to(x.dtype) if s.norms == "rms+1" else weight * y.to(x.dtype)
    return y if bias is None else y + bias


def _head_norm(x: Tensor, w: dict[str, Tensor], name: str, s: DecoderShape) -> Tensor:
    """Each head of x [B, T, heads, D] by itself, by a weight for all of them or for each."""
    if s.norm_over == "head" or name not in w:
        return _norm(x, w, name, s)
    tensors = [(key, _kept(w[key], x.shape[2], s)) for key in (name, f"{name}_bias") if key in w]
    heads = [_norm(x[:, :, h], {key: t[h] for key, t in tensors}, name, s) for h in range(x.shape[2])]
    return torch.stack(heads, 2) if heads else x


def _norm_all(x: Tensor, w: dict[str, Tensor], name: str, s: DecoderShape, kept: Tensor) -> Tensor:
    """x [B, T, heads, D] over all heads that a token keeps, ``kept`` [B, T] of the unit, by their mean square."""
    if name not in w:
        return x
    heads, D, M = x.shape[2], s.head_size, s.query_heads // s.groups
    rank = torch.arange(heads)  # a head is kept where this is less than what its token keeps
    if name == "q_norm":
        rank = rank // M if s.unit == "kv_group" else rank % max(heads // s.groups, 1)
    seen = (rank < kept[..., None])[..., None]
    square = (x * seen).square().sum((2, 3), keepdim=True) / (seen.sum((2, 3), keepdim=True) * D).clamp(min=1)
    weight = _kept(w[name].view(-1, D), heads, s)
    y = x * torch.rsqrt(square + s.eps) * (1 + weight if s.norms == "rms+1" else weight)
    return y + _kept(w[f"{name}_bias"].view(-1, D), heads, s) if f"{name}_bias" in w else y


def _kept(t: Tensor, heads: int, s: DecoderShape) -> Tensor:
    """What queries or keys [.., heads, ..] that are computed have of t, which has a row for every head."""
    if s.unit == "kv_group" or len(t) == s.groups < s.query_heads:
        return t[:heads]
    return t.unflatten(0, (s.groups, -1))[:, : heads // s.groups].flatten(0, 1)


def _heads_of_groups(
    x: Tensor, w: dict[str, Tensor], s: DecoderShape, per_block: int, stored: int
) -> tuple[Tensor, ...]:
    """Queries [B, T, H, D], keys and values [B, T, stored, D] of a projection that has them group by group."""
    M, y = s.query_heads // s.groups, F.linear(_as_read(x, s.format), w["qkv"], w.get("qkv_bias"))
    y = y.unflatten(-1, (s.groups, M + 2, s.head_size))
    groups, kept = (per_block // M, M) if s.unit == "kv_group" else (s.groups, per_block)
    return y[..., :groups, :kept, :].flatten(2, 3), y[..., :stored, M, :], y[..., :stored, M + 1, :]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, rotation: str) -> Tensor:
    """x [B, T, H, D], cos and sin [B or 1, T, R]."""
    R = cos.shape[-1]
    cos, sin, turned = cos[:, :, None], sin[:, :, None], x[..., :R]
    if rotation == "halves":
        a, b = turned.chunk(2, -1)
        crossed = torch.cat((-b, a), -1)
    else:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
        crossed = torch.stack((-b, a), -1).flatten(-2)
    return torch.cat((turned * cos + crossed * sin, x[..., R:]), -1)


def decoder_step(
    ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    held: Decoder,
    keys: list[Tensor],
    values: list[Tensor],
    cached: int,
    widths: list[int],
    heads: list[int],
    kv_heads: list[int],
    keep: int = 1,
    k_start: Tensor | None = None,
    router: list[Tensor] | None = None,
    mlp_choices: list[int] | None = None,
    head_choices: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """``held`` is the decoder itself, whose weights count in the dtype of ``cos``."""
    (B, T), s = ids.shape, held.shape
    D, M = s.head_size, s.query_heads // s.groups
    model, layers = _plain_weights(held, cos.dtype)
    x = model["embedding"][ids] * s.embedding_scale
    beside = max(1, *s.tables) if s.tables else 1
    turns = list(zip(cos.chunk(beside, -1), sin.chunk(beside, -1), strict=True))
    for i, (w, stored) in enumerate(zip(layers, kv_heads, strict=True)):
        y = _norm(x, w, "in_norm", s)
        table, window = s.tables[i] if s.tables else 1, s.windows[i] if s.windows else 0
        turn = turns[table - 1] if table else (cos[..., :0], sin[..., :0])
        if router is not None:
            w1, w2, state, base = (t[i] for t in router)
            width, n = _chosen(y, w1, w2, state, base, mlp_choices or [], head_choices or [])
        else:
            width, n = (torch.tensor(u).view(len(kv_heads), -1)[i] for u in (widths, heads))
            width, n = (u[:, None].expand(B if len(u) == 1 else -1, T) for u in (width, n))
        most = int(n.max()) if n.numel() else 0
        blocks, used = (1, most) if s.unit == "kv_group" else (s.groups, s.groups)
        per_block = most * M if s.unit == "kv_group" else most
        if "qkv" in w:
            q, k, v = _heads_of_groups(y, w, s, per_block, stored)
        else:
            read = _as_read(y, s.format)
            q = _heads(read, w, "q", D, per_block, blocks)
            k, v = (_heads(read, w, name, D, stored) for name in "kv")
        if s.norm_over == "heads":
            q = _norm_all(q, w, "q_norm", s, n)
            k = _norm_all(k, w, "k_norm", s, n if s.unit == "kv_group" else torch.full_like(n, s.groups))
        elif not s.norm_last:
            q, k = _head_norm(q, w, "q_norm", s), _head_norm(k, w, "k_norm", s)
        if s.clip is not None:
            q, k, v = (t.clamp(-s.clip, s.clip) for t in (q, k, v))
        q, k = (_turn(t, *turn, s.rotation) for t in (q, k))
        if s.norm_last:
            q, k = _head_norm(q, w, "q_norm", s), _head_norm(k, w, "k_norm", s)
        new = slice(cached, cached + T)
        keys[i][:, new, :stored], values[i][:, new, :stored] = k, v
        attended = x
        if most:
            k, v = (t[i][:, : new.stop, :used] for t in (keys, values))
            kind = dict(scale=s.scale, window=window or None, softcap=s.softcap)
            q = _attention_of_cache(q, k, v, most, s.unit, n, k_start, kind)
            block = per_block * D
            inputs = n.flatten() * (block // most)
            sizes = (block, x.shape[-1], inputs, None, blocks)
            q = q.reshape(B * T, blocks, block)  # zeros beyond what a token uses
            q = _as_read(_keep(q, inputs).flatten(1), s.format, blocks)
            out = elastic_linear(q, w["o"], w.get("o_bias"), *sizes)
            out = s.residual_scale * _norm(out.view(x.shape), w, "attention_post", s)
            attended = x + out * (n > 0)[..., None]
        if "mlp_norm" in w or not s.parallel:
            y = _norm(x if s.parallel else attended, w, "mlp_norm", s)
        y = _mlp_of(y, w, s.neurons, width.flatten(), s.activation, s.format)
        x = attended + s.residual_scale * _norm(y, w, "mlp_post", s) * (width > 0)[..., None]
    last = s.logit_scale * _norm(x, model, "norm", s)[:, T - keep :]
    logits = F.linear(_as_read(last, s.format), model["head"])
    if "head_bias" in model:
        logits = logits + model["head_bias"]
    if s.logit_cap is not None:
        logits = s.logit_cap * torch.tanh(logits / s.logit_cap)
    return logits, logits[:, -1].argmax(-1) if keep else ids.new_empty(0)


def _plain_weights(held: Decoder, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A decoder's weights in this dtype, panels as the matrices they stand for: of the model, and of each layer."""
    s, given = held.shape, held.weights
    model = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    of_layers = [(name, value) for name, value in given.items() if name not in model]
    layers = [{name: value[i] for name, value in of_layers} for i in range(s.layers)]
    vocabulary, K = model["embedding"].shape
    blocks = {"q": s.groups if s.unit == "query" else 1}
    rows = dict(head=vocabulary, q=s.query_heads * s.head_size, o=K, down=K)
    rows["qkv"] = (s.query_heads + 2 * s.groups) * s.head_size
    rows |= dict.fromkeys("kv", s.groups * s.head_size)
    in_blocks = {"o": blocks["q"]}
    columns = dict(o=rows["q"] // blocks["q"], down=s.neurons)  # of a block
    for w in (model, *layers) if s.format != "plain" else ():
        for name in rows.keys() & w.keys():
            weight = _unpacked(w[name], w.get(f"{name}_scales"), s.format, dtype).unflatten(
                0, (blocks.get(name, 1), -1)
            )
            inputs = weight.unflatten(2, (in_blocks.get(name, 1), -1))[..., : columns.get(name, K)]
            w[name] = inputs.flatten(2)[:, : rows[name] // len(weight)].flatten(0, 1)
        if "up" in w and not s.gated:
            w["up"] = _unpacked(w["up"], w.get("up_scales"), s.format, dtype)[: s.neurons, :K]
        elif "up" in w:
            both = _unpacked(w["up"], w.get("up_scales"), s.format, dtype)[:, :K].unflatten(0, (-1, 2, 16))
            w["gate"], w["up"] = (half.flatten(0, 1)[: s.neurons] for half in both.unbind(1))
    in_dtype = [{name: t.to(dtype) for name, t in w.items()} for w in (model, *layers)]
    return in_dtype[0], in_dtype[1:]


def _heads(x: Tensor, w: dict[str, Tensor], name: str, D: int, kept: int, blocks: int = 1) -> Tensor:
    """The first ``kept`` heads of each of ``blocks`` blocks of a projection: [B, T, blocks * kept, D]."""
    bias = w.get(f"{name}_bias")
    y = elastic_linear(x.flatten(0, 1), w[name], bias, x.shape[-1], kept * D, out_blocks=blocks)
    return y.view(*x.shape[:2], blocks * kept, D)


def _chosen(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    state: Tensor,
    base: Tensor,
    mlp_choices: list[int],
    head_choices: list[int],
) -> tuple[Tensor, ...]:
    """What the router of a layer chooses for the tokens of x [B, T, K]: neurons and heads, [B, T] each."""
    B, R = x.shape[0], state.shape[0]
    state, base = (t.repeat_interleave(B // R, 0)[:, None] for t in (state, base))
    h = state + F.rms_norm(x.to(w1.dtype), x.shape[-1:], eps=2**-23) @ w1.T
    logits = F.leaky_relu(h, 0.1) @ w2.T + base
    axes = logits.split((len(mlp_choices), len(head_choices)), -1)
    menus = (mlp_choices, head_choices)
    width, heads = (torch.tensor(m)[axis.argmax(-1)] for m, axis in zip(menus, axes, strict=True))
    return width, heads


def _attention_of_cache(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    unit: str,
    extent: Tensor,
    k_start: Tensor | None,
    kind: dict[str, Any],
) -> Tensor:
    """A token after another: each has an extent of its own, [B, T]."""
    (B, T), out = q.shape[:2], []
    for t in range(T):
        length = keys.shape[1] - T + t + 1
        start = None if k_start is None else k_start.clamp(max=length)
        cache = (keys[:, :length], values[:, :length], torch.full((B,), length))
        out.append(
            head_attention_decode(q[:, t : t + 1], *cache, heads, unit, extent[:, t], k_start=start, **kind)
        )
    return torch.cat(out, 1) if out else torch.zeros_like(q)


def _mlp_of(
    x: Tensor, w: dict[str, Tensor], neurons: int, extent: Tensor, activation: str, format: str
) -> Tensor:
    gate, up, down = (w.get("gate"), w["up"], w["down"])
    b_gate, b_up, b_down = (w.get(f"{name}_bias") for name in ("gate", "up", "down"))
    y = _mlp(x.flatten(0, 1), gate, up, down, b_gate, b_up, b_down, neurons, activation, extent, format)
    return y.view(x.shape)


def prefix_gate(x: Tensor, gate: Tensor, width: Tensor) -> Tensor:
    """The worked example of docs/add-an-op.md."""
    kept = torch.arange(x.shape[1], device=x.device) < width[:, None]  # [T, N]
    return torch.where(kept, gate[:, None] * x, 0).to(x.dtype)


_PHILOX_KEY_STEP = (0x9E3779B9, 0xBB67AE85)
_PHILOX_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)


def _philox(counter: list[int], seed: int) -> int:
    """First word of Philox4x32-10 (Salmon et al., SC 2011) at a 128-bit counter, keyed by a 64-bit seed."""
    c, key = list(counter), [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = _PHILOX_MULTIPLIER[0] * c[0], _PHILOX_MULTIPLIER[1] * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(k + s) & 0xFFFFFFFF for k, s in zip(key, _PHILOX_KEY_STEP, strict=True)]
    return c[0]


def route(logits: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    T, C = logits.shape
    score = logits.to(torch.promote_types(logits.dtype, torch.float32)).nan_to_num(
        nan=-math.inf, posinf=math.inf, neginf=-math.inf
    )
    if seed is not None:
        word = [[_philox([t & 0xFFFFFFFF, t >> 32, c, 0], seed) for c in range(C)] for t in range(T)]
        # 23 bits, moved by half a step: strictly inside (0, 1), exact in float32
        u = ((torch.tensor(word, dtype=torch.int64).view(T, C) >> 9).float() + 0.5) * 2.0**-23
        score = score - torch.log(-torch.log(u.to(logits.device)))
    choice = score.argmax(1)
    order = torch.sort(choice, descending=True, stable=True).indices
    counts = torch.bincount(choice, minlength=C).flip(0)
    return choice, order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])
