"""What is peculiar to elastic_linear: prefixes inside blocks, the staircase, and what lies beyond."""

from itertools import product

import pytest
import torch
from emulator import build as emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from flextron.testing.numerics import assert_no_worse
from flextron_ext import _C, elastic_linear, reference

T, K, N = 11, 12, 10
KERNELS = emulator.loaded()  # our own compute for CPU tensors, not the vendor's GEMM on views


def inputs(ib=1, ob=1, dtype=torch.float32, T=T):
    x = torch.randn(T, ib * K, dtype=dtype)
    return x, torch.randn(ob * N, ib * K, dtype=dtype), torch.randn(ob * N, dtype=dtype)


def beyond(tensor, keep):
    """The tensor with NaN wherever keep is False."""
    return torch.where(keep, tensor, torch.nan)


def assert_same(ours, expected, exact=KERNELS):
    """Bit for bit where our own kernels made both: the vendor's add up in an order that depends on the shape."""
    torch.testing.assert_close(ours, expected, **(dict(rtol=0, atol=0) if exact else {}))


def test_slices_equal_the_op():
    x, weight, bias = inputs()
    y = elastic_linear(x, weight, bias, 7, 5)
    torch.testing.assert_close(y, torch.nn.functional.linear(x[:, :7], weight[:5, :7], bias[:5]))


def test_full_extent_is_plain_linear():
    x, weight, bias = inputs(ib=2, ob=3)
    y = elastic_linear(x, weight, bias, K, N, in_blocks=2, out_blocks=3)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_nothing_beyond_an_extent_is_used(side, blocks):
    """NaN beyond the widest token in the weight, beyond each token's own in x and dy: no NaN comes back."""
    x, weight, bias = inputs(blocks, blocks)
    extent = torch.randint(0, 6, (T,))
    widest, total = int(extent.max()), K if side == "in" else N
    inside = (torch.arange(total) < extent[:, None]).repeat(1, blocks)
    live = (torch.arange(total) < widest).repeat(blocks)
    if side == "in":
        poisoned = beyond(x, inside), beyond(weight, live), bias
        cotangent = torch.randn(T, blocks * N)
    else:
        poisoned = x, beyond(weight, live[:, None]), beyond(bias, live)
        cotangent = beyond(torch.randn(T, blocks * N), inside)
    clean = [value.nan_to_num(0.0) for value in poisoned]
    sizes = {f"{side}_extent": extent, "in_blocks": blocks, "out_blocks": blocks}
    results = []
    for values, dy in ((poisoned, cotangent), (clean, cotangent.nan_to_num(0.0))):
        leaves = [value.clone().requires_grad_() for value in values]
        y = elastic_linear(*leaves, K, N, **sizes)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    _, dx, dweight, dbias = results[0]
    assert not (dx if side == "in" else torch.zeros(1))[(~inside) if side == "in" else slice(0)].any()
    assert not dweight[..., ~live].any() if side == "in" else not dweight[~live].any()
    assert side == "in" or not dbias[~live].any()


def test_permuting_tokens_permutes_outputs():
    x, weight, bias = inputs()
    extent, order = torch.randint(0, N + 1, (T,)), torch.randperm(T)
    y = elastic_linear(x, weight, bias, K, N, out_extent=extent)
    assert_same(elastic_linear(x[order], weight, bias, K, N, out_extent=extent[order]), y[order])


def test_extent_zero_keeps_the_bias_of_the_outputs_that_exist():
    x, weight, bias = inputs()
    zero = torch.zeros(T, dtype=torch.int64)
    assert torch.equal(elastic_linear(x, weight, bias, K, N, in_extent=zero), bias.expand(T, N))
    assert torch.equal(elastic_linear(x, weight, bias, K, N, out_extent=zero), torch.zeros(T, N))


def test_leading_dimensions_are_kept():
    x, weight, bias = inputs(T=12)
    extent = torch.randint(0, N + 1, (3, 4))
    y = elastic_linear(x.view(3, 4, K), weight, bias, K, N, out_extent=extent)
    assert torch.equal(y.view(12, N), elastic_linear(x, weight, bias, K, N, out_extent=extent.view(12)))


