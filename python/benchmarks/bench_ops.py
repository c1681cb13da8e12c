"""Each op beside the fastest that plain PyTorch does on the same tensors: python bench_ops.py --op elastic_mlp

Every result is verified before it is timed. Inputs are random. Candidates take turns, in the opposite order in every
round, over several sets of tensors that together are larger than the caches. On a GPU they are CUDA graphs whose
replays are timed by events; a candidate that waits for the device cannot be captured and runs without a graph. Times
are medians. Rates count useful operations and bytes that must be moved, and stand beside those of a large matmul and
a large copy (on a CPU a large sum, which only reads) in the same run.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flextron_ext as ops
from flextron.artefacts.machine import processor
from flextron.judge.timing import bench, device_clock, wait_until_idle, wall_clock
from flextron.testing.numerics import assert_no_worse
from flextron_ext import reference

WIDTHS = (1.0, 0.75, 0.5, 0.25)
PACKED = (None, "int8", "w8a8", "int4")  # formats of panels; None: the dtype's own
TOKENS = {"cpu": (1, 8, 64, 256), "cuda": (1, 16, 64, 1024, 2048, 4096, 8192)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_SETS = 100e6  # bytes of all sets together: more than a large L3 cache
MAX_SETS = 64  # of small tensors: they stay in the cache, as they would in a model
RIVAL_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative Frobenius

Run = Callable[[SimpleNamespace], Tensor]


@dataclass(frozen=True)
class Shape:
    """The layer that is timed: K model width, NEURONS, H query heads, G key/value heads, D head size."""

    K: int
    neurons: int
    H: int
    G: int
    D: int


SHAPES = {
    "smollm2": Shape(576, 1536, 9, 3, 64),  # SmolLM2-135M
    "llama2-7b": Shape(4096, 11008, 32, 32, 128),
    "llama3-8b": Shape(4096, 14336, 32, 8, 128),
    "llama3-1b": Shape(2048, 8192, 32, 8, 64),
    "tiny": Shape(64, 96, 4, 2, 16),  # to try this program, not a model
}


@dataclass(frozen=True)
class Target:
    """Where and in what the ops are timed."""

    device: str
    dtype: torch.dtype
    backward: bool = False

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)


@dataclass(frozen=True)
class Case:
    """One line of the table: an op and what else computes its result.

    Attributes:
        shape: names what is computed.
        tokens: how many rows there are.
        extent: the share of the width, or "mix" if every token has its own.
        share: the mean share of the width.
        flops: how many useful floating-point operations one call makes.
        bytes: how many bytes one call must read and write: each input once, the output once.
        make: draws the tensors for one call.
        ours: runs the op on them.
        rivals: name -> the same result in plain PyTorch. The first one verifies the result.
        leaves: names the tensors whose gradients are timed too, in order, if gradients are timed.
        rival_leaves: the same for rivals that hold weights of their own.
        waits: names the rivals that wait for the device, which no graph can hold.
    """

    shape: str
    tokens: int
    extent: str
    share: float
    flops: float
    bytes: float
    make: Callable[[], SimpleNamespace]
    ours: Run
    rivals: dict[str, Run]
    leaves: tuple[str, ...] = ()
    rival_leaves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    waits: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Row:
    """One line of the CSV file: an op and one rival. ``ratio`` is the rival's time over ours. ``rate`` and ``ceiling``
    count operations or bytes, whichever bounds the op. ``spread`` is the interquartile range over the median, ours or
    the rival's, whichever is larger."""

    op: str
    device: str
    arch: str
    dtype: str
    shape: str
    tokens: int
    extent: str
    share: float
    time_us: float
    rate: float
    rate_unit: str
    ceiling: float
    rival: str
    rival_time_us: float
    ratio: float
    spread: float
    of_full: float | None
    mode: str
    commit: str


def elastic_linear(s: Shape, T: int, target: Target) -> Iterator[Case]:
    def make(extents: Tensor | None = None) -> Callable[[], SimpleNamespace]:
        return lambda: SimpleNamespace(
            x=target.randn(T, s.K), w=target.randn(s.K, s.K, scale=s.K**-0.5), extents=_copy(extents)
        )

    def case(side: str, share: float, ours: Run, plain: Run) -> Case:
        n = _width(s.K, share)
        return Case(
            f"{side} {s.K}x{s.K}",
            T,
            f"{share:g}",
            n / s.K,
            2 * T * s.K * n,
            _size(target) * (n * s.K + T * s.K + T * n),
            make(),
            ours,
            {"views": plain},
            ("x", "w"),
        )

    for share in WIDTHS:
        n = _width(s.K, share)
        yield case(
            "out",
            share,
            lambda i, n=n: ops.elastic_linear(i.x, i.w, None, s.K, n),
            lambda i, n=n: F.linear(i.x, i.w[:n]),
        )
    half = _width(s.K, 0.5)
    yield case(
        "in",
        0.5,
        lambda i: ops.elastic_linear(i.x, i.w, None, half, s.K),
        lambda i: F.linear(i.x[:, :half], i.w[:, :half]),
    )
    if len(WIDTHS) > T:
        return
    widths, extents = _mix(s.K, T, target)
    counts = _counts(widths, extents)

    def bucket(i: SimpleNamespace, x: Tensor, d: int) -> Tensor:
        return F.pad(F.linear(x, i.w[:d]), (0, s.K - d))

    yield Case(
        f"out {s.K}x{s.K}",
        T,
        "mix",
        sum(extents.tolist()) / (T * s.K),
        2 * s.K * int(extents.sum()),
        _size(target) * (int(extents.max()) * s.K + 2 * T * s.K),
        make(extents),
        lambda i: ops.elastic_linear(i.x, i.w, None, s.K, s.K, out_extent=i.extents),
        {
            "masked dense": lambda i: F.linear(i.x, i.w).masked_fill(_beyond(i.extents, s.K), 0),
            "buckets": lambda i: _in_buckets(i.x, i.extents, lambda x, d: bucket(i, x, d), widths, counts),
            "buckets, waiting": lambda i: _in_buckets(i.x, i.extents, lambda x, d: bucket(i, x, d), widths),
        },
        ("x", "w"),
        waits=frozenset({"buckets, waiting"}),
    )


