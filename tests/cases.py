"""One row per op: its inputs, awkward ones included, by argument name. Every row feeds every test of test_ops.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Inputs = Callable[[str, torch.dtype], Iterator[dict[str, Any]]]
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class OpCase:
    name: str
    inputs: Inputs
    dtypes: tuple[torch.dtype, ...] = FLOATING
    differentiable: bool = True
    devices: tuple[str, ...] = ("cpu",)  # where the op has kernels


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
            b_gate=tensor(F) if gated and bias else None,
            b_up=tensor(F) if bias else None,
            b_down=tensor(N) if bias else None,
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
    OpCase("elastic_linear", elastic_linear),
    OpCase("elastic_mlp", elastic_mlp),
    OpCase("route", route, differentiable=False, devices=("cpu", "cuda")),
]
