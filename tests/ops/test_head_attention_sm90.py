"""head_attention's Hopper kernel, on a GPU or emulated: several blocks of queries and keys, more keys than stages."""

from __future__ import annotations

import pytest
import torch
from emulator import build as emulator

from flextron.testing.numerics import assert_no_worse
from flextron_ext import head_attention, reference

pytestmark = pytest.mark.usefixtures("hopper_or_its_emulator")

HEAD_SIZES = [64, 80, 96, 128]
BLOCK = 128  # queries of an item, and keys of a step
UNITS = ["kv_group", "query"]

each_size = pytest.mark.parametrize("D", HEAD_SIZES)
each_unit = pytest.mark.parametrize("unit", UNITS)


@pytest.fixture
def draw(device):
    def drawn(T, S, H, G, D, dtype=torch.bfloat16):
        """q [T, H, D], k and v [S, G, D]."""
        return [
            torch.randn(rows, heads, D, device=device).to(dtype) for rows, heads in ((T, H), (S, G), (S, G))
        ]

    return drawn


@pytest.fixture
def ints(device):
    return lambda *values: torch.tensor(values, device=device)


def run(q, k, v, heads, **options):
    """out, lse."""
    return head_attention(q, k, v, heads, return_lse=True, **options)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def assert_right(q, k, v, heads, **options):
    out, lse = run(q, k, v, heads, **options)
    plain, _ = reference.head_attention(q, k, v, heads, **options)
    exact, exact_lse = reference.head_attention(q.double(), k.double(), v.double(), heads, **options)
    assert_no_worse(out, plain, exact)
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    seen = ~lse.isinf()
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=1e-5, atol=1e-5)


@each_size
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_values(D, causal, dtype, draw):
    assert_right(*draw(190, 700, 2, 1, D, dtype), 1, causal=causal)


@pytest.mark.parametrize("M", [1, 3, 4, 7, 8])
@each_unit
def test_group_ratios(M, unit, draw):
    heads = 2 if unit == "kv_group" else (M + 1) // 2
    assert_right(*draw(70, 150, 3 * M, 3, 64), heads, unit=unit)


@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (1, 129), (64, 64), (65, 127), (128, 128), (129, 130), (257, 40), (300, 300)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(T, S, causal, draw):
    assert_right(*draw(T, S, 1, 1, 64), 1, causal=causal)


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.3])
def test_any_scale(scale, draw):
    assert_right(*draw(70, 200, 1, 1, 64), 1, scale=scale)


@each_size
@each_unit
def test_a_subset_is_the_op_on_sliced_heads(D, unit, draw):
    H, G, heads = 6, 3, 2 if D % 64 else 1
    q, k, v = draw(140, 270, H, G, D)
    of_unit = torch.arange(H) // (H // G) if unit == "kv_group" else torch.arange(H) % (H // G)
    active = of_unit < heads
    groups = heads if unit == "kv_group" else G
    poisoned = [t.clone() for t in (q, k, v)]
    poisoned[0][:, ~active] = torch.nan
    for t in poisoned[1:]:
        t[:, groups:] = torch.nan
    out, lse = run(*poisoned, heads, unit=unit)
    assert not out[:, ~active].any() and lse[:, ~active].eq(-torch.inf).all()
    sliced = run(q[:, active].contiguous(), k[:, :groups], v[:, :groups], groups)
    assert_equal([out[:, active], lse[:, active]], sliced)


def test_a_list_may_skip_groups(draw, ints):
    q, k, v = draw(140, 140, 6, 3, 64)
    index = ints(5, 1)
    clean = run(q, k, v, 2, index=index)
    k[:, 1] = v[:, 1] = torch.nan
    q[:, [0, 2, 3, 4]] = torch.nan
    out, lse = run(q, k, v, 2, index=index)
    assert_equal(clean, [out, lse])
    assert not out[:, [0, 2, 3, 4]].any()
    alone = run(q[:, [1, 5]].contiguous(), k[:, [0, 2]].contiguous(), v[:, [0, 2]].contiguous(), 2)
    assert_equal([out[:, [1, 5]], lse[:, [1, 5]]], alone)


