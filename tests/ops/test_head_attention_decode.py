"""What head_attention_decode promises beyond the shared suite: caches, pages, splits, equal bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulator import build as emulator
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.testing.numerics import assert_no_worse
from flextron_ext import head_attention, head_attention_decode, reference

KERNELS = emulator.loaded()  # our CUDA kernels for CPU tensors, not the host's loops
UNITS = ["kv_group", "query"]
NAN = float("nan")
LONG = 150 if KERNELS else 1100  # keys: three splits, four parts on a CPU


def draw(B, T, S, H, G, D, dtype=torch.float32, seed=0):
    """q [B, T, H, D], k_cache and v_cache [B, S, G, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def paged(k, v, page, spare=3, seed=0):
    """The same caches cut into shuffled pages, the spare ones NaN: k_cache, v_cache, block_table."""
    B, S, G, D = k.shape
    columns = -(-S // page)
    table = torch.randperm(B * columns + spare, generator=torch.Generator().manual_seed(seed))[: B * columns]
    pools = []
    for cache in (k, v):
        padded = torch.full((B, columns * page, G, D), NAN, dtype=cache.dtype)
        padded[:, :S] = cache
        pool = torch.full((B * columns + spare, page, G, D), NAN, dtype=cache.dtype)
        pool[table] = padded.view(B * columns, page, G, D)
        pools.append(pool)
    return *pools, table.view(B, columns)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(q, k, v, *arguments, **options):
    """out, dq, dk, dv."""
    inputs = leaves(q, k, v)
    out = head_attention_decode(*inputs, *arguments, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("M", [1, 3, 4, 7, 8])
def test_group_ratios(M, unit):
    q, k, v = draw(2, 2, 40, 3 * M, 3, 16)
    seqlens = torch.tensor([40, 17])
    for heads in {1, (3 if unit == "kv_group" else M)}:
        ours = head_attention_decode(q, k, v, seqlens, heads, unit)
        plain = reference.head_attention_decode(q, k, v, seqlens, heads, unit)
        exact = reference.head_attention_decode(q.double(), k.double(), v.double(), seqlens, heads, unit)
        assert_no_worse(ours, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M, T", [(1, 1), (2, 1), (3, 1), (2, 2), (5, 1), (3, 2), (7, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("page", [0, 3])
def test_few_rows(page, M, T, dtype):
    """One to nine rows, keys and head sizes on both sides of a vector; what lies beside them is NaN.

    All sizes of D and S are compared as one result: a single one may have 12 elements, and plain PyTorch's error of so
    few is as much luck as measure.
    """
    found = []
    for D, S in itertools.product([12, 64, 72, 88], [1, 7, 8, 65, 130]):
        q, k, v = draw(1, T, S, 2 * M, 2, D, dtype)
        seqlens = torch.tensor([S])
        plain = reference.head_attention_decode(q, k, v, seqlens, 1)
        exact = reference.head_attention_decode(q.double(), k.double(), v.double(), seqlens, 1)
        caches = [torch.full((1, S + 9, 2, D), NAN, dtype=dtype) for _ in range(2)]
        for cache, kept in zip(caches, (k, v), strict=True):
            cache[:, 4 : S + 4, 0] = kept[:, :, 0]
        table = {}
        if page:
            *caches, table["block_table"] = paged(*caches, page)
        # The first T - S queries see no key.
        ours = head_attention_decode(q, *caches, seqlens + 4, 1, k_start=torch.tensor([4]), **table)
        found.append((ours, plain, exact))
    assert_no_worse(*(torch.cat([t.flatten() for t in results]) for results in zip(*found, strict=True)))


@pytest.mark.skipif(
    KERNELS, reason="a tile of tensor cores multiplies what one of its rows does not see by 0"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M, page", [(1, 0), (2, 8), (5, 0)])
def test_the_value_of_a_later_new_token_reaches_no_earlier_one(M, page, dtype):
    """Of few rows and of more, with and without gradients, where keys are one part and several."""
    for S in (7, 60, LONG):
        q, k, v = draw(2, 3, S, 2 * M, 2, 64, dtype)
        clean = run(q, k, v, torch.tensor([S, 5]), 2)
        v[0, S - 1] = k[1, 4] = NAN
        k_, v_, options = k, v, {}
        if page:
            k_, v_, options["block_table"] = paged(k, v, page)
        found = run(q, k_, v_, torch.tensor([S, 5]), 2, **options)
        plain = head_attention_decode(q, k_, v_, torch.tensor([S, 5]), 2, **options)
        assert_equal([t[:, :2] for t in found[:2]], [t[:, :2] for t in clean[:2]])
        assert plain[:, :2].isfinite().all() and plain[:, 2].isnan().all() and found[0][:, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [40, 44, 64])
def test_a_row_is_the_same_beside_others(D, dtype):
    """A query head of one of up to eight rows, whatever their number."""
    q, k, v = draw(1, 1, LONG, 16, 2, D, dtype)
    seqlens = torch.tensor([LONG])
    all_heads = head_attention_decode(q, k, v, seqlens, 8, "query").view(2, 8, D)
    for heads in range(1, 8):
        some = head_attention_decode(q, k, v, seqlens, heads, "query").view(2, 8, D)
        assert torch.equal(some[:, :heads], all_heads[:, :heads])


@pytest.mark.parametrize("M", [1, 3, 9])
def test_the_largest_score_may_lie_at_any_key(M):
    """So far above the others that their share is zero: an exponential of it alone would overflow."""
    S = 70
    q, k, v = torch.ones(1, 1, M, 16), torch.zeros(S, S, 1, 16), torch.randn(1, S, 1, 16)
    k[range(S), range(S)] = 100.0  # sequence j has its largest score at key j
    out = head_attention_decode(q.expand(S, -1, -1, -1), k, v.expand(S, -1, -1, -1), torch.full((S,), S), 1)
    assert torch.equal(out, v[0, :, None].expand_as(out))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("page", [0, 4, 16])
def test_the_last_rows_of_the_full_pass(page, T, unit):
    """A cache gives what one pass over the whole sequence gives."""
    S = LONG - 20
    q, k, v = draw(1, S, S, 6, 2, 16)
    full = head_attention(q[0], k[0], v[0], 2, unit)[-T:]
    table = {}
    if page:
        k, v, table["block_table"] = paged(k, v, page)
    ours = head_attention_decode(q[:, -T:], k, v, torch.tensor([S]), 2, unit, **table)
    torch.testing.assert_close(ours[0], full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_pages_are_the_contiguous_cache(kind):
    q, k, v = draw(3, 2, LONG, 6, 2, 16)
    seqlens, start = torch.tensor([LONG, 3, LONG // 2], dtype=kind), torch.tensor([0, 1, 7], dtype=kind)
    expected = run(q, k, v, seqlens, 2, k_start=start)
    k_pages, v_pages, table = paged(k, v, 16)
    out, dq, dk, dv = run(q, k_pages, v_pages, seqlens, 2, k_start=start, block_table=table.to(kind))
    gathered = [pool[table].flatten(1, 2)[:, :LONG] for pool in (dk, dv)]
    assert_equal([out, dq, *gathered], expected)


def test_entries_beyond_the_pages_in_use_are_not_looked_at():
    q, k, v = draw(2, 1, 32, 4, 2, 8)
    k, v, table = paged(k, v, 8)
    seqlens = torch.tensor([9, 0])
    expected = head_attention_decode(q, k, v, seqlens, 2, block_table=table)
    table[0, 2:], table[1] = -1, 1 << 40
    assert torch.equal(head_attention_decode(q, k, v, seqlens, 2, block_table=table), expected)
    assert not expected[1].any()


@pytest.mark.parametrize("page", [0, 8])
def test_what_is_not_selected_is_never_read(page):
    q, k, v = draw(2, 2, 40, 12, 3, 8)
    seqlens, start, extent = torch.tensor([33, 10]), torch.tensor([4, 0]), torch.tensor([2, 1])
    clean = run(q, k, v, seqlens, 3, extent=extent, k_start=start)
    for b in range(2):
        q[b, :, int(extent[b]) * 4 :] = NAN
        for cache in (k, v):
            cache[b, :, int(extent[b]) :] = NAN
            cache[b, : int(start[b])] = NAN
            cache[b, int(seqlens[b]) :] = NAN
    if not page:
        poisoned = run(q, k, v, seqlens, 3, extent=extent, k_start=start)
    else:
        k_pages, v_pages, table = paged(k, v, page)
        out, dq, dk, dv = run(
            q, k_pages, v_pages, seqlens, 3, extent=extent, k_start=start, block_table=table
        )
        unused = torch.ones(len(dk), dtype=torch.bool).scatter_(0, table.flatten(), False)
        assert not dk[unused].any() and not dv[unused].any()
        poisoned = out, dq, dk[table].flatten(1, 2), dv[table].flatten(1, 2)
    assert_equal(clean, poisoned)
    assert not poisoned[0][0, :, 8:].any() and not poisoned[1][1, :, 4:].any()
    assert not poisoned[2][:, :, 2].any() and not poisoned[3][0, 33:].any() and not poisoned[3][0, :4].any()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("T", "dtype"), [(2, torch.float32), (12, torch.bfloat16)], ids=str)
def test_a_mixed_batch_is_its_sequences_apart(T, dtype, unit):
    q, k, v = draw(4, T, LONG, 9, 3, 16, dtype)
    seqlens, counts = [LONG, 2, LONG * 2 // 3, 0], [3, 1, 2, 0]
    mixed = run(q, k, v, torch.tensor(seqlens), 3, unit, extent=torch.tensor(counts))
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for b, (length, count) in enumerate(zip(seqlens, counts, strict=True)):
        inputs = leaves(q[b : b + 1], k[b : b + 1], v[b : b + 1])
        out = head_attention_decode(*inputs, torch.tensor([length]), count, unit)
        alone = [out, *torch.autograd.grad(out, inputs, dout[b : b + 1])]
        assert_equal([part[b : b + 1] for part in mixed], alone)


def test_a_subset_is_the_op_on_sliced_heads():
    q, k, v = draw(2, 1, 700, 12, 3, 16)
    seqlens = torch.tensor([700, 90])
    by_group = head_attention_decode(q, k, v, seqlens, 2)
    assert torch.equal(
        by_group[:, :, :8], head_attention_decode(q[:, :, :8], k[:, :, :2], v[:, :, :2], seqlens, 2)
    )
    kept = torch.arange(12) % 4 < 3
    by_query = head_attention_decode(q, k, v, seqlens, 3, "query")
    assert torch.equal(by_query[:, :, kept], head_attention_decode(q[:, :, kept], k, v, seqlens, 3))
    assert not by_group[:, :, 8:].any() and not by_query[:, :, ~kept].any()


def test_a_shared_page_sums_its_gradients():
    q, k, v = draw(2, 1, 8, 4, 2, 8, torch.float64)
    pool = leaves(q, k.view(4, 4, 2, 8), v.view(4, 4, 2, 8))
    table, seqlens = torch.tensor([[3, 0], [3, 2]]), torch.tensor([7, 8])
    out = head_attention_decode(*pool, seqlens, 2, block_table=table)
    exact = reference.head_attention_decode(*pool, seqlens, 2, block_table=table)
    dout = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(o, pool, dout) for o in (out, exact)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_strides_do_not_matter():
    q, k, v = draw(2, 3, 40, 4, 2, 16)
    seqlens = torch.tensor([40, 11])
    expected = run(q, k, v, seqlens, 2)
    heads_first = [
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)
    ]  # [B, G, S, D], as transformers
    inputs = [t.requires_grad_() for t in heads_first]
    out = head_attention_decode(*inputs, seqlens, 2)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    assert_equal([out.detach(), *torch.autograd.grad(out, inputs, dout)], expected)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("page", [0, 8])
def test_every_combination_of_gradients(page, wanted):
    q, k, v = draw(2, 2, 40, 4, 2, 8)
    table = {}
    if page:
        k, v, table["block_table"] = paged(k, v, page)
    seqlens = torch.tensor([40, 9])
    expected = run(q, k, v, seqlens, 2, **table)
    inputs = [t.requires_grad_(want) for t, want in zip((q, k, v), wanted, strict=True)]
    out = head_attention_decode(*inputs, seqlens, 2, **table)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    chosen = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(out, chosen, dout)
    assert_equal(grads, [g for g, want in zip(expected[1:], wanted, strict=True) if want])


def test_expanded_gradient():
    inputs = leaves(*draw(2, 2, 20, 4, 2, 8))
    out = head_attention_decode(*inputs, torch.tensor([20, 9]), 2)
    summed = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert_equal(summed, torch.autograd.grad(out, inputs, torch.ones_like(out)))


@pytest.mark.parametrize("page", [0, 3])
@pytest.mark.parametrize("unit", UNITS)
def test_gradcheck(unit, page):
    q, k, v = draw(2, 2, 6, 4, 2, 3, torch.float64)
    options = {"unit": unit, "extent": torch.tensor([2, 1]), "k_start": torch.tensor([1, 0]), "scale": 0.4}
    if page:
        k, v, options["block_table"] = paged(k, v, page)
        k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    seqlens = torch.tensor([6, 4])
    assert torch.autograd.gradcheck(
        lambda *t: head_attention_decode(*t, seqlens, 2, **options),
        leaves(q, k, v),
        fast_mode=KERNELS,  # hundreds of launches otherwise
    )


@pytest.mark.skipif(KERNELS, reason="the CPU's parts")
@pytest.mark.parametrize("keys", [256, 257, 540, 2048, 2049])
def test_lengths_where_parts_change(keys):
    """Few keys are one part, more are four even ones, more than 2048 eight; the last one is short."""
    q, k, v = draw(1, 1, keys, 3, 1, 16)
    out = head_attention_decode(q, k, v, torch.tensor([keys]), 1)
    wide = [t.double() for t in (q, k, v)]
    exact = reference.head_attention_decode(*wide, torch.tensor([keys]), 1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_threads_do_not_change_a_bit(set_threads):
    q, k, v = draw(2, 1, LONG + 400, 3, 1, 64)
    results = []
    for threads in (1, 4):
        set_threads(threads)
        results.append(run(q, k, v, torch.tensor([LONG + 400, LONG + 200]), 1))
    assert_equal(*results)


@settings(max_examples=10 if KERNELS else 50, deadline=None)
@given(st.data())
def test_fuzz(data):
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    B, T, S, G, M, D = number(0, 3), number(0, 40), number(1, 80), number(1, 4), number(1, 8), number(1, 20)
    unit = data.draw(st.sampled_from(UNITS))
    heads = number(0, G if unit == "kv_group" else M)
    seqlens = torch.tensor([number(0, S) for _ in range(B)], dtype=torch.int64)
    options = {"unit": unit}
    if data.draw(st.booleans()):
        options["k_start"] = torch.tensor([number(0, S) for _ in range(B)], dtype=torch.int64)
    if data.draw(st.booleans()):
        options["extent"] = torch.tensor([number(0, heads) for _ in range(B)], dtype=torch.int64)
    if data.draw(st.booleans()):
        options["window"] = number(1, 90)
    seed = number(0, 1 << 30)
    if data.draw(st.booleans()):
        options["softcap"] = 1.5
        options["sinks"] = torch.linspace(-1, 1, G * M, dtype=torch.float64)
    q, k, v = draw(B, T, S, G * M, G, D, torch.float64, seed)
    if data.draw(st.booleans()):
        k, v, options["block_table"] = paged(k, v, number(1, 20), seed=seed)
        k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    ours = run(q, k, v, seqlens, heads, **options)
    inputs = leaves(q, k, v)
    exact = reference.head_attention_decode(*inputs, seqlens, heads, **options)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = [torch.zeros_like(t) for t in inputs]
    if exact.requires_grad:
        theirs = torch.autograd.grad(exact, inputs, dout, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, [exact, *theirs], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11)


def ints(*values):
    return torch.tensor(values)


TABLE = {"k_cache": torch.zeros(4, 3, 2, 8), "v_cache": torch.zeros(4, 3, 2, 8)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": 3}, ValueError, r"heads must lie in \[0, 2\], got 3"),
        ({"unit": "group"}, ValueError, "unit must be kv_group or query, got group"),
        ({"q": torch.zeros(2, 4, 8)}, ValueError, "q must have 4 dimensions, got 3"),
        (
            {"q": torch.zeros(3, 1, 4, 8), "seqlens": ints(1, 1, 1)},
            ValueError,
            r"k_cache.shape\[0\] must be 3",
        ),
        ({"v_cache": torch.zeros(2, 6, 2, 4)}, ValueError, r"v_cache must have shape \[2, 6, 2, 8\]"),
        ({"seqlens": ints(1)}, ValueError, r"seqlens must have shape \[2\], got \[1\]"),
        ({"seqlens": torch.ones(2)}, TypeError, "seqlens must be int32, int64, got float32"),
        ({"extent": ints(1, 1, 1)}, ValueError, r"extent must have shape \[1\] or \[2\], got \[3\]"),
        ({**TABLE, "block_table": ints(0, 1)}, ValueError, "block_table must have 2 dimensions, got 1"),
        (
            {**TABLE, "block_table": ints([0])},
            ValueError,
            r"block_table must have shape \[2, 1\], got \[1, 1\]",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"head_attention_decode: .*{message}"):
        head_attention_decode(**{**arguments(), **changes})


def arguments():
    q, k_cache, v_cache = draw(2, 1, 6, 4, 2, 8)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "seqlens": ints(6, 6), "heads": 2}


def table(*pages):
    return {"k_cache": POOL[0], "v_cache": POOL[1], "block_table": ints(*pages)}


POOL = torch.randn(2, 4, 3, 2, 8)

# A wrong value, the sentence about it, and what a kernel takes for it.
WRONG_VALUES = [
    ({"seqlens": ints(1, 7)}, r"seqlens must lie in \[0, 6\], got 7", {"seqlens": ints(1, 6)}),
    ({"seqlens": ints(-1, 6)}, r"seqlens must lie in \[0, 6\], got -1", {"seqlens": ints(0, 6)}),
    ({"extent": ints(1, 3)}, r"extent must lie in \[0, 2\], got 3", {"extent": ints(1, 2)}),
    ({"k_start": ints(0, 9)}, r"k_start must lie in \[0, 6\], got 9", {"k_start": ints(0, 6)}),
    (table([0, 1], [2, 4]), r"block_table must name pages in \[0, 3\]", table([0, 1], [2, 3])),
    (table([0, 1], [2, -1]), r"block_table .* for the keys in use, got -1", table([0, 1], [2, 0])),
]


@pytest.mark.parametrize("changes, message, taken", WRONG_VALUES, ids=[row[1][:30] for row in WRONG_VALUES])
def test_a_wrong_value_is_refused_where_the_host_reads_it(changes, message, taken):
    """And moved into its range where it does not: a kernel never reads or writes beside its tensors."""
    if not KERNELS:
        with pytest.raises(RuntimeError, match=f"head_attention_decode: {message}"):
            head_attention_decode(**arguments() | changes)
        return
    ours, expected = (head_attention_decode(**arguments() | values) for values in (changes, taken))
    assert torch.equal(ours, expected)