def elastic_mlp(s: Shape, T: int, target: Target) -> Iterator[Case]:
    fused = torch.compile(_swiglu, dynamic=True) if target.device == "cuda" else None
    name = f"swiglu {s.K}x{s.neurons}"

    def make(d: int | None = None, extents: Tensor | None = None) -> SimpleNamespace:
        i = SimpleNamespace(
            x=target.randn(T, s.K),
            gate=target.randn(s.neurons, s.K, scale=s.K**-0.5),
            up=target.randn(s.neurons, s.K, scale=s.K**-0.5),
            down=target.randn(s.K, s.neurons, scale=s.neurons**-0.5),
            extents=_copy(extents),
        )
        if d is not None:
            i.gate_up = torch.cat((i.gate[:d], i.up[:d]))
            i.down_slice = i.down[:, :d].contiguous()
        return i

    def views(i: SimpleNamespace, x: Tensor, d: int, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return F.linear(act(F.linear(x, i.gate[:d]), F.linear(x, i.up[:d])), i.down[:, :d])

    def slices(i: SimpleNamespace, d: int, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return F.linear(act(*F.linear(i.x, i.gate_up).split(d, 1)), i.down_slice)

    own = ("x", "gate", "up", "down")
    for share in WIDTHS:
        d = _width(s.neurons, share)
        rivals: dict[str, Run] = {
            "views": lambda i, d=d: views(i, i.x, d, _swiglu),
            "concatenated": lambda i, d=d: slices(i, d, _swiglu),
        }
        if fused is not None:
            rivals["views, compiled"] = lambda i, d=d: views(i, i.x, d, fused)
            rivals["concatenated, compiled"] = lambda i, d=d: slices(i, d, fused)
        yield Case(
            name,
            T,
            f"{share:g}",
            d / s.neurons,
            6 * T * s.K * d,
            _size(target) * (3 * s.K * d + 2 * T * s.K),
            lambda d=d: make(d),
            lambda i, d=d: ops.elastic_mlp(i.x, i.gate, i.up, i.down, None, None, None, d),
            rivals,
            own,
            {rival: ("x", "gate_up", "down_slice") for rival in rivals if rival.startswith("concatenated")},
        )

    if len(WIDTHS) > T:
        return
    widths, extents = _mix(s.neurons, T, target)
    counts = _counts(widths, extents)
    act = fused or _swiglu

    def mixed() -> SimpleNamespace:
        i = make(extents=extents)
        blocks = [_blocks(w, widths) for w in (i.gate, i.up)]
        i.gate_up_blocks = torch.cat(blocks, 1)  # [C, 2 F / C, K]
        i.down_blocks = torch.stack(i.down.chunk(len(widths), 1))  # [C, K, F / C]
        i.ends = torch.tensor(_rows_of_blocks(counts), device=target.device).cumsum(0).int()
        return i

    def masked(i: SimpleNamespace) -> Tensor:
        h = act(F.linear(i.x, i.gate), F.linear(i.x, i.up))
        return F.linear(h.masked_fill(_beyond(i.extents, s.neurons), 0), i.down)

    def grouped(i: SimpleNamespace) -> Tensor:
        """Column blocks of the weights as experts: block c serves the first rows of the sorted tokens."""
        order = i.extents.argsort(descending=True, stable=True)
        rows = _rows_of_blocks(counts)
        x = i.x[order]
        x = torch.cat([x[:n] for n in rows])
        h = act(*torch._grouped_mm(x, i.gate_up_blocks.transpose(1, 2), offs=i.ends).chunk(2, 1))
        parts = torch._grouped_mm(h, i.down_blocks.transpose(1, 2), offs=i.ends).split(rows)
        sums = parts[0].float()
        for part in parts[1:]:
            sums[: len(part)] += part
        return torch.empty_like(i.x).index_copy_(0, order, sums.to(i.x.dtype))

    def in_buckets(i: SimpleNamespace, known: list[int] | None) -> Tensor:
        return _in_buckets(i.x, i.extents, lambda x, d: views(i, x, d, act), widths, known)

    rivals = {
        "masked dense": masked,
        "buckets": lambda i: in_buckets(i, counts),
        "buckets, waiting": lambda i: in_buckets(i, None),
    }
    if hasattr(torch, "_grouped_mm") and not target.backward and s.neurons % (8 * len(widths)) == 0:
        rivals["grouped mm"] = grouped
    yield Case(
        name,
        T,
        "mix",
        int(extents.sum()) / (T * s.neurons),
        6 * s.K * int(extents.sum()),
        _size(target) * (3 * s.K * int(extents.max()) + 2 * T * s.K),
        mixed,
        lambda i: ops.elastic_mlp(i.x, i.gate, i.up, i.down, None, None, None, s.neurons, extent=i.extents),
        rivals,
        own,
        waits=frozenset({"buckets, waiting"}),
    )


def head_attention(s: Shape, T: int, target: Target) -> Iterator[Case]:
    """One sequence at every width; a ragged batch, and a sequence, whose parts have their own; one with a window."""
    M = s.H // s.G

    def make(**tensors: Tensor) -> Callable[[], SimpleNamespace]:
        return lambda: SimpleNamespace(
            q=target.randn(T, s.H, s.D),
            k=target.randn(T, s.G, s.D),
            v=target.randn(T, s.G, s.D),
            **{name: tensor.clone() for name, tensor in tensors.items()},
        )

    def case(name: str, extent: str, share: float, pairs: float, **more) -> Case:
        """`pairs`: of a query head and a key that it sees, in all."""
        return Case(
            f"{name} G={s.G} H={s.H} D={s.D}",
            T,
            extent,
            share,
            4 * s.D * pairs,
            _size(target) * 2 * T * s.D * share * s.G * (M + 1),
            leaves=("q", "k", "v"),
            **more,
        )

    for g in _groups(s):
        yield case(
            "causal",
            f"{g / s.G:.3g}",
            g / s.G,
            T * T / 2 * g * M,
            make=make(),
            ours=lambda i, g=g: ops.head_attention(i.q, i.k, i.v, g),
            rivals={"sdpa": lambda i, g=g: _sdpa(i.q, i.k, i.v, g, causal=True)},
        )
    widths = _groups(s)
    if len(widths) == 1 or len(widths) > T:
        return
    length = T // len(widths)
    ends = torch.arange(len(widths) + 1) * length
    ends[-1] = T
    spans = [slice(*span) for span in itertools.pairwise(ends.tolist())]
    share = sum(widths) / len(widths) / s.G
    yield case(
        f"causal B={len(widths)}",
        "mix",
        share,
        sum((span.stop - span.start) ** 2 / 2 * g * M for span, g in zip(spans, widths, strict=True)),
        make=make(ends=ends.to(target.device), extents=torch.tensor(widths, device=target.device)),
        ours=lambda i: ops.head_attention(
            i.q, i.k, i.v, s.G, extent=i.extents, cu_seqlens_q=i.ends, cu_seqlens_k=i.ends
        ),
        rivals={"sdpa apart": lambda i: _apart(i.q, i.k, i.v, list(zip(spans, widths, strict=True)))},
    )
    tokens = torch.tensor(widths)[(torch.arange(T) % len(widths))[torch.randperm(T)]].to(target.device)
    yield case(
        "causal, per token",
        "mix",
        share,
        T * T / 2 * share * s.G * M,
        make=make(extents=tokens),
        ours=lambda i: ops.head_attention(i.q, i.k, i.v, s.G, extent=i.extents, extent_per="token"),
        rivals={
            "masked sdpa": lambda i: _sdpa(i.q, i.k, i.v, s.G, causal=True).masked_fill(
                _beyond(i.extents, s.G).repeat_interleave(M, 1)[:, :, None], 0
            )
        },
    )
    if T > 2:
        window = max(T // 4, 2)
        yield case(
            f"causal, window {window}",
            "1",
            1.0,
            (window * T - window * window / 2) * s.H,
            make=make(mask=_before(T, target.device) < window),
            ours=lambda i: ops.head_attention(i.q, i.k, i.v, s.G, window=window),
            rivals={"sdpa with a mask": lambda i: _masked(i.q, i.k, i.v, i.mask)},
        )


def head_attention_decode(s: Shape, T: int, target: Target) -> Iterator[Case]:
    """T is the length of the cache here: one new token of each sequence attends to all of its own."""
    M = s.H // s.G

    def case(B: int, extent: str, widths: list[int], page: int, ours: Run, rival: tuple[str, Run]) -> Case:
        def make() -> SimpleNamespace:
            i = SimpleNamespace(
                q=target.randn(B, 1, s.H, s.D),
                k=target.randn(B, T, s.G, s.D),
                v=target.randn(B, T, s.G, s.D),
                seqlens=torch.full((B,), T, device=target.device),
                extents=torch.tensor(widths, device=target.device),
            )
            if page:
                columns = T // page
                i.table = torch.randperm(B * columns, device=target.device).view(B, columns)
                i.k_pages, i.v_pages = (
                    torch.empty(B * columns, page, s.G, s.D, dtype=target.dtype, device=target.device)
                    for _ in range(2)
                )
                i.k_pages[i.table] = i.k.view(B, columns, page, s.G, s.D)
                i.v_pages[i.table] = i.v.view(B, columns, page, s.G, s.D)
            return i

        share = sum(widths) / len(widths) / s.G
        layout = f"pages of {page}" if page else "cache"
        return Case(
            f"{layout} B={B} G={s.G} H={s.H} D={s.D}",
            T,
            extent,
            share,
            4 * T * s.D * B * share * s.H,
            _size(target) * 2 * s.D * B * share * s.G * (T + M),
            make,
            ours,
            dict([rival]),
        )

    def views(i: SimpleNamespace, g: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (i.q[:, :, : g * M], i.k[:, :, :g], i.v[:, :, :g]))
        return _attend(q, k, v, causal=False).transpose(1, 2)

    widths = _groups(s)
    for B, page in ((1, 0), (16, 0), (16, 16), (16, 64)):
        if page and T % page:
            continue
        for g in widths if not page else (s.G,):

            def ours(i: SimpleNamespace, g: int = g, page: int = page) -> Tensor:
                caches = (i.k_pages, i.v_pages) if page else (i.k, i.v)
                table = {"block_table": i.table} if page else {}
                return ops.head_attention_decode(i.q, *caches, i.seqlens, g, **table)

            rival = "sdpa" if not page else "sdpa on a contiguous cache"
            share = f"{g / s.G:.3g}"
            yield case(B, share, [g], page, ours, (rival, lambda i, g=g: views(i, g)))
    if len(widths) > 1:
        mixed = [widths[b % len(widths)] for b in range(16)]
        yield case(
            16,
            "mix",
            mixed,
            0,
            lambda i: ops.head_attention_decode(i.q, i.k, i.v, i.seqlens, s.G, extent=i.extents),
            (
                "masked sdpa",
                lambda i: views(i, s.G).masked_fill(
                    _beyond(i.extents, s.G).repeat_interleave(M, 1)[:, None, :, None], 0
                ),
            ),
        )


def decoder_step(s: Shape, T: int, target: Target) -> Iterator[Case]:
    """T is the length of the cache here: one new token through one layer, and to 4 K logits."""
    if target.device != "cpu":
        return
    M, logits, eps = s.H // s.G, 4 * s.K, 1e-5
    of_model, of_layer = (
        ("embedding", "norm", "head"),
        ("in_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"),
    )
    shape = ops.DecoderShape(1, s.neurons, s.H, s.G, s.D, eps)

    def make() -> SimpleNamespace:
        weights = dict(
            q=(s.H * s.D, s.K), k=(s.G * s.D, s.K), v=(s.G * s.D, s.K), o=(s.K, s.H * s.D),
            gate=(s.neurons, s.K), up=(s.neurons, s.K), down=(s.K, s.neurons), head=(logits, s.K),
        )  # fmt: skip
        w = {name: target.randn(*size, scale=size[1] ** -0.5) for name, size in weights.items()}
        w |= {name: 1 + target.randn(s.K, scale=0.1) for name in ("in_norm", "mlp_norm", "norm")}
        w["embedding"] = target.randn(logits, s.K)
        angle = torch.rand(1, 1, s.D // 2).repeat(1, 1, 2)
        return SimpleNamespace(
            **w,
            decoder=ops.Decoder({n: w[n] for n in of_model} | {n: [w[n]] for n in of_layer}, shape),
            ids=torch.randint(0, logits, (1, 1)),
            cos=angle.cos().to(target.dtype),
            sin=angle.sin().to(target.dtype),
            keys=target.randn(1, T + 1, s.G, s.D),
            values=target.randn(1, T + 1, s.G, s.D),
        )

    def ours(i: SimpleNamespace, width: int, g: int) -> Tensor:
        step = ops.DecoderStep([width], [g], [g])
        return i.decoder.step(i.ids, i.cos, i.sin, [i.keys], [i.values], T, step)[0]

    def views(i: SimpleNamespace, width: int, g: int) -> Tensor:
        def heads(weight: Tensor, n: int) -> Tensor:
            return F.linear(h, weight[: n * s.D]).view(1, 1, n, s.D)

        def turn(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * i.cos[:, :, None] + torch.cat((-b, a), -1) * i.sin[:, :, None]

        x = i.embedding[i.ids]
        h = F.rms_norm(x, (s.K,), i.in_norm, eps)
        i.keys[:, T:, :g], i.values[:, T:, :g] = turn(heads(i.k, g)), heads(i.v, g)
        q, k, v = (t.transpose(1, 2) for t in (turn(heads(i.q, g * M)), i.keys[:, :, :g], i.values[:, :, :g]))
        x = x + F.linear(_attend(q, k, v, causal=False).transpose(1, 2).flatten(2), i.o[:, : g * M * s.D])
        h = F.rms_norm(x, (s.K,), i.mlp_norm, eps)
        x = x + F.linear(_swiglu(F.linear(h, i.gate[:width]), F.linear(h, i.up[:width])), i.down[:, :width])
        return F.linear(F.rms_norm(x, (s.K,), i.norm, eps), i.head)

    for share in WIDTHS:
        width, g = _width(s.neurons, share), max(1, round(s.G * share))
        weights = s.K * (3 * width + 2 * g * s.D * (M + 1) + logits)
        yield Case(
            f"layer K={s.K} F={s.neurons} G={s.G} H={s.H} D={s.D}",
            T,
            f"{share:.3g}",
            share,
            2 * weights,
            _size(target) * (weights + 2 * T * g * s.D),
            make,
            lambda i, width=width, g=g: ours(i, width, g),
            {"torch on views": lambda i, width=width, g=g: views(i, width, g)},
        )


def packed_linear(s: Shape, T: int, target: Target) -> Iterator[Case]:
    """The widths of elastic_linear, panels in each format; what it rounds, the rivals have rounded."""
    for packed, share in itertools.product(PACKED, WIDTHS):
        n = _width(s.K, share)

        def make(packed: str | None = packed) -> SimpleNamespace:
            w = _as_packed(target.randn(s.K, s.K, scale=s.K**-0.5), packed)
            panels = ops.pack_linear(w, format=packed)
            x = target.randn(T, s.K)
            read = reference.quantised(x) if panels.format.quantised else x
            return SimpleNamespace(x=x, read=read, w=w, w32=w.float(), panels=panels)

        yield Case(
            f"out {s.K}x{s.K}{', ' + packed if packed else ''}",
            T,
            f"{share:g}",
            n / s.K,
            2 * T * s.K * n,
            _bytes_of(packed, target) * n * s.K + _size(target) * T * (s.K + n),
            make,
            lambda i, n=n: ops.packed_linear(i.x, *i.panels, None, s.K, n),
            {
                "views": lambda i, n=n: F.linear(i.read, i.w[:n]),
                "views, float32": lambda i, n=n: F.linear(i.read.to(i.w32.dtype), i.w32[:n]),
            },
        )


def packed_mlp(s: Shape, T: int, target: Target) -> Iterator[Case]:
    """The widths of elastic_mlp, packed likewise, and a width for each token."""

    def views(x: Tensor, weights: tuple[Tensor, ...], d: int) -> Tensor:
        gate, up, down = weights
        return F.linear(_swiglu(F.linear(x, gate[:d]), F.linear(x, up[:d])), down[:, :d])

    def plain(i: SimpleNamespace) -> tuple[Tensor, ...]:
        return i.gate, i.up, i.down

    def wide(i: SimpleNamespace) -> tuple[Tensor, ...]:
        return i.gate32, i.up32, i.down32

    def make(packed: str | None, extents: Tensor | None = None) -> SimpleNamespace:
        gate, up, down = (
            _as_packed(target.randn(*shape, scale=shape[1] ** -0.5), packed)
            for shape in ((s.neurons, s.K), (s.neurons, s.K), (s.K, s.neurons))
        )
        i = SimpleNamespace(x=target.randn(T, s.K), gate=gate, up=up, down=down, extents=_copy(extents))
        i.gate32, i.up32, i.down32 = gate.float(), up.float(), down.float()
        i.panels = ops.pack_mlp(gate, up, down, packed)
        return i

    def ours(i: SimpleNamespace, d: int) -> Tensor:
        return ops.packed_mlp(i.x, *i.panels, None, None, None, d, s.K, extent=i.extents)

    for packed, share in itertools.product((None, "int8"), WIDTHS):
        d = _width(s.neurons, share)
        yield Case(
            f"swiglu {s.K}x{s.neurons}{', ' + packed if packed else ''}",
            T,
            f"{share:g}",
            d / s.neurons,
            6 * T * s.K * d,
            _bytes_of(packed, target) * 3 * s.K * d + _size(target) * 2 * T * s.K,
            lambda packed=packed: make(packed),
            lambda i, d=d: ours(i, d),
            {
                "views": lambda i, d=d: views(i.x, plain(i), d),
                "views, float32": lambda i, d=d: views(i.x.to(i.gate32.dtype), wide(i), d),
            },
        )
    if len(WIDTHS) > T:
        return
    widths, extents = _mix(s.neurons, T, target)
    counts = _counts(widths, extents)

    def masked(i: SimpleNamespace) -> Tensor:
        h = _swiglu(F.linear(i.x, i.gate), F.linear(i.x, i.up))
        return F.linear(h.masked_fill(_beyond(i.extents, s.neurons), 0), i.down)

    def buckets(i: SimpleNamespace, weights: tuple[Tensor, ...]) -> Tensor:
        x = i.x.to(weights[0].dtype)
        return _in_buckets(x, i.extents, lambda rows, d: views(rows, weights, d), widths, counts)

    yield Case(
        f"swiglu {s.K}x{s.neurons}",
        T,
        "mix",
        int(extents.sum()) / (T * s.neurons),
        6 * s.K * int(extents.sum()),
        _size(target) * (3 * s.K * int(extents.max()) + 2 * T * s.K),
        lambda: make(None, extents),
        lambda i: ours(i, s.neurons),
        {
            "masked dense": masked,
            "buckets": lambda i: buckets(i, plain(i)),
            "buckets, float32": lambda i: buckets(i, wide(i)),
        },
    )


def _bytes_of(packed: str | None, target: Target) -> float:
    """Of a weight in panels of this format, with its share of a group's scale."""
    if packed is None:
        return _size(target)
    return {"int8": 1, "w8a8": 1, "int4": 5 / 8}[packed]


def _as_packed(w: Tensor, packed: str | None) -> Tensor:
    """The weight that panels of this format stand for, in its own dtype."""
    if packed is None:
        return w
    panels, scales, format = ops.pack_linear(w, format=packed)
    return reference._unpacked(panels, scales, format, torch.float32)[: len(w), : w.shape[1]].to(w.dtype)


def prefix_gate(s: Shape, T: int, target: Target) -> Iterator[Case]:
    """The worked example of docs/add-an-op.md: bound by the bytes that it moves."""
    _, extents = _mix(s.K, T, target)
    kept = sum(extents.tolist())
    yield Case(
        f"{s.K}",
        T,
        "mix",
        kept / (T * s.K),
        kept,
        _size(target) * (kept + T * s.K),
        lambda: SimpleNamespace(
            x=target.randn(T, s.K), gate=torch.rand(T, device=target.device), extents=_copy(extents)
        ),
        lambda i: ops.prefix_gate(i.x, i.gate, i.extents),
        {"masked": lambda i: (i.gate[:, None] * i.x).to(i.x.dtype).masked_fill(_beyond(i.extents, s.K), 0)},
        ("x", "gate"),
    )


def route(s: Shape, T: int, target: Target) -> Iterator[Case]:
    C = len(WIDTHS)
    yield Case(
        f"C={C}",
        T,
        "1",
        1.0,
        C * T,
        T * (C * _size(target) + 2 * 8),
        lambda: SimpleNamespace(logits=target.randn(T, C)),
        lambda i: ops.route(i.logits)[1],
        {"argmax, argsort": lambda i: i.logits.argmax(1).argsort(descending=True, stable=True)},
    )


BENCHES = {
    f.__name__: f
    for f in (
        elastic_linear,
        elastic_mlp,
        packed_linear,
        packed_mlp,
        head_attention,
        head_attention_decode,
        decoder_step,
        prefix_gate,
        route,
    )
}
CPU_ALONE = ("packed_linear", "packed_mlp")

DIFFERENTIABLE = ("elastic_linear", "elastic_mlp", "head_attention", "prefix_gate")


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _size(target: Target) -> int:
    return target.dtype.itemsize


def _copy(extents: Tensor | None) -> Tensor | None:
    return None if extents is None else extents.clone()


def _width(full: int, share: float) -> int:
    return round(full * share / 8) * 8


def _groups(s: Shape) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(s.G * share)) for share in WIDTHS}, reverse=True))


def _mix(full: int, T: int, target: Target) -> tuple[list[int], Tensor]:
    """The widths, ascending, and one of them for each token: as many of each as there can be, shuffled."""
    widths = sorted(_width(full, share) for share in WIDTHS)
    choice = torch.arange(T) % len(widths)
    return widths, torch.tensor(widths)[choice[torch.randperm(T)]].to(target.device)


def _counts(widths: list[int], extents: Tensor) -> list[int]:
    return [int((extents == d).sum()) for d in widths]


def _rows_of_blocks(counts: list[int]) -> list[int]:
    """How many of the sorted tokens need column block c: those of its width and of every wider one."""
    return [sum(counts[c:]) for c in range(len(counts))]


def _blocks(w: Tensor, widths: list[int]) -> Tensor:
    return torch.stack(w.chunk(len(widths)))


def _beyond(extents: Tensor, full: int) -> Tensor:
    return torch.arange(full, device=extents.device) >= extents[:, None]


def _in_buckets(
    x: Tensor,
    extents: Tensor,
    run: Callable[[Tensor, int], Tensor],
    widths: list[int],
    counts: list[int] | None = None,
) -> Tensor:
    """Sorted by width, each bucket by itself, put back; without counts they are read from the device."""
    order = extents.argsort(stable=True)
    if counts is None:
        counts = torch.stack([(extents == d).sum() for d in widths]).tolist()
    parts = [run(rows, d) for rows, d in zip(x[order].split(counts), widths, strict=True) if len(rows)]
    y = torch.cat(parts)
    return torch.empty_like(y).index_copy(0, order, y)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, g: int, causal: bool) -> Tensor:
    """The first ``g`` groups of [T, H, D] through torch's attention; no zeros for the others."""
    heads = g * q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q[:, :heads], k[:, :g], v[:, :g]))
    return _attend(q, k, v, causal)[0].transpose(0, 1)


