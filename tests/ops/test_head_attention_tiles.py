"""head_attention's CUDA kernels, on a GPU or emulated, over several tiles: no result depends on where tiles end."""

import itertools

import pytest
import torch

from flextron.testing.numerics import assert_no_worse
from flextron_ext import head_attention, reference

pytestmark = pytest.mark.usefixtures("a_gpu_or_its_emulator")

# Queries, keys, groups, query heads per group, head size: every tile of the tensor cores, smaller heads in them, rows
# that are no whole pieces of 16 bytes, and a head too wide for tensor cores.
SHAPES = {
    "64": dict(T=150, S=200, G=2, M=3, D=64),
    "80": dict(T=70, S=140, G=3, M=1, D=80),
    "96": dict(T=140, S=130, G=1, M=4, D=96),
    "128": dict(T=135, S=135, G=1, M=7, D=128),
    "40 of 64": dict(T=66, S=190, G=2, M=8, D=40),
    "odd": dict(T=75, S=90, G=2, M=2, D=17),
    "wide": dict(T=40, S=70, G=2, M=2, D=136),
}
UNITS = ("kv_group", "query")
DTYPES = (torch.bfloat16, torch.float16)
NAMES = ("out", "lse", "dq", "dk", "dv")

each_shape = pytest.mark.parametrize("shape", SHAPES)
each_unit = pytest.mark.parametrize("unit", UNITS)


def make(shape, device, dtype=torch.bfloat16):
    """q [T, H, D], k and v [S, G, D], dout as q."""
    s = SHAPES[shape]
    rows, keys = (s["T"], s["G"] * s["M"], s["D"]), (s["S"], s["G"], s["D"])
    return [torch.randn(size, device=device, dtype=dtype) for size in (rows, keys, keys, rows)]


def run(q, k, v, dout, heads, op=head_attention, **options):
    """out, lse, dq, dk, dv."""
    inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    if op is head_attention:
        options["return_lse"] = True
    out, lse = op(*inputs, heads, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, dout)]


def assert_equal(ours, theirs):
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert torch.equal(a, b), name


def most(shape, unit):
    return SHAPES[shape]["G" if unit == "kv_group" else "M"]


def active_heads(shape, heads, unit, device):
    """[H] bool."""
    h, M = torch.arange(SHAPES[shape]["G"] * SHAPES[shape]["M"], device=device), SHAPES[shape]["M"]
    return h // M < heads if unit == "kv_group" else h % M < heads


@each_shape
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_values(shape, causal, dtype, device):
    q, k, v, dout = make(shape, device, dtype)
    options = dict(causal=causal, scale=None if causal else -0.2)
    heads = most(shape, "kv_group")
    ours = run(q, k, v, dout, heads, **options)
    plain = run(q, k, v, dout, heads, reference.head_attention, **options)
    wide = [t.double() for t in (q, k, v, dout)]
    exact = run(*wide, heads, reference.head_attention, **options)
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=True):
        seen = c.isfinite()
        assert torch.equal(a[~seen].double(), c[~seen])
        assert_no_worse(a[seen], b[seen].to(a.dtype), c[seen], f"{shape} {name}", dtype)


@pytest.mark.parametrize("shape", ["40 of 64", "wide"])
def test_window_softcap_and_sinks(shape, device):
    """All at once, forward and backward, with windows that begin and end inside tiles."""
    q, k, v, dout = make(shape, device)
    sinks = torch.randn(q.shape[1], device=device)

    def attend(op, *inputs):
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        options = {"return_lse": True} if op is head_attention else {}
        heads = most(shape, "kv_group")
        out, lse = op(*inputs[:3], heads, window=45, softcap=1.5, sinks=inputs[4], **options)
        grads = torch.autograd.grad(out, (*inputs[:3], inputs[4]), inputs[3])
        return [out.detach(), lse.detach(), *grads]

    ours, plain = (attend(op, q, k, v, dout, sinks) for op in (head_attention, reference.head_attention))
    exact = attend(reference.head_attention, *(t.double() for t in (q, k, v, dout, sinks)))
    for name, a, b, c in zip((*NAMES, "dsinks"), ours, plain, exact, strict=True):
        assert_no_worse(a, b.to(a.dtype), c, f"{shape} {name}", torch.bfloat16)


