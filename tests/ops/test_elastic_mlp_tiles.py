"""elastic_mlp's CUDA kernels, on a GPU or emulated, over several tiles: values, bits, and what is read and written."""

import pytest
import torch
from emulator import build as emulator

from flextron.testing.numerics import assert_no_worse
from flextron_ext import elastic_mlp, reference

# Sides that TMA can take (multiples of 8), odd ones, and few tokens.
SHAPES = {
    "tiles": dict(T=150, K=72, F=208, N=136, width=200),
    "odd": dict(T=70, K=37, F=137, N=45, width=133),
    "decode": dict(T=19, K=264, F=72, N=40, width=70),
}
NAMES = ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")

each_shape = pytest.mark.parametrize("shape", SHAPES)
each_kind = pytest.mark.parametrize("kind", ["width", "one", "token", "gate"])
gated_or_plain = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])


@pytest.fixture(autouse=True)
def the_kernel_of_many_tokens(a_gpu_or_its_emulator, request, monkeypatch):
    if request.node.funcargs.get("shape") != "decode":  # a few of many tokens take the kernel of the many
        monkeypatch.setenv("FLEXTRON_KERNEL", "tile")


def make(shape, kind, device, dtype=torch.bfloat16, gated=True):
    """The tensors of NAMES, which ask for gradients, and the op's other arguments."""
    s = SHAPES[shape]
    T, K, F, N, width = (s[name] for name in ("T", "K", "F", "N", "width"))

    def tensor(*shape, scale=1.0):
        return torch.randn(*shape, device=device, dtype=dtype) * scale

    up = [tensor(F, K, scale=K**-0.5) for _ in range(2)]
    biases = [tensor(size, scale=0.25) for size in (F, F, N)]
    values = [tensor(T, K), *up, tensor(N, F, scale=F**-0.5), *biases]
    values = [
        None if not gated and name in ("w_gate", "b_gate") else v
        for name, v in zip(NAMES, values, strict=True)
    ]
    few = torch.tensor([0, 1, width // 3, width // 2 + 1, width], device=device)  # a staircase of long steps
    extra = {
        "width": lambda: {},
        "one": lambda: dict(extent=torch.tensor([width // 2], device=device)),
        "token": lambda: dict(extent=few[torch.randint(len(few), (T,), device=device)]),
        "gate": lambda: dict(
            gate=torch.rand(T, 3, device=device).requires_grad_(), choices=[width // 4, width // 2, width - 1]
        ),
    }[kind]()
    return asking(values), dict(width=width, activation="silu", **extra)


def asking(values, dtype=None):
    return [None if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for v in values]


def results(values, arguments, run=elastic_mlp):
    """y and the gradients by name, for the same dy each time."""
    y = run(*values, **arguments)
    dy = torch.randn(*y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    leaves = {name: v for name, v in zip(NAMES, values, strict=True) if v is not None}
    if "gate" in arguments:
        leaves["gate"] = arguments["gate"]
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def used(values, arguments):
    """Which entries of each tensor some token uses, by name; of x and b_down all."""
    x, w_up = values[0], values[2]
    T, F = len(x), len(w_up)
    extent = arguments.get("extent", torch.tensor([arguments["width"]], device=x.device)).expand(T)
    live = torch.arange(F, device=x.device) < min(int(extent.max()), arguments.get("choices", [F])[-1])
    return {"w_gate": live[:, None], "w_up": live[:, None], "w_down": live, "b_gate": live, "b_up": live}


@each_shape
@each_kind
@gated_or_plain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_and_gradients(shape, kind, gated, dtype, device):
    values, arguments = make(shape, kind, device, dtype, gated)
    ours = results(values, arguments)
    plain = results(values, arguments, reference.elastic_mlp)
    exact = results(asking(values, torch.float64), arguments, reference.elastic_mlp)
    for name in ours:
        assert_no_worse(ours[name], plain[name], exact[name], f"{shape}, {name}", dtype)


@each_shape
@each_kind
@gated_or_plain
def test_nothing_beyond_an_extent_is_used(shape, kind, gated, device):
    """NaN there, and what it gives equals what zeros give; the gradients there are zeros."""
    values, arguments = make(shape, kind, device, gated=gated)
    inside = used(values, arguments)
    poisoned = asking(
        v if v is None or name not in inside else torch.where(inside[name], v, torch.nan)
        for name, v in zip(NAMES, values, strict=True)
    )
    clean = asking(None if v is None else v.nan_to_num(0.0) for v in poisoned)
    ours, expected = results(poisoned, arguments), results(clean, arguments)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name
        if name in inside:
            assert not value[~inside[name].expand(value.shape)].any(), name


@each_shape
@each_kind
def test_permuting_tokens_permutes_bit_for_bit(shape, kind, device):
    values, arguments = make(shape, kind, device)
    order = torch.randperm(len(values[0]), device=device)
    shuffled = {
        name: v[order] if isinstance(v, torch.Tensor) and len(v) > 1 else v for name, v in arguments.items()
    }
    x = values[0]
    moved = x.detach()[order].requires_grad_()
    y, y_moved = elastic_mlp(*values, **arguments), elastic_mlp(moved, *values[1:], **shuffled)
    assert torch.equal(y_moved, y[order])
    dy = torch.randn_like(y)
    (dx,), (dx_moved,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(y_moved, moved, dy[order])
    assert torch.equal(dx_moved, dx[order])


@each_shape
@gated_or_plain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_extent_gives_the_bits_of_sliced_weights(shape, gated, dtype, device):
    values, arguments = make(shape, "one", device, dtype, gated)
    d = int(arguments["extent"])
    inside = {
        "w_gate": slice(d),
        "w_up": slice(d),
        "w_down": (slice(None), slice(d)),
        "b_gate": slice(d),
        "b_up": slice(d),
    }
    sliced = asking(
        v if v is None or name not in inside else v[inside[name]].contiguous()
        for name, v in zip(NAMES, values, strict=True)
    )
    expected = results(sliced, dict(width=d))
    for given in (arguments, dict(width=d)):
        for name, value in results(values, given).items():
            assert torch.equal(value[inside.get(name, ...)], expected[name]), name


@pytest.mark.skipif(not emulator.loaded(), reason="the emulator counts")
@pytest.mark.parametrize("path", ["decode", "tile"])
@gated_or_plain
def test_cost_falls_with_the_extent(path, gated, monkeypatch):
    """Two launches; each weight in use is read once where one tile holds all tokens, and no bank is met twice."""
    if path == "decode":  # what 64 tokens take
        monkeypatch.delenv("FLEXTRON_KERNEL")
    T, K, F, N = 64, 128, 256, 128
    bf16 = dict(dtype=torch.bfloat16)
    x, w_gate, w_up = torch.randn(T, K, **bf16), torch.randn(F, K, **bf16), torch.randn(F, K, **bf16)
    w_down = torch.randn(N, F, **bf16)
    for extent in (256, 128, 0):
        emulator.reset()
        for name, weight in (("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down)):
            emulator.watch(name, weight)
        elastic_mlp(
            x, w_gate if gated else None, w_up, w_down, None, None, None, F, extent=torch.full((T,), extent)
        )
        *_, hidden, down = emulator.counters()  # tiles sort the rows first
        names = ("w_gate", "w_up") if gated else ("w_up",)
        for launch, weights in ((hidden, names), (down, ("w_down",))):
            assert {name: read for name, (read, _) in launch["watched"].items()} == (
                {name: 128 * extent * 2 for name in weights} if extent else {}
            )
            assert launch["flops"] == len(weights) * 2 * T * extent * 128
            assert launch["bank_conflicts"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@gated_or_plain
@pytest.mark.parametrize("kind", ["width", "gate"])
@pytest.mark.parametrize("shape", ["odd"])
def test_the_vendors_gemms_give_the_same(shape, kind, gated, dtype, device, monkeypatch):
    """Where the host knows the width; between the GEMMs our kernels compute."""
    values, arguments = make(shape, kind, device, dtype, gated)
    ours = results(values, arguments)
    monkeypatch.setenv("FLEXTRON_KERNEL", "vendor")
    if emulator.loaded():
        emulator.reset()
    theirs = results(values, arguments)
    if emulator.loaded():
        assert {launch["kernel"].split("<")[0] for launch in emulator.counters()} == {
            "elastic_mlp_rows_kernel",
            "elastic_mlp_rows_backward_kernel",
        }
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.05)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], **tolerance)


@pytest.mark.skipif(not emulator.loaded(), reason="the emulator counts")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_bank_conflicts(dtype):
    values, arguments = make("tiles", "token", "cpu", dtype)
    emulator.reset()
    results(values, arguments)
    for launch in emulator.counters():
        assert launch["bank_conflicts"] == 0, launch["kernel"]


def test_more_choices_than_a_kernel_takes_are_refused(device):
    x, w_up, w_down = (
        torch.randn(2, 4, device=device),
        torch.randn(64, 4, device=device),
        torch.randn(4, 64, device=device),
    )
    gate, choices = torch.rand(2, 33, device=device), list(range(1, 34))
    with pytest.raises(
        RuntimeError, match="elastic_mlp: choices must have at most 32 entries on a GPU, got 33"
    ):
        elastic_mlp(x, None, w_up, w_down, None, None, None, 64, gate=gate, choices=choices)


def test_a_hidden_layer_at_any_address_gives_the_same(device):
    """What was kept comes from the caller: it may begin anywhere."""
    T, K, F = 5, 16, 24
    x, w_gate, w_up, w_down = (
        torch.randn(*shape, dtype=torch.bfloat16, device=device) for shape in ((T, K), (F, K), (F, K), (K, F))
    )
    weights = (w_gate, w_up, w_down, None, None, None, F, "silu", None, None, None)
    y, up, gated = torch.ops.flextron.elastic_mlp_with_hidden(x, *weights)

    def moved(t):
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    ours, expected = (
        torch.ops.flextron.elastic_mlp_backward(torch.ones_like(y), x, *weights, *hidden, 15)
        for hidden in ((moved(up), moved(gated)), (up, gated))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
