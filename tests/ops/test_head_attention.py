"""What head_attention promises beyond the shared suite: heads, masks, ragged batches, equal bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulator import build as emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import INSTRUCTION_SETS, run_python

from flextron.testing.numerics import assert_no_worse
from flextron_ext import head_attention, reference

KERNELS = emulator.loaded()  # our CUDA kernels for CPU tensors, not the host's loops
UNITS = ["kv_group", "query"]
RATIOS = [1, 3, 4, 7, 8]  # query heads per group


def draw(T, S, H, G, D, dtype=torch.float32, seed=0):
    """q [T, H, D], k and v [S, G, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (T, H, D), (S, G, D), (S, G, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def active_heads(H, G, heads, unit):
    """[H] bool."""
    h = torch.arange(H)
    return h // (H // G) < heads if unit == "kv_group" else h % (H // G) < heads


def gradients(out, inputs, seed=1):
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(out, inputs, dout.to(out.dtype))


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(q, k, v, heads, **options):
    """out, lse, dq, dk, dv."""
    inputs = leaves(q, k, v)
    out, lse = head_attention(*inputs, heads, return_lse=True, **options)
    return [out.detach(), lse, *gradients(out, inputs)]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("M", RATIOS)
def test_group_ratios(M, unit):
    G = 3
    q, k, v = draw(37, 70, G * M, G, 16)
    for heads in {0, 1, (G if unit == "kv_group" else M)}:
        names = ["out", "lse", "dq", "dk", "dv"]
        ours = dict(zip(names, run(q, k, v, heads, unit=unit), strict=True))
        results = {}
        for dtype in (torch.float32, torch.float64):
            inputs = leaves(*(t.to(dtype) for t in (q, k, v)))
            out, lse = reference.head_attention(*inputs, heads, unit=unit)
            results[dtype] = dict(zip(names, [out, lse, *gradients(out, inputs)], strict=True))
        assert torch.equal(ours["lse"].isinf(), results[torch.float64]["lse"].isinf())
        for name in names:
            finite = [torch.nan_to_num(r[name].detach(), neginf=0.0) for r in (ours, *results.values())]
            assert_no_worse(*finite)


@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_torch(causal):
    q, k, v = draw(90, 90, 6, 2, 64)

    def torch_attention(*inputs):
        q, k, v = (t.transpose(0, 1)[None] for t in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out[0].transpose(0, 1)

    exact = torch_attention(q.double(), k.double(), v.double())
    assert_no_worse(head_attention(q, k, v, 2, causal=causal), torch_attention(q, k, v), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lse(dtype):
    q, k, v = draw(5, 9, 4, 2, 8, dtype)
    _, lse = head_attention(q, k, v, 2, causal=False, scale=0.7, return_lse=True)
    score = torch.einsum("thd,shd->ths", q.double(), k.double().repeat_interleave(2, 1)) * 0.7
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), torch.logsumexp(score, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("M", RATIOS)
def test_inactive_heads_are_zero_and_never_read(M, unit):
    G, heads = 3, 1
    q, k, v = draw(20, 20, G * M, G, 8)
    clean = run(q, k, v, heads, unit=unit)
    active = active_heads(G * M, G, heads, unit)
    q[:, ~active] = float("nan")
    if unit == "kv_group":
        k[:, heads:] = v[:, heads:] = float("nan")
    poisoned = run(q, k, v, heads, unit=unit)
    assert_equal(clean, poisoned)
    out, lse, dq, dk, dv = poisoned
    assert not out[:, ~active].any() and not dq[:, ~active].any()
    assert lse[:, ~active].eq(-torch.inf).all() and lse[:, active].isfinite().all()
    if unit == "kv_group":
        assert not dk[:, heads:].any() and not dv[:, heads:].any()


def test_gradient_of_inactive_heads_is_never_read():
    q, k, v = leaves(*draw(20, 20, 6, 2, 8))
    out = head_attention(q, k, v, 1)
    dout = torch.randn_like(out)
    clean = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    dout[:, 3:] = float("nan")
    assert_equal(clean, torch.autograd.grad(out, (q, k, v), dout))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("M", RATIOS)
def test_a_subset_is_the_op_on_sliced_heads(M, unit):
    G = 4
    heads = 2 if unit == "kv_group" or M > 2 else 1
    q, k, v = draw(45, 90, G * M, G, 24)
    active = active_heads(G * M, G, heads, unit)
    groups = heads if unit == "kv_group" else G
    out, lse, dq, dk, dv = run(q, k, v, heads, unit=unit)
    inputs = leaves(q[:, active], k[:, :groups], v[:, :groups])
    sliced, sliced_lse = head_attention(*inputs, groups, return_lse=True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    grads = torch.autograd.grad(sliced, inputs, dout[:, active])
    parts = out[:, active], lse[:, active], dq[:, active], dk[:, :groups], dv[:, :groups]
    assert_equal(parts, [sliced, sliced_lse, *grads])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_an_unsorted_list_is_the_prefix(kind):
    q, k, v = draw(40, 40, 12, 3, 16)
    by_list = run(q, k, v, 8, index=torch.tensor([3, 7, 0, 1, 6, 2, 5, 4], dtype=kind))
    assert_equal(by_list, run(q, k, v, 2))


def test_a_list_may_skip_groups():
    q, k, v = draw(40, 40, 6, 3, 16)
    clean = run(q, k, v, 2, index=torch.tensor([5, 1]))
    k[:, 1] = v[:, 1] = float("nan")
    out, *_, dk, dv = poisoned = run(q, k, v, 2, index=torch.tensor([5, 1]))
    assert_equal(clean, poisoned)
    assert not out[:, [0, 2, 3, 4]].any() and not dk[:, 1].any() and not dv[:, 1].any()


RAGGED_Q, RAGGED_K = [0, 33, 33, 40, 41], [0, 70, 75, 75, 140]  # an empty sequence, one without keys


@pytest.mark.parametrize("unit", UNITS)
def test_a_ragged_batch_with_extents_is_its_sequences_apart(unit):
    q, k, v = draw(41, 140, 12, 3, 16)
    starts, counts = [0, 2, 0, 11], [3, 1, 2, 1]
    ours = run(
        q, k, v, 3, unit=unit,
        extent=torch.tensor(counts), k_start=torch.tensor(starts),
        cu_seqlens_q=torch.tensor(RAGGED_Q), cu_seqlens_k=torch.tensor(RAGGED_K, dtype=torch.int32),
    )  # fmt: skip
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    for b, (first, count) in enumerate(zip(starts, counts, strict=True)):
        t, s = slice(*RAGGED_Q[b : b + 2]), slice(*RAGGED_K[b : b + 2])
        inputs = leaves(q[t], k[s], v[s])
        out, lse = head_attention(
            *inputs, count, unit, k_start=torch.tensor([min(first, s.stop - s.start)]), return_lse=True
        )
        grads = torch.autograd.grad(out, inputs, dout[t])
        parts = [part[span] for part, span in zip(ours, (t, t, t, s, s), strict=True)]
        assert_equal(parts, [out, lse, *grads])


@pytest.mark.parametrize("unit, window", [("kv_group", None), ("query", None), ("query", 20)])
def test_extents_per_token_are_separate_calls(unit, window):
    q, k, v = draw(75, 90, 12, 3, 16)
    extent = torch.randint(0, 4, (75,), generator=torch.Generator().manual_seed(2))
    mixed = run(q, k, v, 3, unit=unit, extent=extent, extent_per="token", window=window)
    for count in range(4):
        rows = extent == count
        alone = run(q, k, v, count, unit=unit, window=window)
        assert_equal([part[rows] for part in mixed[:3]], [part[rows] for part in alone[:3]])


def test_one_extent_is_the_number():
    q, k, v = draw(40, 40, 6, 3, 16)
    assert_equal(run(q, k, v, 3, extent=torch.tensor([2])), run(q, k, v, 2))


def test_queries_beyond_the_last_sequence_are_inactive():
    q, k, v = draw(10, 12, 4, 2, 8)
    q[7:], k[9:], v[9:] = float("nan"), float("nan"), float("nan")
    ends_q, ends_k = torch.tensor([0, 7]), torch.tensor([0, 9])
    out, lse, dq, dk, dv = run(q, k, v, 2, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k)
    assert not out[7:].any() and lse[7:].eq(-torch.inf).all() and not dq[7:].any()
    assert not dk[9:].any() and not dv[9:].any()
    assert_equal([out[:7], lse[:7]], run(q[:7], k[:9], v[:9], 2)[:2])


def test_keys_below_the_start_are_never_read():
    q, k, v = draw(70, 70, 4, 2, 8)
    k[:5] = v[:5] = float("nan")
    start = torch.tensor([5])
    out, lse, dq, dk, dv = run(q, k, v, 2, k_start=start)
    assert not out[:5].any() and lse[:5].eq(-torch.inf).all()  # these see no key
    assert not dk[:5].any() and not dv[:5].any() and not dq[:5].any()
    assert_equal([out[5:], lse[5:]], run(q[5:], k[5:], v[5:], 2)[:2])


def test_more_queries_than_keys():
    q, k, v = draw(50, 10, 4, 2, 8)
    out, lse, dq, *_ = run(q, k, v, 2)
    assert not out[:40].any() and lse[:40].eq(-torch.inf).all() and not dq[:40].any()
    assert_equal([out[40:], lse[40:]], run(q[40:], k, v, 2)[:2])


def test_a_future_key_is_never_read():
    q, k, v = draw(70, 70, 4, 2, 8)
    clean = run(q, k, v, 2)
    k[69] = v[69] = float("nan")
    poisoned = run(q, k, v, 2)
    assert_equal([clean[0][:64], clean[1][:64]], [poisoned[0][:64], poisoned[1][:64]])
    assert poisoned[0][69].isnan().all()  # and one that is seen shows


@pytest.mark.skipif(
    KERNELS, reason="a tile of tensor cores multiplies what one of its rows does not see by 0"
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_hidden_numbers_reach_nothing(dtype, bad):
    """A key and value from a query that does not see them, and a query and its gradient from keys it does not see."""
    T, S, names = 40, 70, ["out", "lse", "dq", "dk", "dv"]
    q, k, v = draw(T, S, 6, 2, 24, dtype)
    dout = draw(T, S, 6, 2, 24, dtype, seed=1)[0]

    def results(q, k, v, dout):
        inputs = leaves(q, k, v)
        out, lse = head_attention(*inputs, 2, return_lse=True)
        return dict(zip(names, [out.detach(), lse, *torch.autograd.grad(out, inputs, dout)], strict=True))

    clean = results(q, k, v, dout)
    for key in (33, 40, 69):
        blind = key - (S - T)  # queries that do not see it
        for spoiled in (k, v):
            kept = spoiled[key].clone()
            spoiled[key] = bad
            found = results(q, k, v, dout)
            spoiled[key] = kept
            for name in ("out", "lse", "dq"):
                assert torch.equal(found[name][:blind], clean[name][:blind]), (key, name)
            assert not found["out"][blind:].isfinite().all() or not found["dq"][blind:].isfinite().all()
    for query in (0, 17, 38):
        hidden = query + S - T + 1  # keys from there on
        for spoiled in (q, dout):
            kept = spoiled[query].clone()
            spoiled[query] = bad
            found = results(q, k, v, dout)
            spoiled[query] = kept
            for name in ("dk", "dv"):
                assert torch.equal(found[name][hidden:], clean[name][hidden:]), (query, name)
            assert found["dk"][:hidden].isnan().any()


@pytest.mark.parametrize(("T", "S", "heads"), [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
def test_empty(T, S, heads):
    q, k, v = draw(T, S, 4, 2, 8)
    out, lse, dq, dk, dv = run(q, k, v, heads)
    assert out.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape and lse.shape == (T, 4)
    assert not any(t.any() for t in (out, dq, dk, dv)) and lse.eq(-torch.inf).all()


def test_no_sequences():
    q, k, v = draw(0, 0, 4, 2, 8)
    ends = torch.tensor([0])
    extent, start = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    out = head_attention(q, k, v, 2, extent=extent, k_start=start, cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert out.shape == (0, 4, 8)


@pytest.mark.skipif(KERNELS, reason="a GPU sums as the tile of queries has it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_beside_others(dtype):
    """And beside keys it does not see, with more keys than a matrix unit's tiles are kept of."""
    T, S = 40, 1100
    q, k, v = draw(T, S, 4, 2, 256, dtype)
    out = head_attention(q, k, v, 2)
    for row in (0, 31, 39):
        seen = S - T + row + 1
        alone = head_attention(q[row : row + 1], k[:seen], v[:seen], 2)
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(causal=False),
        dict(window=150, sinks=torch.tensor([0.0, 3.0, -9.0, 1.0, 0.5, 2.0])),
        dict(softcap=2.0, scale=-0.3),
        dict(scale=0.0),
        dict(index=torch.tensor([4, 0, 5])),
        dict(extent=torch.arange(300) % 3, extent_per="token"),
        dict(k_start=torch.tensor([0, 50]), cu_seqlens_q=torch.tensor([0, 170, 300]),
             cu_seqlens_k=torch.tensor([0, 160, 340])),
    ],
    ids=lambda options: "-".join(options) or "causal",
)  # fmt: skip
def test_bfloat16_of_hundreds_of_keys(options):
    """Blocks of keys and of queries, whole and in part."""
    q, k, v = draw(300, 340, 6, 2, 40, torch.bfloat16)
    heads = len(options.get("index", (0, 1)))
    ours = head_attention(q, k, v, heads, return_lse=True, **options)
    plain = reference.head_attention(q, k, v, heads, **options)
    exact = reference.head_attention(q.double(), k.double(), v.double(), heads, **options)
    assert_no_worse(ours[0], plain[0], exact[0])
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("D", [1, 3, 17, 80, 128])
def test_any_head_size(D):
    q, k, v = draw(35, 66, 4, 2, D)
    ours, plain = head_attention(q, k, v, 2), reference.head_attention(q, k, v, 2)[0]
    assert_no_worse(ours, plain, reference.head_attention(q.double(), k.double(), v.double(), 2)[0])


def test_strides_do_not_matter():
    q, k, v = draw(40, 50, 6, 2, 16)
    expected = run(q, k, v, 2)
    fused = torch.cat([k.flatten(1), v.flatten(1)], 1)  # k and v as views of one projection
    k_view, v_view = fused[:, :32].view(50, 2, 16), fused[:, 32:].view(50, 2, 16)
    q_view = q.permute(2, 1, 0).contiguous().permute(2, 1, 0)  # last dimension not adjacent
    inputs = [q_view.requires_grad_(), k_view.requires_grad_(), v_view.requires_grad_()]
    out, lse = head_attention(*inputs, 2, return_lse=True)
    assert_equal([out.detach(), lse, *gradients(out, inputs)], expected)


def test_expanded_and_transposed_gradients():
    q, k, v = leaves(*draw(40, 40, 6, 2, 16))
    out = head_attention(q, k, v, 2)
    summed = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)  # a gradient of stride 0
    assert_equal(summed, torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True))
    dout = torch.randn(16, 6, 40).permute(2, 1, 0)
    transposed = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    assert_equal(transposed, torch.autograd.grad(out, (q, k, v), dout.contiguous()))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_every_combination_of_gradients(wanted):
    expected = run(*draw(40, 40, 6, 2, 16), 2)[2:]
    inputs = [t.requires_grad_(want) for t, want in zip(draw(40, 40, 6, 2, 16), wanted, strict=True)]
    out = head_attention(*inputs, 2)
    chosen = [t for t, want in zip(inputs, wanted, strict=True) if want]
    assert_equal(gradients(out, chosen), [g for g, want in zip(expected, wanted, strict=True) if want])


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"heads": 1, "unit": "query", "causal": False, "scale": 0.3},
        {"heads": 2, "extent": torch.tensor([2, 0, 1, 2, 1]), "extent_per": "token"},
        {"heads": 3, "index": torch.tensor([3, 0, 2]), "k_start": torch.tensor([2])},
    ],
)
def test_gradcheck(options):
    inputs = leaves(*draw(5, 7, 4, 2, 3, torch.float64))
    assert torch.autograd.gradcheck(
        lambda q, k, v: head_attention(q, k, v, **options),
        inputs,
        fast_mode=KERNELS,  # hundreds of launches otherwise
    )


def test_second_gradients_are_refused():
    q, k, v = leaves(*draw(5, 5, 4, 2, 8))
    (dq,) = torch.autograd.grad(head_attention(q, k, v, 2).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="head_attention_backward"):
        dq.sum().backward()


@pytest.mark.parametrize("options", [{}, {"window": 45, "softcap": 2.0}])
def test_threads_do_not_change_a_bit(options, set_threads):
    q, k, v = draw(200, 200, 3, 1, 16)  # one group: several threads split it by blocks, one thread does not
    results = []
    for threads in (1, 4):
        set_threads(threads)
        results.append(run(q, k, v, 1, **options))
    assert_equal(*results)


def test_compiles_to_one_graph():
    q, k, v = leaves(*draw(20, 20, 4, 2, 8))
    extent, sinks = torch.randint(0, 3, (20,)), torch.randn(4)

    def attend(q, k, v, extent):
        return head_attention(
            q, k, v, 2, extent=extent, extent_per="token", window=7, softcap=2.0, sinks=sinks
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v, extent)
    eager = attend(q, k, v, extent)
    assert_equal([compiled, *gradients(compiled, (q, k, v))], [eager, *gradients(eager, (q, k, v))])


def test_autocast():
    q, k, v = draw(20, 20, 4, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = head_attention(q, k.bfloat16(), v, 2)
    assert torch.equal(out, head_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 2))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_fuzz(data):
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    G, M, D, B = number(1, 4), number(1, 8), number(1, 20), number(1, 3)
    lengths_q, lengths_k = ([number(0, 100) for _ in range(B)] for _ in range(2))
    unit = data.draw(st.sampled_from(UNITS))
    heads = number(0, G if unit == "kv_group" else M)
    options = {"unit": unit, "causal": data.draw(st.booleans())}
    ends = [torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (lengths_q, lengths_k)]
    options["cu_seqlens_q"], options["cu_seqlens_k"] = ends
    if data.draw(st.booleans()):
        options["k_start"] = torch.tensor([number(0, length) for length in lengths_k])
    mode = data.draw(st.sampled_from(["none", "sequence", "token", "index"]))
    if options["causal"] and data.draw(st.booleans()):
        options["window"] = number(1, 120)
    seed = number(0, 1 << 30)
    generator = torch.Generator().manual_seed(seed)
    if data.draw(st.booleans()):
        options["softcap"] = 1.5
        options["sinks"] = torch.randn(G * M, generator=generator, dtype=torch.float64)
    if mode == "index":
        heads = number(0, G * M)
        options["index"] = torch.randperm(G * M, generator=generator)[:heads]
    elif mode != "none":
        count = B if mode == "sequence" else sum(lengths_q)
        options["extent"] = torch.randint(0, heads + 1, (count,), generator=generator)
        options["extent_per"] = mode
    q, k, v = draw(sum(lengths_q), sum(lengths_k), G * M, G, D, torch.float64, seed)
    ours = run(q, k, v, heads, **options)
    inputs = leaves(q, k, v)
    out, lse = reference.head_attention(*inputs, heads, **options)
    grads = torch.autograd.grad(
        out, inputs, torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype),
        allow_unused=True, materialize_grads=True,
    ) if out.requires_grad else [torch.zeros_like(t) for t in inputs]  # fmt: skip
    for a, b in zip(ours, [out, lse, *grads], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11)


CHECK = """
import itertools
import torch
from flextron_ext import head_attention, head_attention_decode, reference
torch.manual_seed(0)
tolerances = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
scores = {}, dict(window=20, softcap=2.0, sinks=torch.randn(6))
for (dtype, tolerance), options in itertools.product(tolerances.items(), scores):
    q, k, v = (torch.randn(70, n, 20, dtype=dtype).requires_grad_() for n in (6, 2, 2))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    new = q[:6].view(2, 3, 6, 20), k[:64].view(2, 32, 2, 20), v[:64].view(2, 32, 2, 20), torch.tensor([32, 9])
    wide_new = [t.detach().double() for t in new[:3]] + [new[3]]
    decoded = head_attention_decode(*new, 2, **options)
    expected = reference.head_attention_decode(*wide_new, 2, **options)
    torch.testing.assert_close(decoded.double(), expected, rtol=0, atol=tolerance)
    out, exact = head_attention(q, k, v, 2, **options), reference.head_attention(*wide, 2, **options)[0]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)
    dout = torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(exact, wide, dout.double())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=8 * tolerance)
print("right")
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_each_instruction_set(isa, processes):
    result = run_python(processes, isa, CHECK)
    assert result.out.strip() == "right", result.err


def test_an_unknown_instruction_set_is_named(processes):
    wanted = (
        "FLEXTRON_ISA: value must be generic, avx2, avx512, avx512_vnni, avx512_bf16, amx, arm_dot or arm_bf16, "
        "got mmx"
    )
    assert wanted in run_python(processes, "mmx", CHECK).err


def bad(**changes):
    q, k, v = draw(6, 6, 4, 2, 8)
    return {"q": q, "k": k, "v": v, "heads": 2, **changes}


def ints(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": 3}, ValueError, r"heads must lie in \[0, 2\], got 3"),
        ({"heads": -1}, ValueError, r"heads must lie in \[0, 2\], got -1"),
        ({"unit": "head"}, ValueError, "unit must be kv_group or query, got head"),
        ({"extent_per": "row"}, ValueError, "extent_per must be sequence or token, got row"),
        ({"q": torch.zeros(6, 4)}, ValueError, "q must have 3 dimensions, got 2"),
        (
            {"q": torch.zeros(6, 3, 8)},
            ValueError,
            r"q.shape\[-2\] must be divisible by k.shape\[-2\] \(2\), got 3",
        ),
        ({"k": torch.zeros(6, 2, 4)}, ValueError, r"v must have shape \[6, 2, 4\], got \[6, 2, 8\]"),
        ({"k": torch.zeros(6, 2, 8).double()}, TypeError, "k must have the dtype of q"),
        ({"extent": ints(1, 1)}, ValueError, r"extent must have shape \[1\], got \[2\]"),
        (
            {"extent": ints(1, 1), "extent_per": "token"},
            ValueError,
            r"extent must have shape \[6\], got \[2\]",
        ),
        ({"extent": torch.ones(1)}, TypeError, "extent must be int32, int64, got float32"),
        ({"index": ints(1)}, ValueError, r"heads must lie in \[1, 1\], got 2"),
        ({"index": ints(0, 1), "extent": ints(1)}, ValueError, "extent must be None when index is given"),
        ({"k_start": ints(0, 0)}, ValueError, r"k_start must have shape \[1\], got \[2\]"),
        ({"cu_seqlens_q": ints(0, 3, 6)}, ValueError, r"cu_seqlens_k must have shape \[3\], got None"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"head_attention: {message}"):
        head_attention(**bad(**changes))


# A wrong value, the sentence about it, and what a kernel takes for it where anything is promised.
WRONG_VALUES = [
    ({"extent": ints(3)}, r"extent must lie in \[0, 2\], got 3", {"extent": ints(2)}),
    ({"extent": ints(-1)}, r"extent must lie in \[0, 2\], got -1", {"extent": ints(0)}),
    (
        {"extent": ints(3, -1, 1, 9, 2, 0), "extent_per": "token"},
        r"extent must lie in \[0, 2\], got 3",
        {"extent": ints(2, 0, 1, 2, 2, 0), "extent_per": "token"},
    ),
    ({"index": ints(0, 4)}, r"index must lie in \[0, 3\], got 4", {"index": ints(0, 3)}),
    ({"index": ints(1, 1)}, "index must name each head once, got 1 twice", None),
    ({"k_start": ints(7)}, r"k_start must lie in \[0, 6\], got 7", {"k_start": ints(6)}),
    ({"k_start": ints(-7)}, r"k_start must lie in \[0, 6\], got -7", {"k_start": ints(0)}),
    ({"cu_seqlens_q": ints(1, 6)}, "cu_seqlens_q must start with 0, got 1", None),
    ({"cu_seqlens_q": ints(0, 7)}, r"cu_seqlens_q must lie in \[0, 6\], got 7", {"cu_seqlens_q": ints(0, 6)}),
    (
        {"cu_seqlens_q": ints(0, 5, 3), "cu_seqlens_k": ints(0, 3, 6)},
        "cu_seqlens_q must not decrease, got 3 after 5",
        {"cu_seqlens_q": ints(0, 5, 5), "cu_seqlens_k": ints(0, 3, 6)},
    ),
    (
        {"cu_seqlens_q": ints(0, 6, 0, 6, 0, 6, 0), "cu_seqlens_k": ints(0, 6, 0, 6, 0, 6, 0)},
        "cu_seqlens_q must not decrease, got 0 after 6",
        None,
    ),
]


@pytest.mark.parametrize("changes, message, taken", WRONG_VALUES, ids=[row[1][:30] for row in WRONG_VALUES])
def test_a_wrong_value_is_refused_where_the_host_reads_it(changes, message, taken):
    """And moved into its range where it does not: a kernel never reads or writes beside its tensors."""
    arguments = bad()
    if not KERNELS:
        with pytest.raises(RuntimeError, match=f"head_attention: {message}"):
            head_attention(**arguments | changes)
        return
    ours = head_attention(**arguments | changes)
    if taken is not None:
        assert torch.equal(ours, head_attention(**arguments | taken))


def test_the_op_itself_checks_shapes():
    arguments = bad()
    for name, value, message in [
        ("q", torch.zeros(6, 4), "q must have 3 dimensions, got 2"),
        ("v", torch.zeros(5, 2, 8), r"v must have shape \[6, 2, 8\], got \[5, 2, 8\]"),
        ("k", torch.zeros(6, 2, 8).double(), "k must have dtype"),
        ("heads", 3, r"heads must lie in \[0, 2\], got 3"),
    ]:
        with pytest.raises(RuntimeError, match=f"head_attention: {message}"):
            torch.ops.flextron.head_attention(**{**arguments, name: value})
