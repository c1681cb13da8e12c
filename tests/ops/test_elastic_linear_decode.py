"""elastic_linear and elastic_mlp for few tokens, on a GPU or emulated: any number, and how weights are cut."""

import os

import pytest
import torch
from emulator import build as emulator

from flextron.testing.numerics import assert_no_worse
from flextron_ext import elastic_linear, elastic_mlp, reference

HOPPER = os.environ.get("FLEXTRON_ARCH", "90") == "90"

each_count = pytest.mark.parametrize("T", [1, 7, 8, 9, 16, 33, 64])
each_side = pytest.mark.parametrize("side", [None, "in", "out"], ids=str)
gated_or_plain = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# Blocks of x, of the weight's rows and columns, and what is used of them. The emulator runs three clusters of four
# blocks, each with up to 256 rows at once: less than a chunk, many chunks, several passes, blocks.
SHAPES = {
    "small": dict(kx=24, kw=24, nw=10, in_features=21, out_features=9),
    "deep": dict(kx=2120, kw=2120, nw=72, in_features=2120, out_features=71),
    "tall": dict(kx=136, kw=144, nw=1700, in_features=136, out_features=1690),
    "blocks": dict(kx=200, kw=208, nw=76, in_features=195, out_features=70, in_blocks=3, out_blocks=5),
}


@pytest.fixture(autouse=True)
def kernels(a_gpu_or_its_emulator, monkeypatch):
    monkeypatch.setenv("FLEXTRON_KERNEL", "decode")  # also where others are faster