def _before(T: int, device: str) -> Tensor:
    """[T, T]: how far a key lies before a query; more than any window where it lies behind it."""
    place = torch.arange(T, device=device)
    before = place[:, None] - place
    return torch.where(before < 0, T, before)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """All heads of [T, H, D], where query and key are those of the mask [T, S]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)


def _apart(q: Tensor, k: Tensor, v: Tensor, parts: list[tuple[slice, int]]) -> Tensor:
    """Each span of the tokens by itself, with its own number of groups; zeros for the others."""
    y = torch.zeros_like(q)
    for span, g in parts:
        part = _sdpa(q[span], k[span], v[span], g, causal=True)
        y[span, : part.shape[1]] = part
    return y


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[B, H, T, D] with [B, G, S, D]."""
    if q.dtype == torch.float64:  # head by head: all scores of all heads need not fit into memory
        of = q.shape[1] // k.shape[1]
        heads = [
            F.scaled_dot_product_attention(
                *(x[:, [h]] for x, h in ((q, h), (k, h // of), (v, h // of))), is_causal=causal
            )
            for h in range(q.shape[1])
        ]
        return torch.cat(heads, 1)
    # Its own choice on a Hopper GPU may be a kernel at half cuDNN's speed; cuDNN has none for float64.
    cudnn = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if cudnn else list(_BACKENDS)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


# ---- what is timed


def with_gradients(run: Run, leaves: tuple[str, ...]) -> Run:
    """Forward and backward: returns the gradient of the first leaf, having made all of them."""

    def both(i: SimpleNamespace) -> Tensor:
        wanted = [getattr(i, name).detach().requires_grad_() for name in leaves]
        y = run(SimpleNamespace(**{**vars(i), **dict(zip(leaves, wanted, strict=True))}))
        dy = i.dy[tuple(slice(n) for n in y.shape)]  # a rival may leave out what is zero
        return torch.autograd.grad(y, wanted, dy)[0]

    return both


def candidates(case: Case, target: Target) -> dict[str, Run]:
    """ "ours" and every rival, with their gradients where those are timed."""
    runs = {"ours": case.ours, **case.rivals}
    if not target.backward:
        return runs
    return {name: with_gradients(run, case.rival_leaves.get(name, case.leaves)) for name, run in runs.items()}


def draw(case: Case, target: Target) -> SimpleNamespace:
    """The tensors of one call, and the gradient of its result."""
    i = case.make()
    if target.backward:
        i.dy = target.randn(*case.ours(i).shape)
    return i


def verify(case: Case, target: Target) -> None:
    """Every candidate computes the same: ours as well as plain PyTorch, with float64 for the truth."""
    i = draw(case, target)
    runs = candidates(case, target)
    name = next(iter(case.rivals))
    ours = runs["ours"](i)
    results = {rival: _with_zeros(run(i), ours) for rival, run in runs.items()}
    plain = results[name]
    if not ours.is_floating_point():
        assert torch.equal(ours, plain), f"{case.shape}: ours must equal {name}, got something else"
        return
    wide = {
        key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in vars(i).items()
    }
    exact = _with_zeros(runs[name](SimpleNamespace(**wide)), ours)
    assert_no_worse(ours, plain, exact, f"{case.shape}, {case.tokens} tokens, extent {case.extent}")
    for rival, result in results.items():
        error = torch.linalg.vector_norm(result.double() - exact) / torch.linalg.vector_norm(exact)
        assert error < RIVAL_ERROR[target.dtype], (
            f"{case.shape}: {rival} must be right, its error is {error:.1e}"
        )


def _with_zeros(result: Tensor, ours: Tensor) -> Tensor:
    """In the shape of ours: zeros for the heads that a rival left out."""
    return F.pad(
        result, [n for a, b in zip(ours.shape[::-1], result.shape[::-1], strict=True) for n in (0, a - b)]
    )


def prepare(case: Case, target: Target, use_graphs: bool) -> tuple[dict[str, Callable[[], object]], int, str]:
    """name -> a callable to time, how many calls of the op it makes, and "graph" or "eager"."""
    runs = candidates(case, target)
    if target.device == "cpu":
        sets = [draw(case, target) for _ in range(max(1, min(MAX_SETS, int(CPU_SETS // max(1, case.bytes)))))]
        return {name: _each(run, sets) for name, run in runs.items()}, len(sets), "eager"
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [draw(case, target) for _ in range(max(2, min(MAX_SETS, -int(-5 * cache // max(1, case.bytes)))))]
    prepared: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        every = _each(run, sets)
        prepared[name] = _graph(every) if use_graphs and name not in case.waits else every
    return prepared, len(sets), "graph" if use_graphs else "eager"


def _each(run: Run, sets: list[SimpleNamespace]) -> Callable[[], None]:
    def every() -> None:
        for i in sets:
            run(i)

    return every


def _graph(run: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Ceilings:
    """What this machine does in this run: operations and bytes a second."""

    flops: float
    bytes: float


def ceilings(target: Target, rounds: int, seconds: float) -> Ceilings:
    """A large square matmul, and the bytes of a large copy, read and written, or on a CPU those of a sum, read.

    The matmul is in the dtype, on a CPU in float32: its 16-bit one is far from what the processor can do.
    """
    on_gpu = target.device == "cuda"
    n = 8192 if on_gpu else 1024
    matmul = target if on_gpu else replace(target, dtype=torch.float32)
    a, b = matmul.randn(n, n), matmul.randn(n, n)
    source = torch.empty(n * n * (16 if on_gpu else 32), device=target.device).normal_()
    copy = torch.empty_like(source) if on_gpu else source
    clock = device_clock if on_gpu else wall_clock
    move = (lambda: copy.copy_(source)) if on_gpu else source.sum
    time = bench({"matmul": lambda: a @ b, "move": move}, rounds, seconds, clock=clock)
    return Ceilings(
        2 * n**3 / time["matmul"].median, (2 if on_gpu else 1) * source.nbytes / time["move"].median
    )


def _of_full(row: Row, full_us: float) -> Row:
    return replace(row, of_full=row.time_us / full_us)


def measure(
    op: str, case: Case, target: Target, machine: Machine, top: Ceilings, args: argparse.Namespace
) -> list[Row]:
    prepared, calls, mode = prepare(case, target, not args.eager)
    clock = device_clock if target.device == "cuda" else wall_clock
    time = bench(prepared, args.rounds, args.seconds, clock=clock)
    ours = time["ours"].median / calls
    passes = 3 if target.backward else 1  # two GEMMs backward for every one forward
    bound_by_bytes = not target.backward and case.bytes / top.bytes > case.flops / top.flops
    if bound_by_bytes:
        rate, ceiling, unit = case.bytes / ours / 1e9, top.bytes / 1e9, "GB/s"
    else:
        rate, ceiling, unit = passes * case.flops / ours / 1e12, top.flops / 1e12, "TFLOP/s"
    rows = []
    for rival in case.rivals:
        theirs = time[rival].median / calls
        rows.append(
            Row(
                op=f"{op}+backward" if target.backward else op,
                device=machine.device,
                arch=machine.arch,
                dtype=str(target.dtype).removeprefix("torch."),
                shape=case.shape,
                tokens=case.tokens,
                extent=case.extent,
                share=case.share,
                time_us=ours * 1e6,
                rate=rate,
                rate_unit=unit,
                ceiling=ceiling,
                rival=rival,
                rival_time_us=theirs * 1e6,
                ratio=theirs / ours,
                spread=max(time["ours"].spread, time[rival].spread),
                of_full=None,
                mode=mode,
                commit=machine.commit,
            )
        )
    return rows


# ---- what is printed and written


@dataclass(frozen=True)
class Machine:
    """What the figures belong to."""

    device: str
    arch: str
    commit: str
    clocks: str

    @classmethod
    def here(cls, target: Target) -> Machine:
        commit = os.environ.get("FLEXTRON_COMMIT") or _output("git", "describe", "--always", "--dirty")
        if target.device == "cpu":
            return cls(processor(), platform.machine(), commit or "unknown", "")
        major, minor = torch.cuda.get_device_capability()
        forced = os.environ.get("FLEXTRON_ARCH")
        arch = f"sm_{major}{minor}" + (f" as sm_{forced}" if forced and forced != f"{major}{minor}" else "")
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,driver_version"
        clocks = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        return cls(
            torch.cuda.get_device_name(), arch, commit or "unknown", clocks.splitlines()[0] if clocks else ""
        )


def _output(*command: str) -> str:
    """What the command prints, and nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def header(machine: Machine, target: Target, top: Ceilings) -> str:
    where = machine.arch if target.device == "cuda" else f"{torch.get_num_threads()} threads"
    lines = [
        f"{machine.device}, {where}, {str(target.dtype).removeprefix('torch.')}, torch {torch.__version__}, "
        f"commit {machine.commit}, build {ops.build_info()}",
        f"ceilings in this run: {top.flops / 1e12:.3g} TFLOP/s in a matmul, {top.bytes / 1e9:.4g} GB/s in a "
        f"{'copy' if target.device == 'cuda' else 'sum'}",
    ]
    if machine.clocks:
        lines.append(
            f"SM clock, memory clock, highest SM clock, power, temperature, driver: {machine.clocks}"
        )
    return "\n".join(lines)


def columns() -> str:
    return (
        f"{'op':<26}{'shape':<34}{'tokens':>7}{'extent':>7}{'us':>10}{'of full':>8}{'rate':>10} {'unit':<8}"
        f"{'of peak':>7}{'spread':>8}  rivals: us, ratio of theirs to ours"
    )


def line(rows: list[Row]) -> str:
    r = rows[0]
    full = f"{r.of_full:>8.3f}" if r.of_full is not None else " " * 8
    rivals = "; ".join(f"{x.rival} {x.rival_time_us:.1f}, {x.ratio:.2f}" for x in rows)
    return (
        f"{r.op:<26}{r.shape:<34}{r.tokens:>7}{r.extent:>7}{r.time_us:>10.1f}{full}{r.rate:>10.4g} {r.rate_unit:<8}"
        f"{r.rate / r.ceiling:>7.1%}{max(x.spread for x in rows):>8.1%}  {rivals}"
    )


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in fields(Row))
        for row in rows:
            writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in astuple(row))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Time over the time at full width against the width, and the line that cost in proportion would follow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["of_full"]]
    panels: dict[tuple[str, ...], dict[int, dict[float, tuple[float, float, str]]]] = {}
    for row in rows:
        lines = panels.setdefault(tuple(row[key] for key in ("op", "shape", "arch", "dtype")), {})
        points = lines.setdefault(int(row["tokens"]), {})
        full = float(row["time_us"]) / float(row["of_full"])
        best = min(
            points.get(float(row["share"]), (0, float("inf"), ""))[1], float(row["rival_time_us"]) / full
        )
        # A mix is beside the line of the single widths: it is drawn a hair to the right of its mean.
        share = float(row["share"]) + (1e-3 if row["extent"] == "mix" else 0)
        points[share] = float(row["of_full"]), best, row["extent"]
    panels = {
        key: lines for key, lines in panels.items() if any(len(points) > 1 for points in lines.values())
    }
    if not panels:
        raise SystemExit("bench_ops: a plot must have an op with several widths, got none")
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        axis.plot((0, 1), (0, 1), color="gray", linewidth=1, label="ideal")
        for tokens, points in sorted(lines.items()):
            single = sorted((share, *point) for share, point in points.items() if point[2] != "mix")
            (drawn,) = axis.plot(
                [p[0] for p in single], [p[1] for p in single], "o-", label=f"{tokens} tokens"
            )
            axis.plot([p[0] for p in single], [p[2] for p in single], ":", color=drawn.get_color())
            for share, (time, _, extent) in points.items():
                if extent == "mix":
                    axis.plot(share, time, "x", color=drawn.get_color())
        axis.set(title=", ".join(title), xlabel="width, of full", ylabel="time, of ours at full width")
        axis.legend(fontsize="small", title="dotted: best rival, x: per token", title_fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- the command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1], allow_abbrev=False
    )
    listed = lambda names: lambda text: _chosen(parser, names, text)  # noqa: E731
    numbers = lambda text: tuple(int(n) for n in text.split(","))  # noqa: E731
    parser.add_argument(
        "--op", type=listed(BENCHES), default=list(BENCHES), help="comma-separated; all by default"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", type=listed(SHAPES), default=["smollm2"], help=f"comma-separated, of {', '.join(SHAPES)}"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--tokens", type=numbers, help="comma-separated")
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--eager", action="store_true", help="on a GPU too: no graphs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="least length of a sample")
    parser.add_argument("--no-wait", action="store_true", help="time at once, whatever else runs")
    parser.add_argument("--csv", type=Path, help="where the figures go")
    parser.add_argument("--plot", type=Path, help="where a drawing of time against width goes")
    parser.add_argument("--read", type=Path, help="measure nothing: plot this CSV file")
    args = parser.parse_args(arguments)
    if args.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {args.rounds}")
    if args.read and not args.plot:
        parser.error("--plot must be given with --read, got none")
    if args.device == "cuda" and not args.read and not torch.cuda.is_available():
        parser.error("--device must be cpu where torch sees no GPU, got cuda")
    return args


def _chosen(parser: argparse.ArgumentParser, names: dict[str, object], text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"each must be one of {', '.join(names)}, got {', '.join(unknown)}")
    return chosen


def cases(args: argparse.Namespace, target: Target) -> Iterator[tuple[str, Case]]:
    names = [
        name
        for name in args.op
        if (not target.backward or name in DIFFERENTIABLE)
        and (target.device == "cpu" or name not in CPU_ALONE)
    ]
    for shape, name in itertools.product(args.shapes, names):
        for tokens in args.tokens or TOKENS[target.device]:
            for case in BENCHES[name](SHAPES[shape], tokens, target):
                yield name, case


def run(args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    target = Target(args.device, DTYPES[dtype], args.backward)
    if not args.no_wait:
        wait_until_idle()
    top = ceilings(target, args.rounds, args.seconds)
    machine = Machine.here(target)
    print(header(machine, target, top))
    print(columns())
    rows: list[Row] = []
    full: dict[tuple[str, str, int], float] = {}
    with torch.set_grad_enabled(target.backward):
        for name, case in cases(args, target):
            try:
                verify(case, target)
            except NotImplementedError as error:
                print(f"{name:<26}{case.shape:<34}{case.tokens:>7}{case.extent:>7}  {error}")
                continue
            found = measure(name, case, target, machine, top, args)
            key = (found[0].op, case.shape, case.tokens)
            if case.share == 1:
                full.setdefault(key, found[0].time_us)
            if key in full:
                found = [_of_full(row, full[key]) for row in found]
            rows += found
            print(line(found), flush=True)
            if args.csv:
                write_csv(args.csv, rows)  # after every case: what is cut short leaves what it had
    return rows


def main() -> None:
    args = parse()
    if args.read is None:
        rows = run(args)
        drawn = [{f.name: getattr(row, f.name) for f in fields(Row)} for row in rows]
    else:
        drawn = read_csv(args.read)
    if args.plot:
        plot(drawn, args.plot)


if __name__ == "__main__":
    main()