# Queries and keys of each sequence, its first key that counts, its heads: an empty one, one without keys, one that
# sees none, one behind whose last key the next begins.
SEQUENCES = [(133, 300, 0, 3), (0, 5, 2, 1), (7, 0, 0, 2), (1, 130, 129, 1), (140, 40, 11, 2), (3, 9, 9, 3)]


@each_unit
@each_size
def test_a_ragged_batch_with_extents_is_its_sequences_apart(D, unit, draw, ints):
    queries, keys, starts, counts = zip(*SEQUENCES, strict=True)
    ends_q, ends_k = ([0, *torch.tensor(lengths).cumsum(0).tolist()] for lengths in (queries, keys))
    H, G = (3, 3) if unit == "kv_group" else (3, 1)
    q, k, v = draw(ends_q[-1] + 4, ends_k[-1] + 5, H, G, D)
    out, lse = run(
        q, k, v, 3, unit=unit, extent=ints(*counts), k_start=ints(*starts),
        cu_seqlens_q=ints(*ends_q), cu_seqlens_k=ints(*ends_k),
    )  # fmt: skip
    for b, (first, count) in enumerate(zip(starts, counts, strict=True)):
        t, s = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        # Alone, and with every key that is not its own poisoned: behind it, before it, and below its start.
        apart = run(q[t], k[s], v[s], count, unit=unit, k_start=ints(first))
        assert_equal([out[t], lse[t]], apart)
        others = torch.ones(len(k), dtype=torch.bool, device=k.device)
        others[s.start + first : s.stop] = False
        poisoned = [x.clone() for x in (k, v)]
        for x in poisoned:
            x[others] = torch.nan
        mine = run(
            q, *poisoned, 3, unit=unit, extent=ints(*counts), k_start=ints(*starts),
            cu_seqlens_q=ints(*ends_q), cu_seqlens_k=ints(*ends_k),
        )  # fmt: skip
        assert_equal([part[t] for part in mine], [out[t], lse[t]])
    assert not out[ends_q[-1] :].any() and lse[ends_q[-1] :].eq(-torch.inf).all()


@each_size
@pytest.mark.parametrize("causal", [True, False])
def test_keys_before_the_start_may_as_well_be_cut_off(D, causal, draw, ints):
    q, k, v = draw(140, 300, 1, 1, D)
    k[:37] = v[:37] = torch.nan
    ours = run(q, k, v, 1, k_start=ints(37), causal=causal)
    assert_equal(ours, run(q, k[37:], v[37:], 1, causal=causal))
    assert ours[0].isfinite().all()


