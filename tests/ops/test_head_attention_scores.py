"""What window, softcap and sinks promise in head_attention and head_attention_decode."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from emulator import build as emulator

from flextron.testing.numerics import assert_no_worse
from flextron_ext import head_attention, head_attention_decode, reference

KERNELS = emulator.loaded()  # our CUDA kernels for CPU tensors, not the host's loops
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HOPPER = KERNELS and os.environ.get("FLEXTRON_ARCH", "90") == "90"
LONG = 150 if KERNELS else 700  # keys: several splits of a decode step


def draw(T, S, H, G, D, dtype=torch.float32, seed=0):
    """q [T, H, D], k and v [S, G, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (T, H, D), (S, G, D), (S, G, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(op, q, k, v, heads, dout=None, **options):
    """out, the gradients of q, k, v and of sinks if there are any; head_attention_decode on a cache of one sequence."""
    inputs = leaves(q, k, v)
    if "sinks" in options:
        inputs += leaves(options["sinks"])
        options["sinks"] = inputs[3]
    if op is head_attention:
        out = head_attention(*inputs[:3], heads, **options)
    else:
        caches = [t[None] for t in inputs[:3]]
        out = head_attention_decode(*caches, torch.tensor([len(k)]), heads, **options)[0]
    if dout is None:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


both_ops = pytest.mark.parametrize("op", [head_attention, head_attention_decode], ids=lambda op: op.__name__)
SHAPES = [(1, LONG), (3, 70), (70, 90)]  # few rows and many, one split and several


def test_a_window_agrees_with_torch():
    T, S, window = 90, 110, 17
    q, k, v = draw(T, S, 6, 2, 64)
    key, place = torch.arange(S), torch.arange(T)[:, None] + S - T
    mask = (place - window < key) & (key <= place)

    def torch_attention(*inputs):
        q, k, v = (t.transpose(0, 1)[None] for t in inputs)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)

    exact = torch_attention(q.double(), k.double(), v.double())
    assert_no_worse(head_attention(q, k, v, 2, window=window), torch_attention(q, k, v), exact)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, S", SHAPES)
def test_a_window_of_the_whole_length_is_none(T, S, dtype, op):
    """And a sink of -inf, bit for bit."""
    tensors = draw(T, S, 6, 2, 64, dtype)
    plain = run(op, *tensors, 2)
    for window in (S, 1 << 40):
        assert_equal(run(op, *tensors, 2, window=window), plain)
    *results, dsinks = run(op, *tensors, 2, sinks=torch.full((6,), -torch.inf))
    assert not dsinks.any()
    if not (HOPPER and op is head_attention and dtype == torch.bfloat16):  # whose own kernels take no sinks
        assert_equal(results, plain)


@both_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, S", SHAPES)
def test_keys_before_every_window_are_never_read(T, S, dtype, op):
    q, k, v = draw(T, S, 6, 2, 64, dtype)
    unseen, options = S - T + 1 - 20, {"window": 20, "softcap": 3.0, "k_start": torch.tensor([2])}
    clean = run(op, q, k, v, 2, **options)
    k[:unseen] = v[:unseen] = float("nan")
    found = run(op, q, k, v, 2, **options)
    assert_equal(found, clean)
    assert not found[2][:unseen].any() and not found[3][:unseen].any()


@pytest.mark.skipif(
    KERNELS, reason="a tile of tensor cores multiplies what one of its rows does not see by 0"
)
@both_ops
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("T, S", SHAPES[1:])
def test_what_is_outside_a_window_reaches_nothing(T, S, softcap, op):
    """A key that a query has left behind, and a query from the keys that it has left behind."""
    window, options = 2 if T < 32 else 20, {"softcap": softcap}
    q, k, v = draw(T, S, 6, 2, 64)
    dout = torch.ones_like(q)
    options["window"] = window
    clean = run(op, q, k, v, 2, dout, **options)
    for key in (S - T, S - window - 1):
        done = key + window - (S - T)  # queries from there on do not see it
        for spoiled in (k, v):
            kept = spoiled[key].clone()
            spoiled[key] = float("nan")
            found = run(op, q, k, v, 2, dout, **options)
            spoiled[key] = kept
            assert_equal([t[done:] for t in found[:2]], [t[done:] for t in clean[:2]])
            assert not (found[0][:done].isfinite().all() and found[1][:done].isfinite().all())
    for spoiled in (q, dout):
        kept, left = spoiled[T - 1].clone(), S - window  # the last query sees keys from there on
        spoiled[T - 1] = float("nan")
        found = run(op, q, k, v, 2, dout, **options)
        spoiled[T - 1] = kept
        assert_equal([t[:left] for t in found[2:]], [t[:left] for t in clean[2:]])
        assert found[2][left:].isnan().all()


@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_a_ragged_batch_is_its_sequences_apart(unit):
    q, k, v = draw(75, 190, 12, 3, 16)
    ends_q, ends_k, starts = [0, 33, 34, 75], [0, 70, 75, 190], [40, 0, 3]
    options = dict(unit=unit, window=30, softcap=2.0, sinks=torch.randn(12))
    out, lse = head_attention(
        q, k, v, 2, cu_seqlens_q=torch.tensor(ends_q), cu_seqlens_k=torch.tensor(ends_k),
        k_start=torch.tensor(starts), return_lse=True, **options,
    )  # fmt: skip
    for b, start in enumerate(starts):
        t, s = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        apart = head_attention(q[t], k[s], v[s], 2, k_start=torch.tensor([start]), return_lse=True, **options)
        assert_equal([out[t], lse[t]], apart)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_has_the_sink_once(dtype):
    """Two halves of the keys, merged by their lse, are all keys; the sink is a part of one of them."""
    q, k, v = draw(5, 90, 4, 2, 16, dtype)
    sinks = torch.tensor([-1.0, 0.5, 4.0, 30.0])
    halves = [
        head_attention(q, k[s], v[s], 2, causal=False, sinks=sink, return_lse=True)
        for s, sink in ((slice(40), None), (slice(40, 90), sinks))
    ]
    out, lse = head_attention(q, k, v, 2, causal=False, sinks=sinks, return_lse=True)
    merged = torch.logaddexp(halves[0][1], halves[1][1])
    sum_of_halves = sum((half_lse - merged).exp()[..., None] * part for part, half_lse in halves)
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(lse, merged, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), sum_of_halves.double(), rtol=0, atol=4 * rounding)
    assert (lse[:, 3] - 30).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_without_a_key_sees_its_sink_alone(dtype):
    q, k, v = draw(6, 4, 4, 2, 16, dtype)
    sinks = torch.tensor([-1.0, 0.5, 4.0, 30.0]).requires_grad_()
    out, lse = head_attention(q, k, v, 1, "query", sinks=sinks, return_lse=True)
    assert not out[:2].any()
    torch.testing.assert_close(lse[:2, ::2], sinks.detach()[::2].expand(2, 2), rtol=1e-6, atol=0)
    assert lse[:, 1::2].eq(-torch.inf).all()  # heads that are not active
    (seen,) = torch.autograd.grad(out[2:].sum(), sinks, retain_graph=True)
    (all_of_them,) = torch.autograd.grad(out.sum(), sinks)
    assert torch.equal(seen, all_of_them) and not seen[1::2].any() and seen[::2].all()


