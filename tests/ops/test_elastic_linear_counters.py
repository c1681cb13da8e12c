"""What elastic_linear's CUDA kernels read, write and multiply, counted by the emulator: what extents allow, no more."""

import math
import os

import pytest
import torch
from emulator import build as emulator

from flextron_ext import elastic_linear

if not emulator.loaded():
    pytest.skip("FLEXTRON_EMULATE=1 asks for the emulator", allow_module_level=True)

HOPPER = os.environ.get("FLEXTRON_ARCH", "90") == "90"


def launched(T, K, N, in_features, out_features, dtype=torch.bfloat16, **extents):
    """The counters of elastic_linear's one launch; x and weight are watched."""
    x, weight = torch.randn(T, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    emulator.reset()
    emulator.watch("x", x)
    emulator.watch("weight", weight)
    elastic_linear(x, weight, None, in_features, out_features, **extents)
    (launch,) = after_sorting(emulator.counters())
    return launch


def after_sorting(launches):
    """Those behind the one that sorts rows, where there is one."""
    if not launches[0]["kernel"].startswith("sort_rows_kernel"):
        return launches
    assert launches[0]["bank_conflicts"] == 0
    return launches[1:]


def read_of(launch, name) -> int:
    read, written = launch["watched"].get(name, (0, 0))  # what no access met is not listed
    assert written == 0
    return read


def take(path, monkeypatch):
    """The one asked for, whatever is faster; decode is for few 16-bit tokens alone."""
    monkeypatch.setenv("FLEXTRON_KERNEL", path)


def test_cpu_tensors_reach_the_kernels(monkeypatch):
    monkeypatch.setenv("FLEXTRON_KERNEL", "decode")
    launch = launched(64, 128, 128, 128, 128)
    assert launch["kernel"].startswith("elastic_linear_decode_kernel<")
    assert (launch["wgmma"] > 0, launch["mma"] > 0) == (HOPPER, not HOPPER)
    monkeypatch.setenv("FLEXTRON_KERNEL", "tile")
    for dtype in (torch.bfloat16, torch.float16):
        launch = launched(64, 128, 128, 128, 128, dtype)
        assert launch["kernel"].startswith("elastic_linear_kernel<")
        assert (launch["wgmma"] > 0, launch["mma"] > 0) == (HOPPER, not HOPPER)
        assert launch["flops"] > 0
    assert launched(64, 128, 128, 128, 128, torch.float32)["flops"] == 0


def test_the_vendor_can_be_asked_for_where_the_host_knows_the_extents(monkeypatch):
    monkeypatch.setenv("FLEXTRON_KERNEL", "vendor")
    x, weight = torch.randn(40, 24).requires_grad_(), torch.randn(16, 24)
    emulator.reset()
    y = elastic_linear(x, weight, None, 20, 10)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert emulator.counters() == []
    torch.testing.assert_close(y, x[:, :20] @ weight[:10, :20].T)
    torch.testing.assert_close(dx[:, :20], weight[:10, :20].sum(0).expand(40, 20))
    assert not dx[:, 20:].any()
    launch = launched(40, 24, 16, 20, 10, in_extent=torch.tensor([7]))
    assert launch["kernel"].startswith("elastic_linear_decode_kernel<")


@pytest.mark.parametrize("tokens", [1, 3, 48, 64])
@pytest.mark.parametrize("inputs, outputs", [(512, 512), (256, 512), (512, 256), (256, 256)])
@pytest.mark.parametrize("how", ["numbers", "in_extent", "out_extent"])
def test_at_decode_each_weight_in_use_is_read_once_and_no_other(tokens, inputs, outputs, how, monkeypatch):
    take("decode", monkeypatch)
    extents = {}
    if how != "numbers":
        extents[how] = torch.tensor([inputs if how == "in_extent" else outputs])
    launch = launched(
        tokens,
        512,
        512,
        512 if how == "in_extent" else inputs,
        512 if how == "out_extent" else outputs,
        **extents,
    )
    assert read_of(launch, "weight") == inputs * outputs * 2
    assert launch["bytes_written"] == tokens * (512 if how == "out_extent" else outputs) * 2


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("path", ["decode", "tile"])
def test_cost_falls_with_the_extent(path, side, monkeypatch):
    """Whole boxes at most beyond what is used, and nothing at all for an extent of zero."""
    take(path, monkeypatch)
    box = {("tile", "in"): 64, ("tile", "out"): 256, ("decode", "in"): 64, ("decode", "out"): 8}[path, side]
    previous = math.inf
    for extent in (512, 400, 256, 130, 65, 8, 0):
        launch = launched(48, 512, 512, 512, 512, **{f"{side}_extent": torch.tensor([extent])})
        used = read_of(launch, "weight")
        side_of_box = box if HOPPER else 1
        assert extent * 512 * 2 <= used <= -(-extent // side_of_box) * side_of_box * 512 * 2
        assert read_of(launch, "x") <= previous
        previous = read_of(launch, "x")
    assert used == previous == launch["flops"] == 0
    assert launch["bytes_written"] == 48 * 512 * 2


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_row_tile_reads_what_its_widest_row_needs(side):
    """Tokens in any order: they are sorted first, so that four extents cost what each alone costs its tokens."""
    rows, steps = 128, [512, 256, 256, 0]
    T = rows * len(steps)
    extent = torch.tensor(steps).repeat_interleave(rows)[torch.randperm(T)]
    full = launched(T, 512, 512, 512, 512)
    tile = full["flops"] // read_of(full, "weight")  # rows that share what is read of the weight
    assert tile in (64, 128)
    launch = launched(T, 512, 512, 512, 512, **{f"{side}_extent": extent})
    assert launch["flops"] == 2 * rows * sum(steps) * 512
    assert read_of(launch, "weight") == rows // tile * sum(steps) * 512 * 2
    assert launch["bytes_written"] == T * 512 * 2


@pytest.mark.parametrize("T, K, N", [(40, 256, 256), (200, 640, 520), (260, 192, 136)])
@pytest.mark.parametrize("side", [None, "in", "out"], ids=str)
@pytest.mark.parametrize("path", ["decode", "tile"])
def test_no_bank_conflicts(T, K, N, side, path, monkeypatch):
    take(path, monkeypatch)
    high = K if side == "in" else N
    extents = {f"{side}_extent": torch.randint(0, high + 1, (T,))} if side else {}
    launch = launched(T, K, N, K, N, **extents)
    assert launch["shared_accesses"] > 0 and launch["bank_conflicts"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["in", "out"])
def test_gradients_read_what_extents_allow(side, dtype):
    """Of x, dy and the weight, tile by tile of 64 or 128; and in no kernel two threads of a warp meet at a bank."""
    T, K, N, size = 256, 512, 512, dtype.itemsize
    x, weight = torch.randn(T, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    dy, bias = torch.randn(T, N, dtype=dtype), torch.randn(N, dtype=dtype)
    previous = None
    for extent in (512, 256, 0):  # whole tiles: they are up to 256 wide
        extents = {"in_extent": None, "out_extent": None, f"{side}_extent": torch.full((T,), extent)}
        emulator.reset()
        emulator.watch("weight", weight)
        torch.ops.flextron.elastic_linear_backward(
            dy, x, weight, bias, K, N, extents["in_extent"], extents["out_extent"], 1, 1, 7
        )
        of_x, of_weight, of_bias = after_sorting(emulator.counters())
        assert "backward_input" in of_x["kernel"] and "backward_weight" in of_weight["kernel"]
        assert all(launch["bank_conflicts"] == 0 for launch in (of_x, of_weight, of_bias))
        if dtype == torch.bfloat16:
            assert of_x["flops"] == of_weight["flops"] == 2 * T * extent * (N if side == "in" else K)
            assert (of_x["wgmma"] > 0) == (of_weight["wgmma"] > 0) == (HOPPER and extent > 0)
        read = of_x["watched"].get("weight", (0, 0))[0]
        assert read in [extent * (N if side == "in" else K) * size * (T // rows) for rows in (64, 128)]
        assert of_x["bytes_written"] == T * K * size and of_weight["bytes_written"] == N * K * size
        assert of_bias["bytes_written"] == N * size
        if previous:
            assert of_weight["bytes_read"] < previous
        previous = of_weight["bytes_read"]


@pytest.mark.parametrize("rows", [72, 192, 1088])
def test_no_block_of_the_weights_gradient_is_written_from_another(rows):
    T, K, blocks = 20, 72, 2
    x, weight = (torch.randn(n, K, dtype=torch.bfloat16) for n in (T, blocks * rows))
    dy = torch.randn(T, blocks * rows, dtype=torch.bfloat16)
    emulator.reset()
    torch.ops.flextron.elastic_linear_backward(dy, x, weight, None, K, rows, None, None, 1, blocks, 2)
    (launch,) = emulator.counters()
    assert launch["bytes_written"] == blocks * rows * K * 2
