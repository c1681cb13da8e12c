"""head_attention's gradients on Hopper, on a GPU or emulated: more tiles than stages, gathered and copied ones."""

from __future__ import annotations

import pytest
import torch
from emulator import build as emulator

from flextron.testing.numerics import assert_no_worse
from flextron_ext import head_attention, reference

pytestmark = pytest.mark.usefixtures("hopper_or_its_emulator")

HEAD_SIZES = [64, 80, 96, 128]
ROWS, TILE = 128, 64  # own rows of an item, and rows of a tile that passes
UNITS = ["kv_group", "query"]
NAMES = ("dq", "dk", "dv")

each_size = pytest.mark.parametrize("D", HEAD_SIZES)
each_unit = pytest.mark.parametrize("unit", UNITS)


@pytest.fixture
def draw(device):
    def drawn(T, S, H, G, D, dtype=torch.bfloat16):
        """q [T, H, D], k and v [S, G, D], dout as q."""
        shapes = ((T, H), (S, G), (S, G), (T, H))
        return [torch.randn(rows, heads, D, device=device).to(dtype) for rows, heads in shapes]

    return drawn


@pytest.fixture
def ints(device):
    return lambda *values: torch.tensor(values, device=device)


def gradients(q, k, v, dout, heads, op=head_attention, **options):
    """dq, dk, dv."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out = op(*inputs, heads, **options)
    return torch.autograd.grad(out[0] if op is not head_attention else out, inputs, dout)


def assert_equal(ours, theirs):
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert torch.equal(a, b), name


def assert_right(tensors, heads, **options):
    ours = gradients(*tensors, heads, **options)
    plain = gradients(*tensors, heads, reference.head_attention, **options)
    exact = gradients(*(t.double() for t in tensors), heads, reference.head_attention, **options)
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=True):
        assert_no_worse(a, b, c, name)


@each_size
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_values(D, causal, dtype, draw):
    """Six tiles of keys and five of queries: more than there are stages."""
    assert_right(draw(290, 330, 1, 1, D, dtype), 1, causal=causal)


@pytest.mark.parametrize("M", [1, 3, 4, 7, 8])
@each_unit
def test_group_ratios(M, unit, draw):
    heads = 1 if unit == "kv_group" else (M + 1) // 2
    assert_right(draw(70, 140, 2 * M, 2, 64), heads, unit=unit)


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_round_a_tile(causal, draw):
    for T, S in [(1, 1), (1, 129), (64, 64), (65, 63), (128, 128), (129, 65), (150, 40)]:
        assert_right(draw(T, S, 1, 1, 64), 1, causal=causal)


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.3])
def test_any_scale(scale, draw):
    assert_right(draw(70, 140, 1, 1, 64), 1, scale=scale)


# Queries and keys of each sequence, its first key that counts, its heads: an empty one, one without keys, one that
# sees none, one with more queries than keys.
SEQUENCES = [(133, 200, 3, 3), (0, 5, 2, 1), (7, 0, 0, 2), (1, 130, 129, 1), (140, 70, 5, 2), (3, 9, 9, 3)]


@each_unit
@pytest.mark.parametrize("D", [64, 80])
def test_a_ragged_batch_with_extents_is_its_sequences_apart(D, unit, draw, ints):
    queries, keys, starts, counts = zip(*SEQUENCES, strict=True)
    ends_q, ends_k = ([0, *torch.tensor(lengths).cumsum(0).tolist()] for lengths in (queries, keys))
    H, G = (3, 3) if unit == "kv_group" else (3, 1)
    q, k, v, dout = draw(ends_q[-1] + 4, ends_k[-1] + 5, H, G, D)
    for spoiled in (q, dout):
        spoiled[ends_q[-1] :] = torch.nan
    for spoiled in (k, v):
        spoiled[ends_k[-1] :] = torch.nan
        for b, start in enumerate(starts):
            spoiled[ends_k[b] : ends_k[b] + start] = torch.nan
    ours = gradients(
        q, k, v, dout, 3, unit=unit, extent=ints(*counts), k_start=ints(*starts),
        cu_seqlens_q=ints(*ends_q), cu_seqlens_k=ints(*ends_k),
    )  # fmt: skip
    for b, (first, count) in enumerate(zip(starts, counts, strict=True)):
        t, s = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        apart = gradients(q[t], k[s], v[s], dout[t], count, unit=unit, k_start=ints(first))
        assert_equal([ours[0][t], ours[1][s], ours[2][s]], apart)
    assert not any(x[end:].any() for x, end in zip(ours, (ends_q[-1], ends_k[-1], ends_k[-1]), strict=True))


@each_size
def test_a_list_may_skip_groups(D, draw, ints):
    q, k, v, dout = draw(140, 140, 6, 3, D)
    k[:, 1] = v[:, 1] = torch.nan
    q[:, [0, 2, 3, 4]] = dout[:, [0, 2, 3, 4]] = torch.nan
    dq, dk, dv = gradients(q, k, v, dout, 2, index=ints(5, 1))
    assert not any(x.any() for x in (dq[:, [0, 2, 3, 4]], dk[:, 1], dv[:, 1]))
    alone = gradients(
        *(x[:, heads] for x, heads in ((q, [1, 5]), (k, [0, 2]), (v, [0, 2]), (dout, [1, 5]))), 2
    )
    assert_equal([dq[:, [1, 5]], dk[:, [0, 2]], dv[:, [0, 2]]], alone)


@each_size
@each_unit
def test_heads_as_items_give_the_bits_of_heads_in_one(D, unit, draw, ints):
    """One sequence is few blocks of keys and groups, four are many to the emulator."""
    B, S, M = 4, 200, 3
    heads = 2
    q, k, v, dout = draw(B * S, B * S, 2 * M, 2, D)
    ends = ints(*range(0, B * S + 1, S))
    together = gradients(q, k, v, dout, heads, unit=unit, cu_seqlens_q=ends, cu_seqlens_k=ends)
    for b in range(B):
        rows = slice(b * S, (b + 1) * S)
        apart = gradients(q[rows], k[rows], v[rows], dout[rows], heads, unit=unit)
        assert_equal([x[rows] for x in together], apart)


@each_size
@each_unit
def test_gathered_tiles_give_the_bits_of_copied_ones(D, unit, draw, device):
    """Extents per token that are all the same: rows are gathered, in their old order."""
    H, G = (4, 2) if unit == "kv_group" else (2, 1)
    tensors = draw(200, 150, H, G, D)
    extent = torch.full((200,), 1, device=device)
    mixed = gradients(*tensors, 2, unit=unit, extent=extent, extent_per="token", causal=False)
    assert_equal(mixed, gradients(*tensors, 1, unit=unit, causal=False))


@each_unit
def test_what_tokens_leave_out_is_not_used(unit, draw, device):
    H, G = (4, 2) if unit == "kv_group" else (2, 1)
    q, k, v, dout = draw(200, 150, H, G, 64)
    extent = torch.randint(0, 3, (200,), device=device)
    options = dict(unit=unit, extent=extent, extent_per="token")
    clean = gradients(q, k, v, dout, 2, **options)
    of_unit = (
        torch.arange(H, device=device) // (H // G) if unit == "kv_group" else torch.arange(H, device=device)
    )
    out = of_unit >= extent[:, None]
    q[out] = dout[out] = torch.nan
    assert_equal(clean, gradients(q, k, v, dout, 2, **options))
    assert not clean[0][out].any()
    # A sum over the queries of each extent by themselves, in float64.
    exact = [0.0, 0.0]
    for count in (1, 2):
        rows = extent == count
        wide = [x.double() for x in (q, k, v, dout)]
        wide[3][~rows] = 0
        wide[0][~rows] = 0
        wide[0], wide[3] = (torch.where(out[..., None], 0, x) for x in (wide[0], wide[3]))
        parts = gradients(*wide, count, reference.head_attention, unit=unit)
        exact = [a + b for a, b in zip(exact, parts[1:], strict=True)]
    for ours, theirs in zip(clean[1:], exact, strict=True):
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm()


def test_queries_that_see_no_key_take_no_part(draw):
    q, k, v, dout = draw(300, 130, 1, 1, 64)
    q[:170] = dout[:170] = torch.nan
    dq, dk, dv = gradients(q, k, v, dout, 1)
    assert not dq[:170].any()
    assert_equal([dq[170:], dk, dv], gradients(q[170:], k, v, dout[170:], 1))


def test_nan_that_is_seen_shows(draw):
    q, k, v, dout = draw(130, 130, 1, 1, 64)
    v[100] = torch.nan
    dq, dk, dv = gradients(q, k, v, dout, 1)
    assert dq[100:].isnan().all() and dk[:100].isnan().all() and dv.isfinite().all()


@each_size
def test_two_runs_are_equal(D, draw, device):
    tensors = draw(200, 200, 3, 1, D)
    extent = torch.randint(0, 4, (200,), device=device)
    options = {"unit": "query", "extent": extent, "extent_per": "token"}
    assert_equal(gradients(*tensors, 3, **options), gradients(*tensors, 3, **options))


# ---- what the emulator counts ----


@pytest.fixture
def launched():
    if not emulator.loaded():
        pytest.skip("FLEXTRON_EMULATE=1 asks for the emulator")

    def launched(tensors, heads, mask=7, **options):
        """The counters of the kernels of the backward pass, by what is a block's own."""
        q, k, v, dout = tensors
        out, lse = head_attention(q, k, v, heads, return_lse=True, **options)
        emulator.reset()
        for name, tensor in zip("qkvo", tensors, strict=True):
            emulator.watch(name, tensor)
        arguments = dict(
            unit="kv_group", extent=None, extent_per="sequence", index=None, cu_seqlens_q=None,
            cu_seqlens_k=None, k_start=None, causal=True, scale=None, window=None, softcap=None, sinks=None,
        )  # fmt: skip
        arguments |= options
        torch.ops.flextron.head_attention_backward(
            dout, q, k, v, out, lse, heads, output_mask=mask, **arguments
        )
        found = [launch for launch in emulator.counters() if "backward" in launch["kernel"]]
        return {
            launch["kernel"].removeprefix("head_attention_backward_").split("_")[0]: launch
            for launch in found
        }

    return launched


