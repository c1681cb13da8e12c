"""elastic_linear's CUDA kernels, on a GPU or emulated, over several tiles: no result depends on where tiles end."""

import pytest
import torch

from flextron.testing.numerics import assert_no_worse
from flextron_ext import elastic_linear, reference

# Blocks of x, of weight's rows and columns, and what is used of them. Sides that TMA can take (multiples
# of 8), and odd ones, for the portable kernel alone.
SHAPES = {
    "one block": dict(T=270, kx=328, kw=328, nw=392, in_features=328, out_features=392),
    "used in part": dict(T=70, kx=200, kw=216, nw=280, in_features=195, out_features=272),
    "blocks": dict(T=140, kx=104, kw=120, nw=152, in_features=100, out_features=144, ib=2, ob=3),
    "tall blocks": dict(T=20, kx=72, kw=72, nw=1088, in_features=72, out_features=1080, ob=2),
    "odd": dict(T=70, kx=101, kw=103, nw=137, in_features=99, out_features=133, ib=2, ob=2),
    "decode": dict(T=19, kx=520, kw=520, nw=136, in_features=520, out_features=133, ib=2),
}
EXTENTS = (None, "in", "out")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

each_shape = pytest.mark.parametrize("shape", SHAPES)
each_side = pytest.mark.parametrize("side", EXTENTS, ids=str)


@pytest.fixture(autouse=True)
def the_kernel_of_many_tokens(a_gpu_or_its_emulator, request, monkeypatch):
    if request.node.funcargs.get("shape") != "decode":  # a few of many tokens take the kernel of the many
        monkeypatch.setenv("FLEXTRON_KERNEL", "tile")