@each_size
@each_unit
def test_extents_per_token_are_separate_calls(D, unit, draw, ints, device):
    H, G = (3, 3) if unit == "kv_group" else (3, 1)
    ends_q, ends_k = ints(0, 200, 215), ints(0, 230, 300)
    q, k, v = draw(215, 300, H, G, D)
    extent = torch.randint(0, 4, (215,), device=device)
    options = {"unit": unit, "cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k}
    out, lse = run(q, k, v, 3, extent=extent, extent_per="token", **options)
    for count in range(4):
        rows = extent == count
        alone = run(q, k, v, count, **options)
        assert_equal([out[rows], lse[rows]], [part[rows] for part in alone])


def test_a_query_that_sees_no_key_is_zero(draw):
    q, k, v = draw(300, 130, 1, 1, 64)
    out, lse = run(q, k, v, 1)
    assert not out[:170].any() and lse[:170].eq(-torch.inf).all() and out[170:].any(-1).all()
    assert_equal([out[170:], lse[170:]], run(q[170:], k, v, 1))


def test_nan_that_is_seen_shows(draw):
    q, k, v = draw(300, 300, 1, 1, 64)
    clean = run(q, k, v, 1)
    for spoiled in (k, v):
        kept = spoiled[200].clone()
        spoiled[200] = torch.nan
        out, lse = run(q, k, v, 1)
        assert_equal([out[:128], lse[:128]], [clean[0][:128], clean[1][:128]])  # these skip its block
        assert out[200:].isnan().all()
        spoiled[200] = kept


def test_great_scores_do_not_overflow(draw):
    q, k, v = draw(70, 300, 1, 1, 64)
    assert_right(q * 8, k * 8, v, 1)


def test_strides_do_not_matter(draw):
    q, k, v = draw(140, 150, 4, 2, 96)
    fused = torch.cat([q.flatten(1)[:, :192], torch.full_like(q.flatten(1), torch.nan)], 1)  # [140, 576]
    views = fused[:, :192].view(140, 2, 96)
    both = torch.stack([k, v], 2)  # [150, 2, 2, 96]
    expected = run(q[:, :2].contiguous(), k, v, 2)
    assert_equal(run(views, both[:, :, 0], both[:, :, 1], 2), expected)


@each_size
def test_two_runs_are_equal(D, draw, device):
    q, k, v = draw(300, 400, 3, 1, D)
    extent = torch.randint(0, 4, (300,), device=device)
    for options in ({}, {"unit": "query", "extent": extent, "extent_per": "token"}):
        heads = 3 if options else 1
        assert_equal(run(q, k, v, heads, **options), run(q, k, v, heads, **options))


# ---- what the emulator counts ----


@pytest.fixture
def attended():
    if not emulator.loaded():
        pytest.skip("FLEXTRON_EMULATE=1 asks for the emulator")

    def launched(q, k, v, heads, **options):
        """The counters of the kernel that attends; q, k and v are watched."""
        emulator.reset()
        for name, tensor in {"q": q, "k": k, "v": v}.items():
            emulator.watch(name, tensor)
        run(q, k, v, heads, **options)
        (launch,) = [c for c in emulator.counters() if c["kernel"].startswith("head_attention_kernel<Shape")]
        assert all(launch["watched"].get(name, (0, 0))[1] == 0 for name in "qkv")
        return launch

    return launched


def read_of(launch, name):
    return launch["watched"].get(name, (0, 0))[0]


@each_size
def test_cost_falls_with_the_heads(D, draw, attended):
    q, k, v = draw(140, 270, 8, 4, D)
    whole = attended(q, k, v, 4)
    for heads in (3, 2, 1):
        part = attended(q, k, v, heads)
        assert part["flops"] * 4 == whole["flops"] * heads
        assert all(read_of(part, name) * 4 == read_of(whole, name) * heads for name in "qkv")


def test_keys_that_none_sees_are_not_read(draw, attended, ints):
    row = 64 * 2
    q, k, v = draw(BLOCK, 5 * BLOCK, 1, 1, 64)
    for options, blocks in [({}, 5), ({"k_start": ints(BLOCK)}, 4), ({"k_start": ints(5 * BLOCK)}, 0)]:
        launch = attended(q, k, v, 1, **options)
        assert read_of(launch, "k") == read_of(launch, "v") == blocks * BLOCK * row
        assert (launch["flops"] > 0) == (blocks > 0)
    q, k, v = draw(3 * BLOCK, 3 * BLOCK, 1, 1, 64)  # blocks of queries see one, two and three blocks of keys
    assert read_of(attended(q, k, v, 1), "k") == 6 * BLOCK * row
    assert read_of(attended(q, k, v, 1, causal=False), "k") == 9 * BLOCK * row


def test_a_half_skips_what_only_the_other_sees(draw, attended):
    """Queries 0 .. 63 of a block whose last block of keys begins behind them."""
    q, k, v = draw(BLOCK, BLOCK + 64, 1, 1, 64)
    launch = attended(q, k, v, 1)
    assert launch["flops"] == 3 * (4 * 64 * BLOCK * 64)  # the lower half two blocks, the upper one


@each_size
@pytest.mark.parametrize("per_token", [False, True])
def test_shared_memory_has_no_conflicts(D, per_token, draw, attended, device):
    q, k, v = draw(200, 300, 2, 1, D)
    options = {"unit": "query", "extent": torch.randint(0, 3, (200,), device=device), "extent_per": "token"}
    launch = attended(q, k, v, 2, **options) if per_token else attended(q, k, v, 1)
    assert launch["shared_accesses"] > 0 and launch["bank_conflicts"] == 0
