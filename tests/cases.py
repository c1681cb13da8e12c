"""One row per op: its inputs, awkward ones included, by argument name. They feed test_ops.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import flextron_ext
from flextron_ext import Decoder, DecoderRouter, DecoderShape, DecoderStep, pack_linear, pack_mlp

Inputs = Callable[[str, torch.dtype], Iterator[dict[str, Any]]]
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class OpCase:
    name: str
    inputs: Inputs
    dtypes: tuple[torch.dtype, ...] = FLOATING
    differentiable: bool = True
    devices: tuple[str, ...] = ("cpu",)  # where the op has kernels

    @property
    def wrapper(self) -> Callable[..., Any]:
        """The typed function for the op, under the op's own argument names."""
        return step_of_decoder if self.name == "decoder_step" else getattr(flextron_ext, self.name)


def taken(case: dict[str, Any]) -> dict[str, Any]:
    """The inputs as the op itself takes them: a decoder by its number."""
    return {name: value.number if isinstance(value, Decoder) else value for name, value in case.items()}


def step_of_decoder(
    held: Decoder, widths, heads, kv_heads, router=None, mlp_choices=None, head_choices=None, **call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Decoder.step` under the argument names of the op decoder_step."""
    chosen = None if router is None else DecoderRouter(router, mlp_choices, head_choices)
    return held.step(**call, step=DecoderStep(widths, heads, kv_heads, chosen))


def elastic_linear(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def case(T, K, N, in_features, out_features, ib=1, ob=1, bias=True, transpose=False, **extents):
        x = torch.randn(ib * K, T, device=device, dtype=dtype).T if transpose else None
        return dict(
            x=torch.randn(T, ib * K, device=device, dtype=dtype) if x is None else x,
            weight=torch.randn(ob * N, ib * K, device=device, dtype=dtype),
            bias=torch.randn(ob * N, device=device, dtype=dtype) if bias else None,
            in_features=in_features,
            out_features=out_features,
            in_blocks=ib,
            out_blocks=ob,
            **extents,
        )

    def per_token(T, high):
        return torch.randint(0, high + 1, (T,), device=device)

    yield case(1, 1, 1, 1, 1)
    yield case(7, 33, 17, 33, 17)  # full extent: plain linear
    yield case(64, 96, 64, 32, 48, transpose=True)
    yield case(5, 12, 10, 8, 6, ib=3, ob=2)
    yield case(5, 12, 10, 12, 10, ib=3, ob=4, bias=False)
    yield case(9, 16, 24, 16, 24, in_extent=per_token(9, 16))
    yield case(9, 16, 24, 12, 20, ib=2, out_extent=per_token(9, 20).int())
    yield case(9, 16, 24, 12, 20, ib=2, ob=3, in_extent=per_token(9, 12))
    yield case(4, 16, 24, 16, 24, ob=2, out_extent=torch.tensor([5], device=device))
    yield case(4, 16, 24, 16, 24, in_extent=torch.tensor([0], device=device, dtype=torch.int32))
    yield case(0, 16, 24, 16, 24, out_extent=per_token(0, 24))
    yield case(3, 16, 24, 0, 24)
    yield case(3, 16, 24, 16, 0)


def elastic_mlp(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def case(T, K, F, width, activation="silu", gated=True, bias=False, N=None, transpose=False, **extra):
        def tensor(*shape, scale=1.0):
            return torch.randn(*shape, device=device, dtype=dtype) * scale

        N = K if N is None else N
        return dict(
            x=tensor(K, T).T if transpose else tensor(T, K),
            w_gate=tensor(F, K, scale=K**-0.5) if gated else None,
            w_up=tensor(F, K, scale=K**-0.5),
            w_down=tensor(N, F, scale=F**-0.5),
            b_gate=tensor(F, scale=0.25) if gated and bias else None,
            b_up=tensor(F, scale=0.25) if bias else None,
            b_down=tensor(N, scale=0.25) if bias else None,
            width=width,
            activation=activation,
            **extra,
        )

    def per_token(T, high):
        return torch.randint(0, high + 1, (T,), device=device)

    def gate(T, C, dtype=torch.float32):
        return torch.rand(T, C, device=device, dtype=dtype)

    yield case(1, 1, 1, 1)
    yield case(33, 48, 128, 128)  # full width: the plain MLP
    for activation in ("relu", "relu2", "gelu", "gelu_tanh", "silu"):
        yield case(17, 24, 40, 23, activation, bias=True, N=13)
        yield case(17, 24, 40, 23, activation, gated=False, transpose=True)
    yield case(29, 16, 64, 60, extent=per_token(29, 60), bias=True)
    yield case(29, 16, 64, 60, "gelu", gated=False, bias=True, extent=per_token(29, 60).int())
    yield case(8, 16, 64, 60, extent=torch.tensor([31], device=device))
    yield case(8, 16, 64, 60, extent=torch.tensor([0], device=device), bias=True)
    yield case(19, 16, 64, 64, gate=gate(19, 3), choices=[16, 40, 64], bias=True)
    yield case(19, 16, 64, 64, "relu2", gated=False, gate=gate(1, 2, dtype), choices=[8, 32])
    yield case(0, 16, 64, 64, gate=gate(0, 2), choices=[8, 32])
    yield case(0, 16, 64, 64, extent=per_token(0, 64))
    yield case(5, 16, 64, 0, bias=True)


def packed_linear(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The rows of elastic_linear, their weights packed in their dtype and in every format that has scales."""
    for case in elastic_linear(device, dtype):
        weight, blocks = case.pop("weight"), case.pop("out_blocks")
        for packed in (None, "int8", "w8a8", "int4"):
            panels = pack_linear(weight, blocks, packed, case["in_blocks"])._asdict()
            yield dict(x=case["x"]) | panels | case


def packed_mlp(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The rows of elastic_mlp without a soft gate, packed likewise."""
    for case in elastic_mlp(device, dtype):
        if "gate" in case:
            continue
        w_gate, w_up, w_down = (case.pop(name) for name in ("w_gate", "w_up", "w_down"))
        # In float32 a hidden value beside the middle between two integers decides; test_packed_mlp.py has none there.
        quantised = () if dtype is torch.float32 else ("w8a8", "int4")
        for packed in (None, "int8", *quantised):
            panels = pack_mlp(w_gate, w_up, w_down, packed)._asdict()
            yield dict(x=case["x"], **panels, out_features=w_down.shape[0], gated=w_gate is not None) | case


def head_attention(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def tensor(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    def case(T, S, H, G, D, heads, unit="kv_group", **options):
        return dict(
            q=tensor(T, H, D), k=tensor(S, G, D), v=tensor(S, G, D), heads=heads, unit=unit, **options
        )

    def ints(*values):
        return torch.tensor(values, device=device, dtype=torch.int64)

    def per_token(T, high):
        return torch.randint(0, high + 1, (T,), device=device)

    ragged = dict(cu_seqlens_q=ints(0, 4, 4, 37, 40), cu_seqlens_k=ints(0, 9, 12, 12, 80).int())
    yield case(1, 1, 1, 1, 1, 1)
    yield case(70, 70, 9, 3, 16, 3)  # all heads: plain causal attention
    yield case(33, 65, 6, 2, 5, 1, causal=False)
    yield case(33, 65, 8, 2, 24, 3, unit="query", scale=0.3)
    yield case(20, 20, 6, 3, 8, 3, extent=per_token(20, 3), extent_per="token")
    yield case(20, 31, 7, 1, 8, 5, unit="query", extent=per_token(20, 5).int(), extent_per="token")
    yield case(40, 80, 6, 3, 8, 2, extent=ints(2, 1, 0, 1), k_start=ints(0, 1, 0, 70), **ragged)
    yield case(12, 12, 6, 3, 8, 3, index=ints(5, 0, 4))
    yield case(12, 12, 6, 3, 8, 3, extent=ints(1), k_start=ints(5).int())
    yield case(9, 4, 4, 2, 8, 2)  # the first queries see no key
    yield case(5, 0, 4, 2, 8, 2)
    yield case(5, 5, 4, 2, 8, 0)
    yield case(0, 5, 4, 2, 8, 2, extent=per_token(0, 2), extent_per="token")
    yield case(0, 0, 4, 2, 8, 2, cu_seqlens_q=ints(0), cu_seqlens_k=ints(0), extent=ints())
    strided = case(30, 30, 4, 2, 8, 2)
    yield strided | {name: strided[name].transpose(0, 2).contiguous().transpose(0, 2) for name in "qkv"}
    yield case(150, 170, 6, 3, 8, 2, window=9)  # blocks that begin behind the first keys
    yield case(
        9, 4, 4, 2, 8, 2, softcap=1.5, sinks=torch.randn(4, device=device)
    )  # a sink where no key is seen
    yield case(
        40, 80, 6, 3, 8, 2, "query", extent=per_token(40, 2), extent_per="token", k_start=ints(0, 1, 0, 30), **ragged,
        window=20, softcap=0.7, sinks=tensor(6),
    )  # fmt: skip


def head_attention_decode(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def tensor(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    def case(B, T, S, H, G, D, heads, seqlens, page=0, **options):
        cache = (B, S, G, D)
        if page:
            pages = -(-S // page)
            table = torch.randperm(B * pages + 2, device=device)[: B * pages].view(B, pages)
            cache, options["block_table"] = (B * pages + 2, page, G, D), table
        return dict(
            q=tensor(B, T, H, D),
            k_cache=tensor(*cache),
            v_cache=tensor(*cache),
            seqlens=seqlens,
            heads=heads,
            **options,
        )

    def ints(*values):
        return torch.tensor(values, device=device, dtype=torch.int64)

    yield case(1, 1, 1, 1, 1, 1, 1, ints(1))
    yield case(3, 1, 40, 9, 3, 16, 3, ints(40, 7, 1))
    yield case(2, 4, 33, 6, 2, 5, 1, ints(33, 4).int(), page=8)
    yield case(3, 2, 20, 8, 2, 24, 3, ints(20, 2, 9), page=5, unit="query", extent=ints(3, 0, 1))
    yield case(2, 1, 1100, 4, 2, 8, 2, ints(1100, 600), k_start=ints(0, 590))  # more keys than one split
    yield case(2, 40, 50, 4, 2, 8, 2, ints(50, 41), extent=ints(1))
    yield case(2, 20, 30, 4, 2, 8, 2, ints(17, 0), page=3)  # queries before the first key
    yield case(2, 1, 9, 4, 2, 8, 2, ints(9, 5), unit="query", scale=0.2)
    yield case(0, 1, 9, 4, 2, 8, 2, ints())
    yield case(2, 0, 9, 4, 2, 8, 2, ints(3, 9))
    yield case(2, 1, 0, 4, 2, 8, 2, ints(0, 0))
    yield case(2, 1, 9, 4, 2, 8, 0, ints(3, 9))
    shared = case(2, 1, 12, 4, 2, 8, 2, ints(12, 10), page=4)
    yield shared | dict(block_table=shared["block_table"][:1].expand(2, -1).contiguous())
    strided = case(2, 2, 12, 4, 2, 8, 2, ints(12, 10))
    yield strided | {
        name: strided[name].transpose(1, 3).contiguous().transpose(1, 3)
        for name in ("q", "k_cache", "v_cache")
    }
    yield case(2, 1, 1100, 24, 2, 8, 2, ints(1100, 600), window=530, sinks=torch.randn(24, device=device))
    yield case(2, 40, 50, 4, 2, 8, 2, ints(50, 17), window=5, k_start=ints(0, 9))  # more queries than a block
    yield case(2, 3, 33, 6, 2, 16, 1, ints(33, 2), page=8, softcap=1.5, window=9, sinks=tensor(6))


_BEFORE = ("in_norm", "mlp_norm")
# What a `DecoderShape` may say beyond Llama's, and which norms a layer has: the last cases of decoder_step.
DECODER_KINDS: tuple[dict[str, Any], ...] = (
    dict(kind=dict(embedding_scale=3.0, residual_scale=0.4, logit_scale=0.5)),
    dict(kind=dict(norms="rms+1", logit_cap=0.7, embedding_scale=24**0.5), head_norm=True, norm_bias=True),
    dict(kind=dict(tables=[0, 1], gated=False), packed=None, activation="relu2", bias=True),
    dict(
        kind=dict(norms="layer"), norms_at=(*_BEFORE, "mlp_post"), head_norm=True, norm_bias=True, bias=True
    ),
    dict(kind=dict(norms="layer+1", gated=False, residual_scale=0.7), bias=True, activation="gelu_tanh"),
    dict(kind=dict(norms="layer", parallel=True), norms_at=("in_norm",), norm_bias=True, bias=True),
    dict(kind=dict(parallel=True, gated=False), packed="int8", unit="query"),
    dict(kind=dict(norms="rms+1"), norms_at=(*_BEFORE, "attention_post", "mlp_post"), packed=None),
    dict(norms_at=("attention_post", "mlp_post"), kind=dict(tables=[1, 0])),
    dict(kind=dict(windows=[3, 0], tables=[2, 1], softcap=1.5), R=4),
    dict(kind=dict(rotation="pairs"), R=6, head_norm=True),
    dict(kind=dict(norm_over="heads"), head_norm=True, norms_at=("attention_post", "mlp_post")),
    dict(
        kind=dict(norm_over="each", norms="layer", norm_last=True), head_norm=True, norm_bias=True, fused=True
    ),
    dict(kind=dict(norm_over="each", clip=0.6, rotation="pairs"), head_norm=True, unit="query", packed=None),
    dict(
        kind=dict(norm_over="heads", norms="rms+1"), head_norm=True, norm_bias=True, unit="query", packed=None
    ),
    dict(kind=dict(norm_last=True, clip=0.9), head_norm=True, fused=True, bias=True),
    dict(kind=dict(norm_over="heads"), head_norm=True, packed=None, kv=[2, 2]),
    dict(kind=dict(norms="layer", parallel=True), fused=True, unit="query", packed="int8", bias=True),
)


def is_routed(kind: int) -> bool:
    """Whether a router chooses in the case of this entry of `DECODER_KINDS`."""
    return kind % 3 == 2


def decoder_step(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """``held`` is a `Decoder`; `taken` makes it the number that the op takes."""

    def case(
        widths, heads, B=1, T=1, cached=5, H=4, G=2, D=8, K=24, F=40, R=None, unit="kv_group", kv=None, packed=False,
        bias=False, head_norm=False, room=0, eps=1e-6, tables=1, requests=0, activation="silu", scale=None, kind=None,
        norms_at=_BEFORE, norm_bias=False, fused=False, **options,
    ):  # fmt: skip
        def tensor(*shape, scale=1.0):
            return torch.randn(*shape, device=device, dtype=dtype) * scale

        kv_heads, R = kv or (heads if unit == "kv_group" else [G] * len(heads)), D if R is None else R
        shapes = dict(
            q=(H * D, K), k=(G * D, K), v=(G * D, K), o=(K, H * D), gate=(F, K), up=(F, K), down=(K, F)
        )
        if fused:
            shapes = dict(qkv=((H + 2 * G) * D, K)) | {
                name: shapes[name] for name in shapes if name not in "qkv"
            }
        kind, layers, format = kind or {}, [], "plain"
        over = kind.get("norm_over")
        of_heads = (lambda n: (n, D)) if over == "each" else lambda n: n * D if over == "heads" else D
        gated = kind.get("gated", True)
        if not gated:
            del shapes["gate"]
        rest = 0 if kind.get("norms", "rms").endswith("+1") else 1  # what a weight is near to

        def norms_of(sizes):
            of = {name: size if isinstance(size, tuple) else (size,) for name, size in sizes.items()}
            w = {name: rest + tensor(*size, scale=0.1) for name, size in of.items()}
            return w | ({f"{name}_bias": tensor(*of[name], scale=0.2) for name in w} if norm_bias else {})

        for _ in kv_heads:
            w = {name: tensor(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
            if bias:
                w |= {f"{name}_bias": tensor(shape[0], scale=0.25) for name, shape in shapes.items()}
            if head_norm:
                w |= norms_of(dict(q_norm=of_heads(H), k_norm=of_heads(G)))
            w |= norms_of(dict.fromkeys(norms_at, K))
            if packed is not False:
                blocks = G if unit == "query" else 1
                w["up"], w["down"], *scales, format = pack_mlp(
                    w.pop("gate", None), w["up"], w["down"], packed
                )
                w |= dict(zip(("up_scales", "down_scales"), scales, strict=True))
                for name in [name for name in ("qkv", *"qkvo") if name in w]:
                    out_blocks, in_blocks = blocks if name == "q" else 1, blocks if name == "o" else 1
                    w[name], w[f"{name}_scales"], _ = pack_linear(w[name], out_blocks, packed, in_blocks)
            layers.append({name: t for name, t in w.items() if t is not None})
        head, scales = tensor(37, K, scale=K**-0.5), None
        if packed is not False:
            head, scales, _ = pack_linear(head, 1, packed)
        model = dict(embedding=tensor(37, K), **norms_of(dict(norm=K)), head=head)
        model |= {"head_bias": tensor(37)} if norm_bias else {}
        model |= {} if scales is None else {"head_scales": scales}
        of_layers = {name: [w[name] for w in layers] for name in layers[0]}
        beside = max(1, *kind.get("tables", [1]))
        angle = torch.cat(
            [torch.rand(tables, T, R // 2, device=device).repeat(1, 1, 2) * 6 for _ in range(beside)], -1
        )
        if requests:  # a router chooses among the widths and heads
            L, hidden, C = len(kv_heads), 5, len(widths) + len(heads)
            shapes = [(L, hidden, K), (L, C, hidden), (L, requests, hidden), (L, requests, C)]
            options["router"] = [torch.randn(*shape, device=device) for shape in shapes]
            options |= dict(mlp_choices=widths, head_choices=heads)
            widths, heads = [], []
        caches = [[tensor(B, cached + T + room, max(n, 1), D) for n in kv_heads] for _ in range(2)]
        shape = DecoderShape(len(kv_heads), F, H, G, D, eps, scale, unit, activation, format, **kind)
        return dict(
            ids=torch.randint(0, 37, (B, T), device=device),
            cos=angle.cos().to(dtype),
            sin=angle.sin().to(dtype),
            held=Decoder(model | of_layers, shape),
            keys=caches[0],
            values=caches[1],
            cached=cached,
            widths=widths,
            heads=heads,
            kv_heads=kv_heads,
            **options,
        )

    yield case([40], [2])  # the whole layer, one token
    yield case([40, 16], [2, 1], room=3)
    yield case(
        [24, 7], [1, 2], B=3, T=2, kv=[2, 2], bias=True, k_start=torch.tensor([0, 4, 6], device=device)
    )
    # prompts: more rows than the kernels' blocks of rows and of queries hold, with and without tokens before them
    yield case([40, 16], [2, 1], B=2, T=150, cached=0, keep=2, k_start=torch.tensor([0, 21], device=device))
    yield case([40, 16], [2, 1], cached=600)  # keys in several parts
    yield case([40, 8, 16], [1, 2], T=300, cached=7, keep=300, requests=1, kv=[2, 2])
    yield case(
        [40], [1], H=6, G=2, unit="query", B=2, T=4, keep=3, tables=2, activation="gelu_tanh", scale=0.3
    )
    yield case([40, 8], [2, 1], H=6, G=2, D=6, R=4, head_norm=True, T=8, keep=8, eps=1e-3)
    yield case([40, 24], [2, 1], packed=None, bias=True, B=2)
    yield case([40, 24], [3, 1], H=6, unit="query", packed=None, T=3)
    yield case([24], [2], packed="int8", B=9)
    yield case([0], [0], B=2)
    yield case([40], [2], cached=0)
    yield case([40], [2], cached=600, k_start=torch.tensor([3], device=device, dtype=torch.int32))
    yield case([40], [2], keep=0)
    yield case([40], [2], B=0)
    yield case([40], [2], T=0, keep=0)
    start = torch.tensor([0, 4, 6], device=device)
    both = dict(kv=[2, 2], B=3, T=2)  # widths and heads of each sequence, in each layer
    yield case([40, 7, 0, 16, 16, 24], [2, 0, 1, 1, 2, 1], bias=True, k_start=start, **both)
    yield case([8, 40, 40, 24, 24, 24], [1, 3, 0, 2, 2, 2], H=6, unit="query", packed=None, keep=2, **both)
    yield case([24, 8, 40, 16], [1, 2, 2, 1], kv=[2, 2], B=2, cached=600, room=5)
    both["B"] = 4
    yield case([8, 24, 40], [1, 2], requests=1, kv=[2, 2])
    yield case([40, 0, 16], [0, 1, 2], requests=4, head_norm=True, bias=True, **both)
    yield case([8, 24, 40], [1, 2, 3], requests=2, H=6, unit="query", packed="int8", keep=2, **both)
    yield case([8, 24], [2], requests=1, kv=[2], B=0)
    if dtype is not torch.float32:  # as in packed_mlp
        more = dict(bias=True, k_start=start, kv=[2, 2], T=2)
        yield case([40, 7, 0, 16, 16, 24], [2, 0, 1, 1, 2, 1], B=3, packed="int4", **more)
        yield case([40, 24], [3, 1], H=6, unit="query", packed="int4", T=20, fused=True, keep=20)
        yield case([40, 24], [3, 1], H=6, unit="query", packed="w8a8", B=2)
        yield case([8, 24, 40], [1, 2], requests=1, kv=[2, 2], B=4, packed="w8a8")
    for i, settings in enumerate(DECODER_KINDS):
        routed = dict(requests=1, kv=[2, 2]) if is_routed(i) else {}
        yield case([40, 24], [2, 1], B=3, T=4, keep=4, k_start=start, **routed, **settings)


def prefix_gate(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for T, N in [(1, 1), (7, 33), (64, 300), (0, 8), (4, 0)]:
        width = torch.randint(0, N + 1, (T,), device=device)
        gate = torch.rand(T, device=device)
        yield dict(x=torch.randn(N, T, device=device, dtype=dtype).T, gate=gate, width=width)
    x = torch.randn(3, 128, device=device, dtype=dtype)
    width = torch.tensor([0, 128, 127], device=device)  # nothing, everything, everything but one
    yield dict(x=x, gate=torch.tensor([1.0, 0.0, -2.0], device=device), width=width)


def route(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for T, C in [(1, 1), (7, 3), (300, 5), (0, 4), (64, 1)]:
        yield dict(logits=torch.randn(C, T, device=device, dtype=dtype).T)
        yield dict(logits=torch.randn(T, C, device=device, dtype=dtype), seed=T + 3)
    special = torch.randn(40, 4, device=device, dtype=dtype)
    special[3] = torch.nan
    special[4, 1] = torch.nan
    special[5] = 1.0
    special[6] = -torch.inf
    special[7, 2] = torch.inf
    yield dict(logits=special)


CASES = [
    OpCase("decoder_step", decoder_step, FLOATING[:3], differentiable=False),
    OpCase("elastic_linear", elastic_linear, devices=("cpu", "cuda")),
    OpCase("elastic_mlp", elastic_mlp, devices=("cpu", "cuda")),
    # Its gradient is elastic_mlp's.
    OpCase("elastic_mlp_with_hidden", elastic_mlp, differentiable=False, devices=("cpu", "cuda")),
    OpCase("head_attention", head_attention, devices=("cpu", "cuda")),
    OpCase("head_attention_decode", head_attention_decode, devices=("cpu", "cuda")),
    OpCase("packed_linear", packed_linear, FLOATING[:3], differentiable=False),
    OpCase("packed_mlp", packed_mlp, FLOATING[:3], differentiable=False),
    OpCase("prefix_gate", prefix_gate, devices=("cpu", "cuda")),
    OpCase("route", route, differentiable=False, devices=("cpu", "cuda")),
]