@pytest.mark.parametrize("unit", ["kv_group", "query"])
@pytest.mark.parametrize("T", [1, 3, 40])
def test_a_cache_gives_the_last_rows_of_the_full_pass(T, unit):
    q, k, v = draw(LONG, LONG, 6, 2, 16)
    for window in (25, LONG - 30):
        options = dict(unit=unit, window=window, softcap=4.0, sinks=torch.randn(6))
        full = head_attention(q, k, v, 2, **options)[-T:]
        step = head_attention_decode(q[None, -T:], k[None], v[None], torch.tensor([LONG]), 2, **options)[0]
        torch.testing.assert_close(step, full, rtol=1e-5, atol=1e-6)


@both_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes_of_256(dtype, op):
    q, k, v = draw(20, 90, 4, 2, 256, dtype)
    options = dict(window=50, softcap=20.0, sinks=torch.randn(4))
    ours = run(op, q, k, v, 2, **options)
    results = []
    for wide in (dtype, torch.float64):
        inputs = [*leaves(*(t.to(wide) for t in (q, k, v))), options["sinks"].clone().requires_grad_()]
        out, _ = reference.head_attention(*inputs[:3], 2, window=50, softcap=20.0, sinks=inputs[3])
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, dout.to(dtype).to(wide))])
    for name, mine, plain, exact in zip(["out", "dq", "dk", "dv"], ours, *results, strict=False):
        assert_no_worse(mine, plain, exact, name, dtype)
    torch.testing.assert_close(ours[4], results[1][4], rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4)