@each_shape
@each_unit
def test_a_subset_gives_the_bits_of_sliced_heads(shape, unit, device):
    """And nothing of the other heads is used: they are NaN."""
    q, k, v, dout = make(shape, device)
    heads = (most(shape, unit) + 1) // 2
    active = active_heads(shape, heads, unit, device)
    groups = heads if unit == "kv_group" else len(k[0])
    q[:, ~active], dout[:, ~active], k[:, groups:], v[:, groups:] = [torch.nan] * 4
    out, lse, dq, dk, dv = run(q, k, v, dout, heads, unit=unit)
    sliced = run(q[:, active], k[:, :groups], v[:, :groups], dout[:, active], groups)
    assert_equal([out[:, active], lse[:, active], dq[:, active], dk[:, :groups], dv[:, :groups]], sliced)
    assert not any(t.any() for t in (out[:, ~active], dq[:, ~active], dk[:, groups:], dv[:, groups:]))
    assert lse[:, ~active].eq(-torch.inf).all()
    chosen = active.nonzero()[:, 0]
    listed = chosen[torch.randperm(len(chosen), device=device)]
    assert_equal(run(q, k, v, dout, len(chosen), index=listed), [out, lse, dq, dk, dv])


@each_shape
@each_unit
def test_a_ragged_batch_gives_the_bits_of_its_sequences_apart(shape, unit, device):
    q, k, v, dout = make(shape, device)
    T, S, heads = len(q), len(k), most(shape, unit)
    ends_q, ends_k = [0, T // 2, T // 2, T - 3, T - 2], [0, S // 3, S // 3 + 5, S - 1, S - 1]
    starts, counts = [S // 5, 3, 1, 0], [heads, 1, (heads + 1) // 2, heads]
    k[S - 1 :], v[S - 1 :], q[T - 2 :], dout[T - 2 :] = [torch.nan] * 4
    for b in range(4):  # what no query sees
        k[ends_k[b] : ends_k[b] + starts[b]] = v[ends_k[b] : ends_k[b] + starts[b]] = torch.nan
    lists = dict(extent=counts, k_start=starts, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)
    lists = {name: torch.tensor(values, device=device) for name, values in lists.items()}
    ours = run(q, k, v, dout, heads, unit=unit, **lists)
    for b in range(4):
        t, s = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        start = torch.tensor([min(starts[b], s.stop - s.start)], device=device)
        alone = run(q[t], k[s], v[s], dout[t], counts[b], unit=unit, k_start=start)
        assert_equal([part[span] for part, span in zip(ours, (t, t, t, s, s), strict=True)], alone)
    out, lse, dq, dk, dv = ours
    assert not any(t.any() for t in (out[T - 2 :], dq[T - 2 :], dk[S - 1 :], dv[S - 1 :]))
    assert lse[T - 2 :].eq(-torch.inf).all()


@each_shape
@each_unit
@pytest.mark.parametrize("ragged", [False, True], ids=["one", "ragged"])
def test_extents_per_token_give_the_bits_of_separate_calls(shape, unit, ragged, device):
    q, k, v, dout = make(shape, device)
    T, S, heads = len(q), len(k), most(shape, unit)
    options = dict(unit=unit)
    if ragged:
        options["cu_seqlens_q"] = torch.tensor([0, T // 3, T - 1], device=device)
        options["cu_seqlens_k"] = torch.tensor([0, S // 2, S], device=device)
    extent = torch.randint(0, heads + 1, (T,), device=device)
    extent[torch.rand(T, device=device) < 0.3] = 0
    mixed = run(q, k, v, dout, heads, extent=extent, extent_per="token", **options)
    again = run(q, k, v, dout, heads, extent=extent, extent_per="token", **options)
    assert_equal(mixed, again)
    for count in range(heads + 1):
        rows = extent == count
        alone = run(q, k, v, dout, count, **options)
        for name, ours, theirs in zip(NAMES[:3], mixed, alone, strict=False):
            assert torch.equal(ours[rows], theirs[rows]), (name, count)


@each_shape
def test_keys_below_the_start_are_as_if_they_were_not_there(shape, device):
    q, k, v, dout = make(shape, device)
    start = len(k) // 3 + 1
    k[:start] = v[:start] = torch.nan
    out, lse, dq, dk, dv = run(
        q, k, v, dout, len(k[0]), k_start=torch.tensor([start], device=device), causal=False
    )
    cut = run(q, k[start:], v[start:], dout, len(k[0]), causal=False)
    assert_equal([out, lse, dq, dk[start:], dv[start:]], cut)
    assert not dk[:start].any() and not dv[:start].any()


@each_shape
def test_a_query_alone_gives_the_same_bits(shape, device):
    q, k, v, _ = make(shape, device)
    heads, T, S = len(k[0]), len(q), len(k)
    out, lse = head_attention(q, k, v, heads, return_lse=True)
    for t in range(0, T, 1 + T // 4):
        keys = t + 1 + S - T
        if keys > 0:
            alone = head_attention(q[t : t + 1], k[:keys], v[:keys], heads, return_lse=True)
            assert torch.equal(alone[0][0], out[t]) and torch.equal(alone[1][0], lse[t])


@each_shape
def test_any_address_and_stride_gives_the_same_bits(shape, device, monkeypatch):
    q, k, v, _ = make(shape, device)
    heads = len(k[0])

    def moved(t, start, more):
        wide = t.new_full((*t.shape[:2], t.shape[2] + start + more), torch.nan)
        wide[..., start : start + t.shape[2]] = t
        return wide[..., start : start + t.shape[2]]

    def check(moves):
        expected = head_attention(q, k, v, heads)
        for which, (start, more) in enumerate(moves):
            inputs = [moved(t, start, more) if i == which else t for i, t in enumerate((q, k, v))]
            assert torch.equal(head_attention(*inputs, heads), expected)
        transposed = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
        assert torch.equal(head_attention(*transposed, heads), expected)

    check([(8, 0), (16, 8), (0, 8)])
    monkeypatch.setenv("FLEXTRON_ARCH", "80")  # the others are not for Hopper's TMA
    check([(8, 0), (1, 7), (0, 3)])
    transposed = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (q, k, v)]
    assert torch.equal(head_attention(*transposed, heads), head_attention(q, k, v, heads))


def test_more_sequences_than_a_turn_of_the_schedule(device):
    """Every active head of every block is there once, whatever the number and the order of sequences."""
    lengths = torch.randint(0, 5, (300,), device=device)
    lengths[7] = 300
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    T = int(ends[-1])
    q, k, v = (torch.randn(T, n, 8, device=device, dtype=torch.bfloat16) for n in (4, 2, 2))
    extent = torch.randint(0, 3, (300,), device=device)
    options = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, return_lse=True)
    out, lse = head_attention(q, k, v, 2, extent=extent, **options)
    full, full_lse = head_attention(q, k, v, 2, **options)
    units = torch.arange(4, device=device) // 2
    active = units < extent.repeat_interleave(lengths)[:, None]
    assert torch.equal(out, full.where(active[..., None], 0.0))
    assert torch.equal(lse, full_lse.where(active, -torch.inf))
    wide = reference.head_attention(*(t.double() for t in (q, k, v)), 2, cu_seqlens_q=ends, cu_seqlens_k=ends)
    torch.testing.assert_close(full.double(), wide[0], rtol=0, atol=2e-2)


def test_every_pair_of_lengths_round_a_tile(device):
    for T, S in itertools.product((1, 16, 127, 128, 129), (1, 63, 64, 65, 129)):
        q, k, v = (torch.randn(n, 1, 64, device=device, dtype=torch.float16) for n in (T, S, S))
        exact = reference.head_attention(q.double(), k.double(), v.double(), 1)[0]
        torch.testing.assert_close(head_attention(q, k, v, 1).double(), exact, rtol=0, atol=4e-3)
