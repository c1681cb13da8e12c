"""Drawn calls of the CPU GEMM ops, good and bad: right values or one sentence, no crash.

FLEXTRON_FUZZ_CALLS=10000 draws that many.
"""

import os
import random

import torch

from flextron_ext import pack_linear, pack_mlp, reference

CALLS = int(os.environ.get("FLEXTRON_FUZZ_CALLS", "300"))
OPS = torch.ops.flextron
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu")


def size(most: int) -> int:
    return random.choice((0, 1, random.randint(1, 9), random.randint(1, most)))


def extent(T: int, high: int) -> torch.Tensor | None:
    shape = random.choice((None, 1, T))
    return (
        None
        if shape is None
        else torch.randint(0, high + 1, (shape,), dtype=random.choice((torch.int32, torch.int64)))
    )


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values, sometimes with other strides."""
    return random.choice((t, t.T.contiguous().T, torch.cat((t, t), 1)[:, : t.shape[1]]))


def linear():
    """(packed or plain op, its arguments, the reference's)."""
    dtype, T, ib, ob = random.choice(DTYPES), size(70), random.randint(1, 3), random.randint(1, 3)
    K, N = size(300) + 1, size(60) + 1
    k, n = random.randint(0, K), random.randint(0, N)
    x, weight = strided(torch.randn(T, ib * K).to(dtype)), torch.randn(ob * N, ib * K).to(dtype)
    bias = random.choice((None, torch.randn(ob * N).to(dtype)))
    side = random.choice((0, 1))
    extents = [None, None]
    extents[side] = extent(T, (k, n)[side])
    plain = (x, strided(weight), bias, k, n, *extents, ib, ob)
    if random.random() < 0.4:
        return "elastic_linear", plain, plain
    packed = random.choice((None, "int8", "w8a8", "int4"))
    panels, scales, format = pack_linear(weight, ob, packed, ib)
    if format.quantised:
        arguments = (x, panels, scales, format, bias, k, n, *extents, ib)
        return "packed_linear", arguments, arguments
    whole = (
        reference._unpacked(panels, scales, format, torch.float64)
        .unflatten(0, (ob, -1))
        .unflatten(2, (ib, -1))
    )
    rows = whole[:, :N, :, :K].reshape(ob * N, ib * K)
    return "packed_linear", (x, panels, scales, format, bias, k, n, *extents, ib), (x, rows, *plain[2:])


def mlp():
    dtype, T, K, F, N = random.choice(DTYPES), size(40), size(80) + 1, size(90) + 1, size(40) + 1
    x = strided(torch.randn(T, K).to(dtype))
    gate = random.choice((None, (torch.randn(F, K) * K**-0.5).to(dtype)))
    up, down = (torch.randn(F, K) * K**-0.5).to(dtype), (torch.randn(N, F) * F**-0.5).to(dtype)
    biases = [random.choice((None, torch.randn(m).to(dtype))) for m in (F, F, N)]
    if gate is None:
        biases[0] = None
    width, activation = random.randint(0, F), random.choice(ACTIVATIONS)
    extents = extent(T, width)
    plain = (x, gate, up, down, *biases, width, activation, extents)
    if random.random() < 0.4:
        return "elastic_mlp", plain, plain
    arguments = (x, *pack_mlp(gate, up, down), *biases, width, N, gate is not None, activation, extents)
    return "packed_mlp", arguments, plain


def spoiled(arguments: tuple) -> tuple:
    """One argument is something else."""
    i = random.randrange(len(arguments))
    old = arguments[i]
    if isinstance(old, torch.Tensor):
        new = random.choice((old[..., :0], old.flatten(), old.double(), old[:1], old.long(), old[None]))
    elif isinstance(old, bool) or old is None:
        new = old
    elif isinstance(old, int):
        new = random.choice((-1, old + 1, old * 7, 2**40, 0))
    else:
        new = "tanh"
    return (*arguments[:i], new, *arguments[i + 1 :])


def test_fuzz_of_the_gemm_ops():
    random.seed(7)
    right = refused = 0
    for call in range(CALLS):
        torch.manual_seed(call)
        op, arguments, plain = random.choice((linear, mlp))()
        if random.random() < 0.3:
            try:
                getattr(OPS, op)(*spoiled(arguments))
            except RuntimeError as error:
                assert str(error).startswith((f"{op}: ", "flextron::")), (call, op, str(error))
                refused += 1
            continue
        ours = getattr(OPS, op)(*arguments)
        wide = (t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in plain)
        exact = getattr(reference, op if plain is arguments else op.replace("packed", "elastic"))(*wide)
        bound = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3}[ours.dtype]
        error = (ours.double() - exact).abs().max().item() if ours.numel() else 0.0
        assert error <= bound * max(1.0, exact.abs().max().item() if ours.numel() else 0.0), (call, op, error)
        right += 1
    assert right > CALLS / 2 and refused > CALLS / 20