def test_expanded_and_transposed_gradients():
    leaves = [value.requires_grad_() for value in inputs(ib=2, ob=2, dtype=torch.float64)]
    extent = torch.randint(0, 9, (T,))
    for spread in (lambda y: y.sum(), lambda y: (y.T @ torch.ones(T, 3, dtype=y.dtype)).sum()):
        ours, theirs = (
            torch.autograd.grad(
                spread(run(*leaves, 9, 7, in_extent=extent, in_blocks=2, out_blocks=2)), leaves
            )
            for run in (elastic_linear, reference.elastic_linear)
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


def test_gradcheck():
    leaves = [value.requires_grad_() for value in inputs(ib=2, ob=2, dtype=torch.float64, T=4)]
    for extents in (
        {},
        {"in_extent": torch.tensor([0, 3, 5, 3])},
        {"out_extent": torch.tensor([4, 0, 7, 7])},
    ):
        run = lambda x, w, b, e=extents: elastic_linear(x, w, b, 5, 7, in_blocks=2, out_blocks=2, **e)  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves, fast_mode=KERNELS)  # thousands of launches otherwise


@pytest.mark.parametrize("asks", [asks for asks in product([False, True], repeat=3) if any(asks)])
def test_every_combination_of_gradients(asks):
    leaves = [value.requires_grad_(ask) for value, ask in zip(inputs(), asks, strict=True)]
    extent = torch.randint(0, N + 1, (T,))
    elastic_linear(*leaves, K, N, out_extent=extent).square().sum().backward()
    ours = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    reference.elastic_linear(*leaves, K, N, out_extent=extent).square().sum().backward()
    for mine, leaf in zip(ours, leaves, strict=True):
        assert (mine is None) == (leaf.grad is None)
        if mine is not None:
            torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-4)


