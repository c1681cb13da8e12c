"""packed_linear: one packed copy serves every prefix; a row's bits depend on that row and its prefix alone."""

import os

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, run_python

from flextron.testing.numerics import assert_no_worse
from flextron_ext import PanelFormat, pack_linear, packed_linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKED = [None, "int8"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_packing = pytest.mark.parametrize("packed", PACKED, ids=["same", "int8"])


def draw(T, K, N, dtype, ib=1, ob=1):
    return (
        torch.randn(T, ib * K).to(dtype),
        torch.randn(ob * N, ib * K).to(dtype),
        torch.randn(ob * N).to(dtype),
    )


@each_dtype
@each_packing
@pytest.mark.parametrize("T", [1, 5, 9])
def test_a_prefix_has_the_bits_of_the_sliced_weight(T, dtype, packed):
    """Both prefixes, with blocks, across chains of 256 inputs and panels of 16 features."""
    K, N, ib, ob, k, n = 600, 40, 2, 3, 530, 23
    x, weight, bias = draw(T, K, N, dtype, ib, ob)
    y = packed_linear(x, *pack_linear(weight, ob, packed, ib), bias, k, n, in_blocks=ib)
    sliced = weight.view(ob, N, ib, K)[:, :n, :, :k].reshape(ob * n, ib * k)
    panels, scales, format = pack_linear(sliced, ob, packed, ib)
    if packed:  # the scales are those of the whole rows
        whole, scales, _ = pack_linear(weight, ob, packed, ib)
        scales = scales.flatten(1)[:, :32].reshape(ob, 2, 16).contiguous()
        words = whole.unflatten(2, (ib, -1))[:, :2, :, : -(-k // 4)].clone()
        words[:, :, :, -1, :, k % 4 or 4 :] = 0  # inputs that fill up the last word
        panels = words.flatten(2, 3)
    narrow = x.view(T, ib, K)[:, :, :k].reshape(T, ib * k)
    bias = bias.view(ob, N)[:, :n].flatten()
    assert torch.equal(y, packed_linear(narrow, panels, scales, format, bias, k, n, in_blocks=ib))


@each_dtype
@each_packing
def test_a_row_has_the_same_bits_in_any_batch(dtype, packed):
    """Alone, among few and among many, in any order, with any extents beside it."""
    K, N = 530, 75
    x, weight, bias = draw(300, K, N, dtype)
    panels = pack_linear(weight, format=packed)
    y = packed_linear(x, *panels, bias, K, N)
    for T in (1, 2, 3, 5, 6, 7, 8, 12, 13, 64):
        assert torch.equal(packed_linear(x[-T:], *panels, bias, K, N), y[-T:])
    order = torch.randperm(300)
    assert torch.equal(packed_linear(x[order], *panels, bias, K, N), y[order])
    for name, high in (("in_extent", K), ("out_extent", N)):
        extent = torch.randint(0, high + 1, (300,))
        mixed = packed_linear(x, *panels, bias, K, N, **{name: extent})
        shuffled = packed_linear(x[order], *panels, bias, K, N, **{name: extent[order]})
        assert torch.equal(shuffled, mixed[order])
        for t in (0, 7, 299):
            one = packed_linear(x[t : t + 1], *panels, bias, K, N, **{name: extent[t : t + 1]})
            assert torch.equal(one[0], mixed[t])


@each_packing
def test_threads_do_not_change_a_bit(packed, set_threads):
    x, weight, bias = draw(140, 300, 100, torch.bfloat16)
    panels, extent = pack_linear(weight, format=packed), torch.randint(0, 101, (140,))
    run = lambda: packed_linear(x, *panels, bias, 300, 100, out_extent=extent)  # noqa: E731
    several = run()
    for threads in (1, 5):
        set_threads(threads)
        assert torch.equal(run(), several)


@each_dtype
@pytest.mark.parametrize("T", [1, 8, 40])
def test_nothing_beyond_an_extent_is_used(T, dtype):
    """NaN beyond the widest token in the panels, beyond each token's own in x: none comes back."""
    K, N = 48, 40
    x, weight, bias = draw(T, K, N, dtype)
    for name, high in (("in_extent", 30), ("out_extent", 20)):
        extent = torch.randint(0, high + 1, (T,))
        extent[0] = high
        clean = packed_linear(x, *pack_linear(weight), bias, K, N, **{name: extent})
        poisoned, used, b = weight.clone(), x.clone(), bias.clone()
        if name == "in_extent":
            poisoned[:, high:] = torch.nan
            used[torch.arange(K) >= extent[:, None]] = torch.nan
        else:
            poisoned[high:], b[high:] = torch.nan, torch.nan
        assert torch.equal(packed_linear(used, *pack_linear(poisoned), b, K, N, **{name: extent}), clean)
        assert name == "in_extent" or not clean[torch.arange(N) >= extent[:, None]].any()


@each_dtype
@pytest.mark.parametrize("T", [1, 5, 40])
def test_a_sum_over_thousands_of_inputs(T, dtype):
    """In blocks, of several panels each."""
    x, weight, bias = draw(T, 2048, 40, dtype, 2, 2)
    y = packed_linear(x, *pack_linear(weight, 2, None, 2), bias, 2048, 40, in_blocks=2)
    plain, exact = (
        reference.elastic_linear(*values, 2048, 40, in_blocks=2, out_blocks=2)
        for values in ((x, weight, bias), (x.double(), weight.double(), bias.double()))
    )
    assert_no_worse(y, plain, exact, f"T={T}", dtype)


def test_int8_is_as_near_as_its_step():
    """Each weight is off by at most half a step of its row, 1/254 of the row's largest."""
    x, weight, _ = draw(64, 256, 100, torch.float32)
    weight[3] = 0
    panels, scales, format = pack_linear(weight, format="int8")
    y = packed_linear(x, panels, scales, format, None, 256, 100)
    step = weight.abs().amax(1) / 127
    assert ((y - x @ weight.T).abs() <= x.abs().sum(1, keepdim=True) * step / 2 + 1e-3).all()
    assert not y[:, 3].any()
    assert panels.numel() < weight.numel() * 1.2 and panels.dtype == torch.int8


def test_strides_and_leading_dimensions():
    x, weight, bias = draw(12, 33, 20, torch.bfloat16)
    panels = pack_linear(weight)
    y = packed_linear(x, *panels, bias, 33, 20)
    assert torch.equal(packed_linear(x.T.contiguous().T, *panels, bias, 33, 20), y)
    assert torch.equal(packed_linear(x.view(3, 4, 33), *panels, bias, 33, 20), y.view(3, 4, 20))
    assert torch.equal(packed_linear(x[::2], *panels, bias[:20], 33, 20), y[::2])
    assert torch.equal(pack_linear(weight.T.contiguous().T)[0], panels[0])


def test_it_has_no_gradient():
    x, weight, bias = draw(3, 8, 8, torch.float32)
    y = packed_linear(x.requires_grad_(), *pack_linear(weight), bias, 8, 8)
    with pytest.raises(NotImplementedError, match="packed_linear: inputs must not need a gradient"):
        y.sum().backward()


BAD = [
    (dict(in_features=13), ValueError, r"in_features must lie in \[0, 12\], got 13"),
    (dict(out_features=17), ValueError, r"out_features must lie in \[0, 16\], got 17"),
    (
        dict(panels=torch.randn(1, 1, 12, 16)),
        ValueError,
        r"panels must have shape \[blocks, P, words, 16, 1\]",
    ),
    (
        dict(panels=torch.randn(1, 1, 6, 16, 2)),
        ValueError,
        r"panels must have shape \[blocks, P, words, 16, 1\]",
    ),
    (dict(panels=torch.randn(1, 1, 6, 16, 2).bfloat16()), TypeError, "panels must have the dtype of x"),
    (
        dict(panels=torch.ones(1, 1, 3, 16, 4, dtype=torch.int8), format="int8"),
        TypeError,
        "scales must be a tensor",
    ),
    (dict(panels=torch.ones(1, 1, 3, 16, 4, dtype=torch.int8)), TypeError, "panels must have the dtype of x"),
    (dict(format="int8"), TypeError, "panels must be torch.int8 in format int8, got torch.float32"),
    (
        dict(format="bfloat16"),
        TypeError,
        "panels must be torch.bfloat16 in format bfloat16, got torch.float32",
    ),
    (dict(format="int3"), ValueError, "format must be one of float32, bfloat16, float16, int8, got int3"),
    (dict(scales=torch.ones(1, 1, 16)), ValueError, "scales must be None unless panels are int8"),
    (dict(in_blocks=5), ValueError, r"x.shape\[-1\] must be divisible by in_blocks \(5\), got 12"),
    (dict(x=torch.randn(3, 12).double()), TypeError, "x must be float32, bfloat16, float16, got float64"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_arguments_get_one_sentence(change, error, message):
    x, weight, bias = draw(11, 12, 10, torch.float32)
    arguments = dict(x=x, **pack_linear(weight)._asdict(), bias=bias, in_features=12, out_features=10)
    with pytest.raises(error, match=f"packed_linear: {message}"):
        packed_linear(**arguments | change)
    with pytest.raises(RuntimeError, match="packed_linear: "):  # the op itself checks too
        torch.ops.flextron.packed_linear(**arguments | change)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(3),), "weight must have 2 dimensions"),
        ((torch.ones(3, 4), 2), r"weight.shape\[0\] must be divisible by out_blocks \(2\), got 3"),
        ((torch.ones(3, 4), 1, None, 3), r"weight.shape\[1\] must be divisible by in_blocks \(3\), got 4"),
        (
            (torch.ones(4, 4), 1, "float16"),
            "format must be float32, the weight's dtype, or have scales, got float16",
        ),
        ((torch.ones(4, 4), 1, "int3"), "format must be one of float32, bfloat16, float16, int8, got int3"),
    ],
)
def test_packing_refuses_what_it_cannot_pack(arguments, message):
    with pytest.raises(ValueError, match=f"pack_linear: {message}"):
        pack_linear(*arguments)


def test_the_op_and_python_list_the_same_formats():
    x, weight, bias = draw(11, 12, 10, torch.float32)
    panels, scales, _ = pack_linear(weight)
    names = ", ".join(PanelFormat)
    with pytest.raises(RuntimeError, match=f"packed_linear: format must be one of {names}, got int3"):
        torch.ops.flextron.packed_linear(x, panels, scales, "int3", bias, 12, 10)


@pytest.mark.parametrize("given", PanelFormat)
@pytest.mark.parametrize("format", PanelFormat)
def test_the_op_itself_refuses_panels_of_another_format(format, given):
    dtype = torch.float32 if format.scaled else format.storage
    x, weight, bias = draw(11, 12, 10, dtype)
    panels, scales, _ = pack_linear(weight, format=format)
    arguments = (x, panels, scales, given.value, bias, 12, 10)
    if given is format:
        torch.ops.flextron.packed_linear(*arguments)
        return
    with pytest.raises(
        RuntimeError, match=f"packed_linear: panels must have dtype .* in format {given}, got"
    ):
        torch.ops.flextron.packed_linear(*arguments)


FILES = [
    "tests/test_ops.py",
    "tests/ops/test_elastic_mlp.py",
    "tests/ops/test_packed_linear.py",
    "tests/ops/test_packed_mlp.py",
]


@pytest.mark.skipif("FLEXTRON_ISA" in os.environ, reason="runs in every instruction set's own process")
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_each_instruction_set(isa, processes):
    """Every case of the GEMM ops, on each set of loops that this build has and this machine runs."""
    which = "(packed or elastic_mlp) and not (opcheck or compiles or exports)"
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[2:]))"
    done = run_python(processes, isa, code, "-x", "-p", "no:cacheprovider", "-k", which, *FILES)
    assert done.rc == 0, done.out[-3000:]