def read_of(launch):
    """Elements of 2 bytes read of q, k, v and dout; nothing of them is written."""
    assert all(written == 0 for _, written in launch["watched"].values())
    return [launch["watched"].get(name, (0, 0))[0] // 2 for name in "qkvo"]


FEW = 4  # blocks of keys times groups, for the emulator's three multiprocessors


@pytest.mark.parametrize("M", [1, 3])
@each_unit
def test_cost_falls_with_the_heads(M, unit, draw, launched):
    G, T, S, D = 2, ROWS, 2 * ROWS, 64
    tensors = draw(T, S, G * M, G, D)
    for heads in {1, G if unit == "kv_group" else M}:
        found = launched(tensors, heads, unit=unit, causal=False)
        assert set(found) == {"queries", "keys"} | ({"sums"} if M > 1 else set())
        groups, active = (heads, heads * M) if unit == "kv_group" else (G, heads * G)
        for kernel, products in (("queries", 5), ("keys", 4)):
            assert found[kernel]["flops"] == 2 * products * active * T * S * D
        rows, keys = active * T * D, active * S * D
        assert read_of(found["queries"]) == [rows, 2 * keys, 2 * keys, rows]
        assert found["queries"]["bytes_written"] == rows * 2 + active * T * 4
        # With few blocks of keys and groups a head is an item: it reads its keys, leaves its sums and says so.
        # Else a group's heads but the last add to sums.
        rows, keys, blocks = active * S // ROWS * T * D, groups * S * D, groups * S // ROWS
        apart = M > 1 and blocks < FEW
        own = active * S * D if apart else keys
        assert read_of(found["keys"]) == [rows, own, own, rows]
        ours = active // groups  # heads of a group
        sums = 2 * 4 * keys * (ours if apart else ours - 1)
        of_result = 2 * keys * 2
        assert found["keys"]["bytes_written"] == sums + (4 * blocks * M if apart else of_result)
        if M > 1:
            assert found["sums"]["bytes_written"] == (of_result if apart else 0)


def test_what_is_not_seen_costs_nothing(draw, launched, ints):
    tiles = 4
    tensors = draw(tiles * TILE, tiles * TILE, 1, 1, 64)
    whole, causal = (launched(tensors, 1, causal=causal) for causal in (False, True))
    # Of 4 x 4 tiles the consumers' halves of 64 rows see ten; blocks of 128 bring twelve.
    for kernel in ("queries", "keys"):
        assert causal[kernel]["flops"] * 16 == whole[kernel]["flops"] * 10
    for kernel, passing in (("queries", (1, 2)), ("keys", (0, 3))):
        for i in passing:
            assert read_of(causal[kernel])[i] * 16 == read_of(whole[kernel])[i] * 12
    late = launched(tensors, 1, causal=False, k_start=ints(ROWS))
    for kernel in ("queries", "keys"):
        assert late[kernel]["flops"] * 2 == whole[kernel]["flops"]
        assert read_of(late[kernel])[1] * 2 == read_of(whole[kernel])[1]
    never = launched(tensors, 1, causal=False, k_start=ints(tiles * TILE))
    assert all(launch["flops"] == 0 and not any(read_of(launch)) for launch in never.values())


@each_unit
@pytest.mark.parametrize("heads", [1, 3])
def test_tokens_cost_what_they_see(heads, unit, draw, launched, device):
    """In tiles of queries that share an extent and halves of blocks of keys: of those that see none, nothing."""
    T, D = 700, 64
    H, G = (heads, heads) if unit == "kv_group" else (heads, 1)
    extent = torch.randint(0, heads + 1, (T,), device=device)
    found = launched(draw(T, T, H, G, D), heads, unit=unit, extent=extent, extent_per="token")["keys"]
    order = extent.argsort(descending=True, stable=True)
    rows = tiles = 0
    for head in range(heads):
        active = order[: int((extent > head).sum())]
        for first in range(0, T, TILE):
            latest = [int(tile.max()) for tile in active.split(TILE)]
            tiles += sum(t >= first for t in latest)
            if first % ROWS == 0:
                rows += int((active >= first).sum())
    assert found["flops"] == 2 * 4 * tiles * TILE * TILE * D
    assert read_of(found)[0] == read_of(found)[3] == rows * D


@pytest.mark.parametrize("mask", [1, 2, 4, 6])
def test_only_what_is_asked_for_is_computed(mask, draw, launched):
    found = launched(draw(ROWS, ROWS, 1, 1, 64), 1, mask=mask)
    assert set(found) == ({"queries"} if mask == 1 else {"queries", "keys"})
    of_one, delta = ROWS * 64 * 2, ROWS * 4
    assert found["queries"]["bytes_written"] == delta + (of_one if mask == 1 else 0)
    if mask > 1:
        assert found["keys"]["bytes_written"] == of_one * (2 if mask == 6 else 1)


@each_size
@pytest.mark.parametrize("per_token", [False, True])
def test_shared_memory_has_no_conflicts(D, per_token, draw, launched, device):
    tensors = draw(150, 200, 2, 1, D)
    options = {"unit": "query"}
    if per_token:
        options |= {"extent": torch.randint(0, 3, (150,), device=device), "extent_per": "token"}
    for kernel, launch in launched(tensors, 2, **options).items():
        assert kernel == "sums" or launch["shared_accesses"] > 0
        assert launch["bank_conflicts"] == 0


def test_what_the_copy_engine_cannot_take_goes_the_portable_way(draw, launched):
    q, k, v, dout = draw(70, 70, 2, 1, 64)
    narrow = torch.full((70, 2, 68), torch.nan, dtype=q.dtype, device=q.device)[..., :64]  # rows of 136 bytes
    narrow.copy_(q)
    found = launched((narrow, k, v, dout), 1)
    assert found and all(name.startswith("kernel<") for name in found)
    assert_right((narrow, k, v, dout), 1)