def multiplied(run) -> int:
    """Multiply-adds of the GEMMs run makes, from the shapes the profiler records."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    total = 0
    for event in recorded.events():
        if event.name in ("aten::mm", "aten::addmm"):
            matrices = [shape for shape in event.input_shapes if len(shape) == 2]
            a, b = matrices[-3:-1]  # the last one is the output
            total += a[0] * a[1] * b[1]
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("T", [1, 8, 9, 70])
def test_our_own_gemm_gives_a_prefix_the_bits_of_the_sliced_weight(T, blocks, dtype, monkeypatch):
    """And a row the same in any batch: of dot products, up to 8 rows, and of tiles."""
    monkeypatch.setenv("FLEXTRON_KERNEL", "tile")
    K, N, k, n = 600, 40, 533, 23
    x = torch.randn(T, blocks * K).to(dtype)
    weight, bias = torch.randn(blocks * N, blocks * K).to(dtype), torch.randn(blocks * N).to(dtype)
    y = elastic_linear(x, weight, bias, k, n, in_blocks=blocks, out_blocks=blocks)
    sliced = weight.view(blocks, N, blocks, K)[:, :n, :, :k].reshape(blocks * n, blocks * k)
    narrow = x.view(T, blocks, K)[:, :, :k].reshape(T, blocks * k)
    part = bias.view(blocks, N)[:, :n].flatten()
    assert torch.equal(y, elastic_linear(narrow, sliced, part, k, n, in_blocks=blocks, out_blocks=blocks))
    order = torch.randperm(T)[: max(9, T // 2)] if T > 8 else torch.randperm(T)[: 1 + T // 2]
    some = elastic_linear(x[order], weight, bias, k, n, in_blocks=blocks, out_blocks=blocks)
    assert torch.equal(some, y[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("T", [1, 9, 300])
def test_our_own_gradients_have_the_bits_of_the_sliced_weight(T, blocks, dtype, monkeypatch):
    """Across chains of 256 tokens and features, panels of 16, blocks of 256 rows; and nothing beyond a prefix."""
    monkeypatch.setenv("FLEXTRON_KERNEL", "tile")
    K, N, k, n = 90, 300, 75, 283
    x, weight = torch.randn(T, blocks * K).to(dtype), torch.randn(blocks * N, blocks * K).to(dtype)
    dy = torch.randn(T, blocks * n).to(dtype)
    sliced = weight.view(blocks, N, blocks, K)[:, :n, :, :k].reshape(blocks * n, blocks * k)
    narrow = x.view(T, blocks, K)[:, :, :k].reshape(T, blocks * k)

    def gradients(x, weight):
        leaves = x.requires_grad_(), weight.requires_grad_()
        return torch.autograd.grad(
            elastic_linear(*leaves, None, k, n, None, None, blocks, blocks), leaves, dy
        )

    (dx, dweight), (dx_part, dweight_part) = gradients(x, weight), gradients(narrow, sliced)
    dx, dweight = dx.view(T, blocks, K), dweight.view(blocks, N, blocks, K)
    assert torch.equal(dx[:, :, :k].flatten(1), dx_part) and not dx[:, :, k:].any()
    assert torch.equal(dweight[:, :n, :, :k].reshape(dweight_part.shape), dweight_part)
    assert not dweight[:, n:].any() and not dweight[:, :, :, k:].any()
    wide = [t.detach().double() for t in (dy, narrow, sliced)]
    for ours, plain, exact in (
        (dx_part, dy @ sliced, wide[0] @ wide[2]),
        (dweight_part, dy.T @ narrow, wide[0].T @ wide[1]),
    ):
        assert_no_worse(ours, plain.detach(), exact, f"T={T}", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["in_extent", "out_extent"])
def test_our_own_gradients_with_an_extent_for_each_token(side, dtype, monkeypatch):
    """NaN beyond each token's own in x and dy, beyond the widest in the weight: none comes back."""
    monkeypatch.setenv("FLEXTRON_KERNEL", "tile")
    T, K, N, blocks = 300, 90, 70, 2
    size = K if side == "in_extent" else N
    extent = torch.randint(0, size - 4, (T,))
    live = torch.arange(size) < extent[:, None]
    x, dy = torch.randn(T, blocks, K), torch.randn(T, blocks, N)
    weight = torch.randn(blocks, N, blocks, K)
    if side == "in_extent":
        x, weight[..., size - 5 :] = torch.where(live[:, None], x, torch.nan), torch.nan
    else:
        dy, weight[:, size - 5 :] = torch.where(live[:, None], dy, torch.nan), torch.nan
    values = x.flatten(1).to(dtype), weight.flatten(2).flatten(0, 1).to(dtype)
    dy = dy.flatten(1).to(dtype)

    def gradients(leaves, dy):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        y = elastic_linear(*leaves, None, K, N, in_blocks=blocks, out_blocks=blocks, **{side: extent})
        return torch.autograd.grad(y, leaves, dy)

    clean = [torch.nan_to_num(t) for t in (*values, dy)]
    for ours, plain, exact in zip(
        gradients(values, dy),
        *(
            reference_gradients(side, extent, K, N, blocks, *(t.to(d) for t in clean))
            for d in (dtype, torch.float64)
        ),
        strict=True,
    ):
        assert_no_worse(ours, plain, exact, side, dtype)


def reference_gradients(side, extent, K, N, blocks, x, weight, dy):
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = reference.elastic_linear(*leaves, None, K, N, in_blocks=blocks, out_blocks=blocks, **{side: extent})
    return torch.autograd.grad(y, leaves, dy)