def make(shape, side, device, dtype=torch.bfloat16):
    """x, weight, bias and the op's other arguments; each token has an extent of its own on that side."""
    s = {"ib": 1, "ob": 1} | SHAPES[shape]
    x = torch.randn(s["T"], s["ib"] * s["kx"], device=device, dtype=dtype)
    weight = torch.randn(s["ob"] * s["nw"], s["ib"] * s["kw"], device=device, dtype=dtype)
    bias = torch.randn(s["ob"] * s["nw"], device=device, dtype=dtype)
    arguments = {name: s[name] for name in ("in_features", "out_features")}
    arguments |= {"in_blocks": s["ib"], "out_blocks": s["ob"]}
    if side:
        high = arguments[f"{side}_features"]
        few = torch.tensor([0, 1, high // 3, high // 2 + 1, high], device=device)  # a staircase of long steps
        arguments[f"{side}_extent"] = few[torch.randint(len(few), (s["T"],), device=device)]
    return x, weight, bias, arguments


def used(size, blocks, extent):
    """[rows of extent, size]: what each block's first `extent` features are."""
    return (torch.arange(size // blocks, device=extent.device) < extent[:, None]).repeat(1, blocks)


@each_shape
@each_side
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_values(shape, side, dtype, device):
    x, weight, bias, arguments = make(shape, side, device, dtype)
    ours = elastic_linear(x, weight, bias, **arguments)
    plain = reference.elastic_linear(x, weight, bias, **arguments)
    exact = reference.elastic_linear(x.double(), weight.double(), bias.double(), **arguments)
    assert_no_worse(ours, plain, exact, shape, dtype)


def gradients(x, weight, bias, arguments, dy, run=elastic_linear):
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    return torch.autograd.grad(run(*leaves, **arguments), leaves, dy.to(x.dtype))


@each_shape
@each_side
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_gradients(shape, side, dtype, device):
    x, weight, bias, arguments = make(shape, side, device, dtype)
    dy = torch.randn(len(x), arguments["out_blocks"] * arguments["out_features"], device=device)
    dy = dy.to(dtype).double()
    ours = gradients(x, weight, bias, arguments, dy)
    plain = gradients(x, weight, bias, arguments, dy, reference.elastic_linear)
    wide = [value.double() for value in (x, weight, bias)]
    exact = gradients(*wide, arguments, dy, reference.elastic_linear)
    for name, *values in zip(("x", "weight", "bias"), ours, plain, exact, strict=True):
        assert_no_worse(*values, f"{shape}, gradient of {name}", dtype)


def inside_of(x, weight, arguments):
    """Which entries of x, of the weight and of the bias some extent reaches, and which of y."""
    T, ib, ob = len(x), arguments["in_blocks"], arguments["out_blocks"]
    inputs, outputs = (
        arguments.get(name + "_extent", torch.full((T,), arguments[name + "_features"], device=x.device))
        for name in ("in", "out")
    )
    columns = used(weight.shape[1], ib, inputs.amax(0, keepdim=True))
    rows = used(weight.shape[0], ob, outputs.amax(0, keepdim=True))[0]
    y = used(ob * arguments["out_features"], ob, outputs)
    return (used(x.shape[1], ib, inputs), columns & rows[:, None], rows), y


@each_shape
@each_side
def test_gradients_use_nothing_beyond_an_extent(shape, side, device):
    """NaN in everything there, the gradient of y too, gives what zeros give, and zeros there."""
    x, weight, bias, arguments = make(shape, side, device)
    inside, inside_y = inside_of(x, weight, arguments)
    dy = torch.where(inside_y, torch.randn(inside_y.shape, device=device), torch.nan)
    poisoned = [
        torch.where(keep, value, torch.nan) for value, keep in zip((x, weight, bias), inside, strict=True)
    ]
    ours = gradients(*poisoned, arguments, dy)
    clean = gradients(*(value.nan_to_num(0.0) for value in poisoned), arguments, dy.nan_to_num(0.0))
    for mine, expected, keep in zip(ours, clean, inside, strict=True):
        assert torch.equal(mine, expected) and not mine[~keep].any()


@each_shape
@each_side
def test_nothing_beyond_an_extent_is_used(shape, side, device):
    """NaN there, and what it gives equals what zeros give."""
    x, weight, bias, arguments = make(shape, side, device)
    inside, inside_y = inside_of(x, weight, arguments)
    poisoned = [
        torch.where(keep, value, torch.nan) for value, keep in zip((x, weight, bias), inside, strict=True)
    ]
    y = elastic_linear(*poisoned, **arguments)
    assert torch.equal(y, elastic_linear(*(value.nan_to_num(0.0) for value in poisoned), **arguments))
    assert not y[~inside_y].any()


@each_shape
@each_side
def test_permuting_tokens_permutes_outputs_bit_for_bit(shape, side, device):
    x, weight, bias, arguments = make(shape, side, device)
    order = torch.randperm(len(x), device=device)
    shuffled = {
        name: value[order] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    y = elastic_linear(x, weight, bias, **arguments)
    assert torch.equal(elastic_linear(x[order], weight, bias, **shuffled), y[order])


@each_shape
@each_side
def test_a_token_alone_gives_the_same_bits(shape, side, device):
    x, weight, bias, arguments = make(shape, side, device)
    y = elastic_linear(x, weight, bias, **arguments)
    for t in range(0, len(x), 1 + len(x) // 3):
        alone = dict(arguments)
        if side:
            alone[f"{side}_extent"] = arguments[f"{side}_extent"][t : t + 1]
        assert torch.equal(elastic_linear(x[t : t + 1], weight, bias, **alone), y[t : t + 1])


@pytest.mark.parametrize("kept", [(64, 200), (190, 41), (8, 392)], ids=str)
def test_an_extent_gives_the_bits_of_a_sliced_weight(kept, device):
    x, weight, bias, _ = make("one block", None, device)
    inputs, outputs = kept
    sliced = elastic_linear(
        x[:, :inputs].contiguous(), weight[:outputs, :inputs].contiguous(), bias[:outputs].contiguous(), *kept
    )
    as_numbers = elastic_linear(x, weight, bias, *kept)
    assert torch.equal(as_numbers, sliced)
    for name, extent, other in (("in", inputs, (328, outputs)), ("out", outputs, (inputs, 392))):
        tensor = torch.tensor([extent], device=device)
        y = elastic_linear(x, weight, bias, *other, **{f"{name}_extent": tensor})
        assert torch.equal(y[:, :outputs], sliced) and not y[:, outputs:].any()
