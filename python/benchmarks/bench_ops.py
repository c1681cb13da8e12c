"""Each op beside what plain PyTorch does on views of the same tensors: python bench_ops.py [OP ...]"""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import flextron_ext as ops
from flextron.testing.timing import bench

K, NEURONS, H, G, D = 576, 1536, 9, 3, 64  # a layer of SmolLM2-135M


@dataclass(frozen=True)
class Case:
    """One line of the table: two callables that return the same values.

    Attributes:
        shape: what is computed.
        flops: useful floating-point operations of one call.
    """

    shape: str
    flops: float
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]


def elastic_linear() -> Iterator[Case]:
    w = torch.randn(K, K) / K**0.5
    for T in (1, 128):
        x = torch.randn(T, K)
        for n in (K, K // 2):
            yield Case(
                f"T={T} K={K} N={n} of {K}",
                2 * T * K * n,
                lambda x=x, n=n: ops.elastic_linear(x, w, None, K, n),
                lambda x=x, n=n: F.linear(x, w[:n]),
            )


def elastic_mlp() -> Iterator[Case]:
    gate, up, down = (torch.randn(*s) / K**0.5 for s in ((NEURONS, K), (NEURONS, K), (K, NEURONS)))

    def plain(x: Tensor, d: int) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate[:d])) * F.linear(x, up[:d]), down[:, :d])

    def per_token(x: Tensor, extents: Tensor, widths: tuple[int, ...]) -> Tensor:
        y = torch.empty_like(x)
        for d in widths:
            rows = torch.nonzero(extents == d).squeeze(1)
            y[rows] = plain(x[rows], d)
        return y

    for T in (1, 128):
        x = torch.randn(T, K)
        for d in (NEURONS, NEURONS // 2):
            yield Case(
                f"T={T} F={d} of {NEURONS}",
                6 * T * K * d,
                lambda x=x, d=d: ops.elastic_mlp(x, gate, up, down, None, None, None, d),
                lambda x=x, d=d: plain(x, d),
            )
    widths = (NEURONS // 4, NEURONS // 2, NEURONS)
    extents = torch.tensor(widths)[torch.arange(128) % 3]
    yield Case(
        f"T=128 F={'/'.join(map(str, widths))} per token",
        6 * K * int(extents.sum()),
        lambda: ops.elastic_mlp(x, gate, up, down, None, None, None, NEURONS, extent=extents),
        lambda: per_token(x, extents, widths),
    )


def head_attention() -> Iterator[Case]:
    for T in (128, 512):
        q, k, v = torch.randn(T, H, D), torch.randn(T, G, D), torch.randn(T, G, D)
        for g in (G, 1):
            yield Case(
                f"T={T} G={g} of {G}",
                2 * T * T * D * g * H // G,  # half of the pairs are seen
                lambda q=q, k=k, v=v, g=g: ops.head_attention(q, k, v, g),
                lambda q=q, k=k, v=v, g=g: _sdpa(q, k, v, g, causal=True),
            )


def head_attention_decode() -> Iterator[Case]:
    for S in (128, 1024):
        q, k, v = torch.randn(1, 1, H, D), torch.randn(1, S, G, D), torch.randn(1, S, G, D)
        seqlens = torch.tensor([S])
        for g in (G, 1):
            yield Case(
                f"B=1 S={S} G={g} of {G}",
                4 * S * D * g * H // G,
                lambda q=q, k=k, v=v, n=seqlens, g=g: ops.head_attention_decode(q, k, v, n, g),
                lambda q=q, k=k, v=v, g=g: _sdpa(q[0], k[0], v[0], g, causal=False)[None],
            )


def route() -> Iterator[Case]:
    for T in (128, 4096):
        logits = torch.randn(T, 4)
        yield Case(
            f"T={T} C=4",
            4 * T,
            lambda x=logits: ops.route(x)[1],
            lambda x=logits: x.argmax(1).argsort(descending=True, stable=True),
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, g: int, causal: bool) -> Tensor:
    """The first ``g`` groups of [T, H, D] through torch's attention, zeros for the others."""
    heads = g * H // G
    q, k, v = (x.transpose(0, 1)[None] for x in (q[:, :heads], k[:, :g], v[:, :g]))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return F.pad(y[0].transpose(0, 1), (0, 0, 0, H - heads))


BENCHES = {f.__name__: f for f in (elastic_linear, elastic_mlp, head_attention, head_attention_decode, route)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="*", help=f"the ops to time, all by default: {', '.join(BENCHES)}")
    names = parser.parse_args().op or list(BENCHES)
    if unknown := set(names) - set(BENCHES):
        parser.error(f"op must be one of {', '.join(BENCHES)}, got {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    square = torch.randn(1024, 1024)
    peak = 2 * 1024**3 / bench({"matmul": lambda: square @ square})["matmul"].median
    print(_header(peak))
    print(f"{'op':<24}{'shape':<34}{'ours us':>10}{'plain us':>10}{'ratio':>7}{'GFLOP/s':>9}{'of peak':>9}")
    with torch.no_grad():
        for name in names:
            for case in BENCHES[name]():
                torch.testing.assert_close(case.ours(), case.plain(), rtol=1e-3, atol=1e-4)
                time = bench({"ours": case.ours, "plain": case.plain})
                ours, plain = time["ours"].median, time["plain"].median
                rate = case.flops / ours
                print(
                    f"{name:<24}{case.shape:<34}{ours * 1e6:>10.1f}{plain * 1e6:>10.1f}{plain / ours:>7.2f}"
                    f"{rate / 1e9:>9.2f}{rate / peak:>9.1%}",
                    flush=True,
                )


def _header(peak: float) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return (
        f"float32, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"commit {commit or 'unknown'}, build {ops.build_info()}\n"
        f"peak: {peak / 1e9:.0f} GFLOP/s in a 1024 x 1024 matmul; ratio: plain time over ours"
    )


if __name__ == "__main__":
    main()