def test_work_is_proportional_to_the_extents(monkeypatch):
    """Of the vendor's GEMMs, which a profiler sees."""
    monkeypatch.setenv("FLEXTRON_KERNEL", "vendor")
    x, weight, _ = inputs()
    extent = torch.tensor([0, 0, 3, 3, 3, 10, 10, 5, 1, 1, 7])
    leaves = [value.requires_grad_() for value in (x, weight)]
    forward = multiplied(lambda: elastic_linear(*leaves, None, K, N, out_extent=extent))
    assert forward == int(extent.sum()) * K
    y = elastic_linear(*leaves, None, K, N, out_extent=extent)
    assert multiplied(lambda: y.sum().backward()) == 2 * int(extent.sum()) * K


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_fuzz(data):
    draw = data.draw
    T, ib, ob = draw(st.integers(0, 65)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    K, N = draw(st.integers(1, 33)), draw(st.integers(1, 33))
    in_features, out_features = draw(st.integers(0, K)), draw(st.integers(0, N))
    side = draw(st.sampled_from([None, "in", "out"]))
    high = in_features if side == "in" else out_features
    extent = draw(st.lists(st.integers(0, high), min_size=T, max_size=T)) if draw(st.booleans()) else [high]
    extents = {} if side is None else {f"{side}_extent": torch.tensor(extent, dtype=torch.int64)}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((T, ib * K), (ob * N, ib * K), (ob * N,))
    )
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    arguments = (in_features, out_features)
    ours = elastic_linear(*leaves, *arguments, in_blocks=ib, out_blocks=ob, **extents)
    theirs = reference.elastic_linear(*leaves, *arguments, in_blocks=ib, out_blocks=ob, **extents)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@given(
    st.integers(1, 40).flatmap(
        lambda high: st.tuples(st.lists(st.integers(0, high), max_size=60), st.just(high))
    )
)
@settings(max_examples=50, deadline=None)
def test_staircase_visits_each_needed_tile_once(drawn):
    extents, maximum = drawn
    stairs = _C.staircase(extents, maximum)
    order = stairs["order"] or list(range(len(extents)))
    assert order == sorted(range(len(extents)), key=lambda t: (-extents[t], t))
    by_steps = [
        (order[i], n)
        for extent, begin, end in stairs["steps"]
        for i in range(begin, end)
        for n in range(extent)
    ]
    by_columns = [
        (order[i], n)
        for begin, end, rows in stairs["column_blocks"]
        for n in range(begin, end)
        for i in range(rows)
    ]
    needed = {(t, n) for t, extent in enumerate(extents) for n in range(extent)}
    assert len(by_steps) == len(by_columns) == len(needed)
    assert set(by_steps) == set(by_columns) == needed


BAD = [
    (dict(in_features=13), ValueError, r"in_features must lie in \[0, 12\], got 13"),
    (dict(out_features=-1), ValueError, r"out_features must lie in \[0, 10\], got -1"),
    (dict(in_blocks=5), ValueError, r"x.shape\[-1\] must be divisible by in_blocks \(5\), got 12"),
    (dict(in_blocks=0), ValueError, r"in_blocks must lie in \[1, 12\], got 0"),
    (dict(bias=torch.randn(9)), ValueError, r"bias must have shape \[10\], got \[9\]"),
    (dict(weight=torch.randn(10, 12, dtype=torch.float64)), TypeError, "weight must have the dtype of x"),
    (dict(weight=torch.randn(10)), ValueError, "weight must have 2 dimensions, got 1"),
    (dict(x=torch.ones(3, 12, dtype=torch.int64)), TypeError, "x must be float32, .*got int64"),
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (dict(in_extent=torch.tensor([1.0])), TypeError, "in_extent must be int32, int64, got float32"),
    (
        dict(in_extent=torch.tensor([1, 2])),
        ValueError,
        r"in_extent must have shape \[1\] or \[11\], got \[2\]",
    ),
    (
        dict(in_extent=torch.tensor([1]), out_extent=torch.tensor([1])),
        ValueError,
        "in_extent must be None when out_extent",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_arguments_get_one_sentence(change, error, message):
    x, weight, bias = inputs()
    arguments = dict(x=x, weight=weight, bias=bias, in_features=K, out_features=N) | change
    with pytest.raises(error, match=f"elastic_linear: {message}"):
        elastic_linear(**arguments)
    if error is not TypeError or isinstance(arguments["x"], torch.Tensor):
        with pytest.raises(RuntimeError, match="elastic_linear: "):  # the op itself checks too
            torch.ops.flextron.elastic_linear(**arguments)


@pytest.mark.parametrize("name, extent, allowed", [("in_extent", 13, 12), ("out_extent", -1, 0)])
def test_a_wrong_extent_is_refused_where_the_host_reads_it(name, extent, allowed):
    """And moved into its range where it does not: a kernel never reads or writes beside its tensors."""

    def run(extent):
        return elastic_linear(*inputs(), K, N, **{name: torch.tensor(extent)})

    for shape in (1, T):
        if not KERNELS:
            with pytest.raises(RuntimeError, match=rf"elastic_linear: {name} must lie in .*, got {extent}"):
                run([extent] * shape)
            continue
        torch.manual_seed(0)
        ours = run([extent] * shape)
        torch.manual_seed(0)
        assert torch.equal(ours, run([allowed] * shape))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(in_blocks="a"), "in_blocks must be an integer, got str"),
        (dict(in_blocks=2.0), "in_blocks must be an integer, got float"),
        (dict(weight=None), "weight must be a tensor, got NoneType"),
    ],
)
def test_the_wrapper_names_a_wrong_type(change, message):
    x, weight, bias = inputs()
    with pytest.raises(TypeError, match=f"elastic_linear: {message}"):
        elastic_linear(**(dict(x=x, weight=weight, bias=bias, in_features=K, out_features=N) | change))