@both_ops
@pytest.mark.parametrize(
    "options", [{"window": 3}, {"softcap": 0.8}, {"sinks": None}, {"window": 2, "softcap": 1.5}]
)
def test_gradcheck(options, op):
    inputs = leaves(*draw(4, 6, 4, 2, 3, torch.float64))
    if "sinks" in options:
        inputs += leaves(torch.linspace(-1, 1, 4, dtype=torch.float64))

    def attend(q, k, v, *sinks):
        given = options | ({"sinks": sinks[0]} if sinks else {})
        if op is head_attention:
            return head_attention(q, k, v, 2, **given)
        return head_attention_decode(q[None], k[None], v[None], torch.tensor([6]), 2, **given)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@both_ops
def test_the_gradient_of_sinks_alone(op):
    """In the dtype of the sinks, whatever that of q."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = draw(5, 9, 4, 2, 8, dtype)
        for kind in (torch.float32, dtype):
            sinks = torch.linspace(-1, 1, 4).to(kind)
            expected = run(op, q, k, v, 2, sinks=sinks)
            given = sinks.clone().requires_grad_()
            caches = (q, k, v) if op is head_attention else (q[None], k[None], v[None], torch.tensor([9]))
            out = op(*caches, 2, sinks=given)
            dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            (dsinks,) = torch.autograd.grad(out, given, dout.to(dtype).view(out.shape))
            assert dsinks.dtype == kind and torch.equal(dsinks, expected[4])


@both_ops
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"window": 0}, ValueError, r"window must lie in \[1, 9223372036854775807\], got 0"),
        ({"window": 2.0}, TypeError, "window must be an integer, got float"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be finite, got inf"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \[4\], got \[2\]"),
        ({"sinks": torch.zeros(4).double()}, TypeError, "sinks must have the dtype of q, torch.float32, or float32"),
        ({"sinks": 1.0}, TypeError, "sinks must be a tensor, got float"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message, op):
    q, k, v = draw(3, 5, 4, 2, 8)
    caches = (q, k, v) if op is head_attention else (q[None], k[None], v[None], torch.tensor([5]))
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(*caches, 2, **changes)


def test_a_window_needs_causal():
    with pytest.raises(ValueError, match="head_attention: window must be None where causal is false, got 4"):
        head_attention(*draw(3, 5, 4, 2, 8), 2, causal=False, window=4)


def test_the_op_itself_checks_scores():
    q, k, v = draw(3, 5, 4, 2, 8)
    for changes, message in [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 4, "causal": False}, "window must be None where causal is false, got 4"),
        ({"softcap": -1.0}, "softcap must be positive and finite, got -1"),
        ({"sinks": torch.zeros(5)}, r"sinks must have shape \[4\], got \[5\]"),
        ({"sinks": torch.zeros(4).half()}, "sinks must have dtype Float, got Half"),
    ]:
        with pytest.raises(RuntimeError, match=f"head_attention: {message}"):
            torch.ops.flextron.head_attention(q, k, v, 2, **changes)