def make_linear(shape, T, side, device, dtype=torch.bfloat16):
    s = {"in_blocks": 1, "out_blocks": 1} | SHAPES[shape]
    ib, ob = s["in_blocks"], s["out_blocks"]
    x = torch.randn(T, ib * s["kx"], device=device, dtype=dtype)
    weight = torch.randn(ob * s["nw"], ib * s["kw"], device=device, dtype=dtype)
    bias = torch.randn(ob * s["nw"], device=device, dtype=dtype)
    arguments = {name: s[name] for name in ("in_features", "out_features", "in_blocks", "out_blocks")}
    if side:
        high = s[f"{side}_features"]
        few = torch.tensor([high // 2 + 1, 0, 1, high, high // 3], device=device)
        arguments[f"{side}_extent"] = few[torch.arange(T, device=device) % len(few)]
    return x, weight, bias, arguments


def make_mlp(T, F, K, N, device, gated=True, dtype=torch.bfloat16):
    def tensor(*shape, scale=1.0):
        return torch.randn(*shape, device=device, dtype=dtype) * scale

    gate = (tensor(F, K, scale=K**-0.5), tensor(F, scale=0.25)) if gated else (None, None)
    return (
        tensor(T, K),
        gate[0],
        tensor(F, K, scale=K**-0.5),
        tensor(N, F, scale=F**-0.5),
        gate[1],
        tensor(F, scale=0.25),
        tensor(N, scale=0.25),
    )


def rows_of(values, order):
    return {
        name: value[order] if isinstance(value, torch.Tensor) and len(value) > 1 else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("shape", SHAPES)
@each_count
@each_side
def test_linear(shape, T, side, device):
    """The values; the same bits for each token alone and in any order; nothing beyond an extent is used."""
    x, weight, bias, arguments = make_linear(shape, T, side, device)
    y = elastic_linear(x, weight, bias, **arguments)
    plain = reference.elastic_linear(x, weight, bias, **arguments)
    exact = reference.elastic_linear(x.double(), weight.double(), bias.double(), **arguments)
    assert_no_worse(y, plain, exact, shape, x.dtype)

    order = torch.randperm(T, device=device)
    assert torch.equal(elastic_linear(x[order], weight, bias, **rows_of(arguments, order)), y[order])
    for t in {0, T - 1}:
        alone = {k: v[t : t + 1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        assert torch.equal(elastic_linear(x[t : t + 1], weight, bias, **alone), y[t : t + 1])

    def used(size, blocks, extent):
        return (torch.arange(size // blocks, device=device) < extent[:, None]).repeat(1, blocks)

    inputs, outputs = (
        arguments.get(name + "_extent", torch.full((T,), arguments[name + "_features"], device=device))
        for name in ("in", "out")
    )
    ib, ob = arguments["in_blocks"], arguments["out_blocks"]
    rows = used(len(weight), ob, outputs.max().view(1))[0]
    columns = used(weight.shape[1], ib, inputs.max().view(1))
    poisoned = [
        torch.where(keep, value, torch.nan)
        for value, keep in (
            (x, used(x.shape[1], ib, inputs)),
            (weight, rows[:, None] & columns),
            (bias, rows),
        )
    ]
    assert torch.equal(elastic_linear(*poisoned, **arguments), y)


@each_dtype
def test_linear_without_bias_in_both_dtypes(dtype, device):
    x, weight, _, arguments = make_linear("deep", 19, "in", device, dtype)
    y = elastic_linear(x, weight, None, **arguments)
    plain = reference.elastic_linear(x, weight, None, **arguments)
    exact = reference.elastic_linear(x.double(), weight.double(), None, **arguments)
    assert_no_worse(y, plain, exact, "deep", dtype)


@each_count
@pytest.mark.parametrize("kept", [(64, 71), (192, 16), (1000, 8), (2112, 65)], ids=str)
def test_linear_gives_the_bits_of_a_sliced_weight(T, kept, device):
    x, weight, bias, _ = make_linear("deep", T, None, device)
    inputs, outputs = kept
    sliced = elastic_linear(
        x[:, :inputs].contiguous(), weight[:outputs, :inputs].contiguous(), bias[:outputs], *kept
    )
    assert torch.equal(elastic_linear(x, weight, bias, *kept), sliced)
    for name, extent, other in (("in", inputs, (2120, outputs)), ("out", outputs, (inputs, 71))):
        mixed = torch.full((T,), extent, device=device)
        mixed[: T // 2] = 0
        y = elastic_linear(x, weight, bias, *other, **{f"{name}_extent": mixed})
        assert torch.equal(y[T // 2 :, :outputs], sliced[T // 2 :]) and not y[:, outputs:].any()


@each_count
@gated_or_plain
@pytest.mark.parametrize("kind", ["width", "token", "zeros", "gate"])
def test_mlp(T, gated, kind, device):
    """Several passes over the features; values, and what a sort of the tokens and NaN beyond the widest leave alone."""
    F, K, width = 1000, 144, 992
    values = make_mlp(T, F, K, 40, device, gated)
    few = torch.tensor([300, 0, 1, 801, 64], device=device)
    arguments = {
        "width": lambda: {},
        "token": lambda: dict(extent=few[torch.arange(T, device=device) % len(few)]),
        "zeros": lambda: dict(extent=torch.zeros(T, dtype=torch.int64, device=device)),
        "gate": lambda: dict(gate=torch.rand(T, 3, device=device), choices=[200, 500, 990]),
    }[kind]() | dict(width=width, activation="silu")
    y = elastic_mlp(*values, **arguments)
    plain = reference.elastic_mlp(*values, **arguments)
    exact = reference.elastic_mlp(*(v if v is None else v.double() for v in values), **arguments)
    assert_no_worse(y, plain, exact, kind, values[0].dtype)

    order = torch.randperm(T, device=device)
    moved = elastic_mlp(values[0][order], *values[1:], **rows_of(arguments, order))
    assert torch.equal(moved, y[order])

    widest = int(arguments["extent"].max()) if "extent" in arguments else {"gate": 990}.get(kind, width)
    live = torch.arange(F, device=device) < widest
    keep = (None, live[:, None], live[:, None], live, live, live, None)
    poisoned = [
        v if v is None or k is None else torch.where(k, v, torch.nan)
        for v, k in zip(values, keep, strict=True)
    ]
    assert torch.equal(elastic_mlp(*poisoned, **arguments), y)


@each_count
@gated_or_plain
def test_mlp_gives_the_bits_of_sliced_weights(T, gated, device):
    F, d = 1000, 520
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = make_mlp(T, F, 144, 40, device, gated)
    sliced = elastic_mlp(
        x,
        None if w_gate is None else w_gate[:d],
        w_up[:d],
        w_down[:, :d].contiguous(),
        None if b_gate is None else b_gate[:d],
        b_up[:d],
        b_down,
        d,
    )
    weights = (w_gate, w_up, w_down, b_gate, b_up, b_down)
    mixed = torch.full((T,), d, device=device)
    mixed[: T // 2] = 0
    assert torch.equal(elastic_mlp(x, *weights, d), sliced)
    assert torch.equal(elastic_mlp(x, *weights, F, extent=mixed)[T // 2 :], sliced[T // 2 :])


@pytest.mark.skipif(not emulator.loaded(), reason="the emulator counts")
@each_count
@pytest.mark.parametrize("extent", [1000, 513, 8, 0])
def test_weights_are_read_once_as_far_as_the_widest_token_needs(T, extent):
    """At most to the end of 8 rows or 64 features; each element of h and y is written once; no bank is met twice."""
    F, K, N = 1000, 320, 136
    values = make_mlp(T, F, K, N, "cpu")
    extents = torch.arange(T).flip(0).clamp(max=extent)
    extents[T // 2] = extent
    emulator.reset()
    for name, value in zip(("w_gate", "w_up", "w_down"), values[1:4], strict=True):
        emulator.watch(name, value)
    elastic_mlp(*values, F, extent=extents)
    hidden, down = emulator.counters()
    rows, columns = (-(-extent // 8) * 8, min(-(-extent // 64) * 64, F)) if HOPPER else (extent, extent)
    read = {
        name: launch["watched"].get(name, (0, 0))[0]
        for launch in (hidden, down)
        for name in launch["watched"]
    }
    expected = {"w_gate": rows * K * 2, "w_up": rows * K * 2, "w_down": N * columns * 2}
    assert read == {name: size for name, size in expected.items() if size}
    assert (hidden["bytes_written"], down["bytes_written"]) == (T * F * 2, T * N * 2)
    assert hidden["bank_conflicts"] == down["bank_conflicts"] == 0
    assert (hidden["wgmma"] > 0) == (down["wgmma"] > 0) == (HOPPER and extent > 0)
