"""packed_linear: one packed copy serves every prefix; a row's bits depend on that row and its prefix alone."""

import os

import gguf
import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INSTRUCTION_SETS, run_python

from flextron.testing.numerics import assert_no_worse
from flextron_ext import PanelFormat, pack_linear, packed_linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKED = [None, "int8", "w8a8", "int4"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_packing = pytest.mark.parametrize("packed", PACKED, ids=["same", *PACKED[1:]])
each_quantised = pytest.mark.parametrize("packed", [each for each in PanelFormat if each.quantised])


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
    if packed:  # the scales are those of the whole rows, or of all inputs of a group
        whole, scales, _ = pack_linear(weight, ob, packed, ib)
        words = format.out_of_slices(whole).unflatten(2, (ib, -1))[:, :2, :, : format.words(k)].clone()
        words[:, :, :, -1, :, 2:] = 0 if packed == "int8" else 85  # inputs that fill up the last word
        panels = format.in_slices(words.flatten(2, 3))
        if packed == "int4":
            used = format.out_of_slices(scales).unflatten(2, (ib, -1))[:, :2, :, : -(-k // 32)]
            scales = format.in_slices(used.flatten(2, 3))
        else:
            scales = scales[:, :2].contiguous()
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


@each_dtype
@each_quantised
@pytest.mark.parametrize("T", [1, 8, 40])
def test_nothing_beyond_an_extent_is_used_of_integers(T, dtype, packed):
    """Widths that end inside a group of inputs; NaN beyond them in x, and in the scales of what no token uses."""
    K, N = 160, 40
    x, weight, bias = draw(T, K, N, dtype)
    panels, scales, format = pack_linear(weight, format=packed)
    for name, high in (("in_extent", 75), ("out_extent", 20)):
        extent = torch.randint(0, high + 1, (T,))
        extent[0] = high
        clean = packed_linear(x, panels, scales, format, bias, K, N, **{name: extent})
        used, codes, poisoned, b = x.clone(), panels.clone(), scales.clone(), bias.clone()
        if name == "in_extent":
            used[torch.arange(K) >= extent[:, None]] = torch.nan
            codes[:, :, format.words(high) :] = 85
            if packed == "int4":
                poisoned[:, :, -(-high // 32) :] = torch.nan
        else:
            codes[:, 2:], poisoned[:, 2:], b[high:] = 85, torch.nan, torch.nan
        ours = packed_linear(used, codes, poisoned, format, b, K, N, **{name: extent})
        assert torch.equal(ours, clean)
        assert name == "in_extent" or not clean[torch.arange(N) >= extent[:, None]].any()


@each_quantised
@pytest.mark.parametrize("T", [1, 17])
def test_inputs_become_integers_by_groups_of_their_own(T, packed):
    """A weight that picks an input: it comes back as the reference rounds it, by steps of 1/127 of the largest."""
    size = torch.logspace(-20, 20, 3).repeat_interleave(32)[:70]
    x = torch.randn(T, 70) * size
    x[0, 3], x[-1, :32], x[-1, 32:64] = 0.0, 0.0, 1e-35
    weight = torch.eye(70) * (127 if packed == "w8a8" else 15)  # scales of 1
    y = packed_linear(x, *pack_linear(weight, format=packed), None, 70, 70)
    near = weight[0, 0] * reference.quantised(x)
    torch.testing.assert_close(y / size, near / size, rtol=1e-6, atol=1e-4)  # a step is some 0.3
    assert y[-1, 64:].any() and not y[-1, :64].any()
    for value in (torch.nan, torch.inf):
        x[0, 5] = value
        y = packed_linear(x, *pack_linear(weight, format=packed), None, 70, 70)
        assert not y[0].isfinite().any() and y[1:].isfinite().all()


@each_quantised
@each_dtype
@pytest.mark.parametrize("T", [1, 5, 40])
def test_integers_over_thousands_of_inputs(T, dtype, packed):
    """In blocks, whose last group is not whole, of several panels each."""
    x, weight, bias = draw(T, 2040, 40, dtype, 2, 2)
    sizes = (bias, 2040, 40)
    panels = pack_linear(weight, 2, packed, 2)
    y = packed_linear(x, *panels, *sizes, in_blocks=2)
    plain = reference.packed_linear(x, *panels, *sizes, in_blocks=2)
    exact = reference.packed_linear(x.double(), *panels, bias.double(), *sizes[1:], in_blocks=2)
    assert_no_worse(y, plain, exact, f"T={T}", dtype)


def test_int4_is_as_near_as_its_step():
    """The error of a group is at most that of 16 even steps from its least value to its greatest."""
    weight = torch.randn(100, 250)
    weight[3], weight[4] = 0, -0.25
    panels, scales, format = pack_linear(weight, format="int4")
    found = reference._unpacked(panels, scales, format, torch.float32)[:100, :250]
    groups, near = (F.pad(w, (0, 6), value=-0.25).unflatten(1, (-1, 32)) for w in (weight, found))
    low, high = groups.aminmax(dim=2, keepdim=True)
    step = (high - low) / 15
    even = torch.where(step > 0, ((groups - low) / step).round() * step + low, groups)
    limit = (groups - even).norm(dim=2) + 0.05 * step[..., 0]  # float16 rounds both numbers
    assert ((groups - near).norm(dim=2)[:, :-1] <= limit[:, :-1]).all()
    assert ((groups - near).norm() < 0.98 * (groups - even).norm()).all()
    assert torch.equal(found[3:5], weight[3:5])
    assert panels.nbytes + scales.nbytes == 112 * 256 * 5 / 8


@pytest.mark.parametrize("products", [None, torch.randn(256, 256).cov()], ids=["alone", "fed"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_weights_of_a_gguf_file_of_4_bits_come_back(kind, products):
    """Whichever of its codes a group has; a scale of Q4_K is a product of which float16 holds the first 11 bits."""
    if kind == "Q4_K":
        codes, least = torch.randint(0, 16, (48, 8, 32)), 0.003 * torch.randint(0, 64, (48, 8, 1))
        weight = (0.0017 * torch.randint(1, 64, (48, 8, 1)) * codes - least).flatten(1)
    else:
        type_ = getattr(gguf.GGMLQuantizationType, kind)
        drawn = torch.randn(48, 8, 32)
        drawn[:6] = drawn[:6].round() + 3  # few of the codes are used
        weight = torch.from_numpy(gguf.dequantize(gguf.quantize(drawn.flatten(1).numpy(), type_), type_))
    ours = reference._unpacked(*pack_linear(weight, format="int4", products=products), torch.float32)
    exact = kind != "Q4_K"
    assert torch.equal(ours, weight) if exact else (ours - weight).norm() < 2**-11 * weight.norm()
    for dtype in (
        torch.bfloat16,
        torch.float16,
    ):  # as a model that is held so has them: nearer to the file's than that
        stored = weight.to(dtype)
        ours = reference._unpacked(*pack_linear(stored, format="int4", products=products), torch.float32)
        assert (ours - weight).norm() < 1.05 * (stored.float() - weight).norm() + 2**-11 * weight.norm()


def test_feedback_makes_a_prefix_nearer_too():
    """Of inputs that go together: the sum misses less than with each weight rounded alone, where a width is wide."""
    x = torch.randn(400, 20) @ torch.randn(20, 104) + 0.3 * torch.randn(400, 104)
    weight = torch.randn(64, 104)
    alone = pack_linear(weight, format="int4", in_blocks=2)
    fed = pack_linear(weight, format="int4", in_blocks=2, products=x.T @ x)
    a, b = (reference._unpacked(*p, torch.float32)[:64].unflatten(1, (2, 64))[..., :52] for p in (alone, fed))
    inputs, exact = x.unflatten(1, (2, 52)), weight.unflatten(1, (2, 52))
    for width, share in (
        (52, 0.5),
        (39, 0.85),
        (26, 0.95),
        (8, 1.05),
    ):  # the narrower, the less is behind an input
        missed = [
            torch.einsum("tbi,nbi->tn", inputs[..., :width], (w - exact)[..., :width]).norm() for w in (a, b)
        ]
        assert missed[1] < share * missed[0], (width, missed)


def test_feedback_of_few_tokens_does_not_miss_more_on_others():
    mixing = torch.randn(256, 256) / 16 + torch.eye(256)
    seen, others = (torch.randn(n, 256) @ mixing for n in (300, 3000))
    weight = torch.randn(96, 256)
    packed = [pack_linear(weight, format="int4", products=p) for p in (None, seen.T @ seen)]
    alone, fed = ((others @ (reference._unpacked(*p, torch.float32) - weight).T).norm() for p in packed)
    assert fed < 0.95 * alone, (fed, alone)


def test_int4_refuses_what_float16_scales_cannot_hold():
    for value in (1e6, torch.nan, torch.inf):
        weight = torch.ones(4, 40)
        weight[1, 35] = value
        with pytest.raises(ValueError, match=r"pack_linear: weight must be of a size up to 65504 in int4"):
            pack_linear(weight, format="int4")


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
    (dict(format="int3"), ValueError, f"format must be one of {', '.join(PanelFormat)}, got int3"),
    (
        dict(scales=torch.ones(1, 1, 16)),
        ValueError,
        "scales must be None unless panels are int8 or w8a8 or int4",
    ),
    (
        dict(panels=torch.ones(1, 1, 3, 16, 4, dtype=torch.uint8), format="int4"),
        ValueError,
        r"panels must have shape \[blocks, P, 4 \* groups, 16, 4\] in format int4",
    ),
    (
        dict(
            panels=torch.ones(1, 1, 4, 16, 4, dtype=torch.uint8),
            scales=torch.ones(1, 1, 1, 2, 16),
            format="int4",
        ),
        TypeError,
        "scales must be float16, got float32",
    ),
    (
        dict(
            panels=torch.ones(1, 1, 8, 16, 4, dtype=torch.int8),
            scales=torch.ones(1, 1, 16),
            format="w8a8",
            in_blocks=2,
        ),
        ValueError,
        r"panels.shape\[2\] must be divisible by in_blocks \(2\) times 8, got 8",
    ),
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
        (
            (torch.ones(4, 4), 1, "int8", 1, torch.ones(4, 4)),
            "products must be None unless format is int4, got a tensor for int8",
        ),
        (
            (torch.ones(4, 4), 1, "int4", 1, torch.ones(3, 3)),
            r"products must have shape \[4, 4\], got \[3, 3\]",
        ),
        ((torch.ones(4, 4), 1, "int3"), f"format must be one of {', '.join(PanelFormat)}, got int3"),
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
    if given.storage is format.storage:
        pytest.skip("int8 and w8a8 differ in how much fills up a block")
    with pytest.raises(
        RuntimeError, match=f"packed_linear: panels must have dtype .* in format {given}, got"
    ):
        torch.ops.flextron.packed_linear(*arguments)


BITS = """
import hashlib, torch
from flextron_ext import pack_linear, packed_linear

torch.manual_seed(0)
found = hashlib.sha256()
K, N, ib, ob, k, n = 1100, 40, 2, 3, 1050, 37  # groups of more than one step of the unit, the last not whole
weight = torch.randn(ob * N, ib * K)
for packed in ("w8a8", "int4"):
    panels = pack_linear(weight, ob, packed, ib)
    for T in (1, 7, 8, 9, 16, 40, 290):
        x, bias = torch.randn(T, ib * k), torch.randn(ob * N)
        for name in (None, "in_extent", "out_extent"):
            extents = {name: torch.tensor([n, 3, 20, n, 0, n])[torch.arange(T) // 31 % 6]} if name else {}
            if name == "in_extent":
                extents[name] *= k // n
            found.update(packed_linear(x, *panels, bias, k, n, **extents, in_blocks=ib).numpy().tobytes())
print(found.hexdigest())
"""


@pytest.mark.skipif(os.environ.get("FLEXTRON_ISA") == "generic", reason="adds without fused operations")
@pytest.mark.parametrize("isa", ["here", *INSTRUCTION_SETS[2:]])
def test_integers_have_the_same_bits_on_every_instruction_set(isa, processes, capsys):
    """That of this process, which may be emulated, and the others, of which the generic one rounds products."""
    if isa == "here":
        exec(BITS, {})
        found = capsys.readouterr().out
    else:
        found = run_python(processes, isa, BITS).out
    assert len(found) > 64 and found == run_python(processes, "avx2", BITS).out


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