@pytest.fixture
def gpu(device):
    """The device of a GPU or of its emulator. More of what kernels promise there is in test_elastic_linear_tiles.py."""
    if device == "cpu" and not KERNELS:
        pytest.skip("needs a GPU, or FLEXTRON_EMULATE=1")
    return device


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def on(gpu, dtype, *values):
    return [value.to(gpu, dtype) for value in values]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_address_and_stride_gives_the_same_bits(dtype, gpu, monkeypatch):
    monkeypatch.setenv("FLEXTRON_ARCH", "80")  # the Hopper kernel leaves what it cannot take to the other one
    T, K, N = 70, 72, 40
    x, weight, bias = on(gpu, dtype, torch.randn(T, K), torch.randn(N, K), torch.randn(N))
    y = elastic_linear(x, weight, bias, K, N)

    def moved(t, start, more):
        wide = t.new_full((t.shape[0], t.shape[1] + start + more), torch.nan)
        wide[:, start : start + t.shape[1]] = t
        return wide[:, start : start + t.shape[1]]

    for start, more in ((8, 0), (1, 7), (0, 3)):
        assert torch.equal(elastic_linear(moved(x, start, more), weight, bias, K, N), y)
        assert torch.equal(elastic_linear(x, moved(weight, start, more), bias, K, N), y)
    assert torch.equal(elastic_linear(x.T.contiguous().T, weight.T.contiguous().T, bias, K, N), y)
    assert torch.equal(elastic_linear(x[:1].expand(T, K), weight, bias, K, N), y[:1].expand(T, N))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_give_the_bits_of_few(dtype, gpu):
    """Above 1024 rows the portable kernel's tiles are larger."""
    x, weight, bias = on(gpu, dtype, torch.randn(1030, 40), torch.randn(24, 40), torch.randn(24))
    extent = torch.randint(0, 41, (1030,), device=gpu)
    y = elastic_linear(x, weight, bias, 40, 24, in_extent=extent)
    assert torch.equal(elastic_linear(x[-70:], weight, bias, 40, 24, in_extent=extent[-70:]), y[-70:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_over_thousands_of_inputs(dtype, gpu):
    x, weight, bias = on(gpu, dtype, torch.randn(40, 2048), torch.randn(16, 2048), torch.randn(16))
    y = elastic_linear(x, weight, bias, 2048, 16)
    plain = reference.elastic_linear(x, weight, bias, 2048, 16)
    assert_no_worse(y, plain, reference.elastic_linear(x.double(), weight.double(), bias.double(), 2048, 16))


@pytest.mark.parametrize("T", [8192, 8193], ids=["by one kernel", "by torch"])
def test_more_rows_than_one_kernel_sorts(T, gpu):
    x, weight = torch.randn(T, 8, device=gpu), torch.randn(8, 8, device=gpu)
    extent = torch.randint(0, 9, (T,), device=gpu)
    ours = elastic_linear(x, weight, None, 8, 8, out_extent=extent)
    exact = reference.elastic_linear(x.double(), weight.double(), None, 8, 8, out_extent=extent)
    assert_no_worse(ours, reference.elastic_linear(x, weight, None, 8, 8, out_extent=extent), exact)


def test_an_unknown_path_is_refused(gpu, monkeypatch):
    values = on(gpu, torch.bfloat16, *inputs())
    monkeypatch.setenv("FLEXTRON_KERNEL", "fast")
    with pytest.raises(RuntimeError, match="FLEXTRON_KERNEL must be decode, tile or vendor, got fast"):
        elastic_linear(*values, K, N)
    monkeypatch.setenv("FLEXTRON_KERNEL", "tile")
    monkeypatch.setenv("FLEXTRON_ARCH", "70")
    with pytest.raises(RuntimeError, match="FLEXTRON_ARCH must be 80 or 90, got 70"):
        elastic_linear(*values, K, N)
