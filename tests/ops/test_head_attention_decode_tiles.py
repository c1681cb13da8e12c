"""head_attention_decode's CUDA kernels, on a GPU or emulated: tiles, chunks, pages and the batch change no result."""

import pytest
import torch

from flextron.testing.numerics import assert_no_worse
from flextron_ext import head_attention_decode, reference

pytestmark = pytest.mark.usefixtures("a_gpu_or_its_emulator")

NAN = float("nan")
DTYPES = (torch.bfloat16, torch.float16)
GROUPS = 2
LENGTHS = (150, 1, 0, 64, 65, 17)  # several chunks of 64; one; none; a full one; a key more; a warp and a key

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_unit = pytest.mark.parametrize("unit", ["kv_group", "query"])


def make(device, M, T, D, dtype=torch.bfloat16, lengths=LENGTHS, G=GROUPS, poison=False):
    """q, k_cache, v_cache, seqlens; where there are no keys they are NaN, or noise."""
    B, S = len(lengths), max(lengths)
    q = torch.randn(B, T, G * M, D, device=device, dtype=dtype)
    caches = [torch.randn(B, S, G, D, device=device, dtype=dtype) for _ in range(2)]
    for b, length in enumerate(lengths if poison else ()):
        for cache in caches:
            cache[b, length:] = NAN
    return q, *caches, torch.tensor(lengths, device=device)


def paged(k, v, page, spare=2):
    """The caches cut into shuffled pages, NaN where there is no key: k_cache, v_cache, block_table."""
    B, S, G, D = k.shape
    columns = -(-S // page)
    table = torch.randperm(B * columns + spare)[: B * columns].to(k.device)
    pools = []
    for cache in (k, v):
        padded = cache.new_full((B, columns * page, G, D), NAN)
        padded[:, :S] = cache
        pool = cache.new_full((B * columns + spare, page, G, D), NAN)
        pool[table] = padded.view(B * columns, page, G, D)
        pools.append(pool)
    return *pools, table.view(B, columns)


def check(dtype, q, k, v, *arguments, **options):
    ours = head_attention_decode(q, k, v, *arguments, **options)
    plain = reference.head_attention_decode(q, k, v, *arguments, **options)
    exact = reference.head_attention_decode(q.double(), k.double(), v.double(), *arguments, **options)
    assert_no_worse(ours, plain, exact, str(options), dtype)
    return ours


@each_dtype
@pytest.mark.parametrize("D", [5, 40, 64, 72, 80, 96, 100, 128, 136])
def test_head_sizes(D, dtype, device):
    check(dtype, *make(device, 2, 2, D, dtype), 2)


@each_unit
@pytest.mark.parametrize("M, T", [(1, 1), (3, 1), (4, 2), (7, 2), (8, 1), (8, 4), (4, 8), (8, 8), (1, 40)])
def test_ratios_and_queries(M, T, unit, device):
    inputs = make(device, M, T, 64)
    for heads in {1, M if unit == "query" else GROUPS}:
        check(torch.bfloat16, *inputs, heads, unit)


@each_unit
@each_dtype
def test_extents_of_sequences(unit, dtype, device):
    inputs = make(device, 4, 3, 80, dtype)
    high = 4 if unit == "query" else GROUPS
    extent = torch.arange(len(LENGTHS), device=device) % (high + 1)
    ours = check(dtype, *inputs, high, unit, extent=extent)
    number = torch.arange(GROUPS * 4, device=device)
    number = number % 4 if unit == "query" else number // 4
    for b, kept in enumerate(extent.tolist()):
        assert not ours[b, :, number >= kept].any()
    one = head_attention_decode(*inputs, high, unit, extent=extent[1:2])
    assert torch.equal(one, head_attention_decode(*inputs, 1, unit))


@pytest.mark.parametrize("T, window", [(1, 33), (8, 70)])
def test_window_softcap_and_sinks(T, window, device):
    """Of windows that begin inside a chunk, in contiguous caches and in pages."""
    q, k, v, seqlens = make(device, 4, T, 64)
    options = dict(window=window, softcap=1.5, sinks=torch.randn(q.shape[2], device=device))
    ours = check(torch.bfloat16, q, k, v, seqlens, 2, **options)
    *pages, table = paged(k, v, 16)
    assert torch.equal(head_attention_decode(q, *pages, seqlens, 2, block_table=table, **options), ours)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 5])
def test_a_sequence_alone_gives_the_bits_it_has_in_a_batch(T, dtype, device):
    lengths = (700, *LENGTHS, 2100)  # of chunks of another length
    q, k, v, seqlens = make(device, 3, T, 64, dtype, lengths)
    start = torch.tensor([length // 3 for length in lengths], device=device)
    together = head_attention_decode(q, k, v, seqlens, 2, k_start=start)
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        alone = head_attention_decode(
            q[one], k[one, :length], v[one, :length], seqlens[one], 2, k_start=start[one]
        )
        assert torch.equal(alone, together[one])


@each_dtype
@pytest.mark.parametrize("page", [1, 16, 64, 256])
@pytest.mark.parametrize("D", [64, 80])
def test_pages_give_the_bits_of_the_contiguous_cache(page, D, dtype, device):
    q, k, v, seqlens = make(device, 4, 2, D, dtype)
    expected = head_attention_decode(q, k, v, seqlens, 2)
    k_pages, v_pages, table = paged(k, v, page)
    for b, length in enumerate(LENGTHS):
        table[b, -(-length // page) :] = -1  # what is not in use is not looked at
    assert torch.equal(head_attention_decode(q, k_pages, v_pages, seqlens, 2, block_table=table), expected)


@each_unit
@pytest.mark.parametrize("D", [64, 80, 128])
def test_what_is_not_there_is_never_used(D, unit, device):
    q, k, v, seqlens = make(device, 3, 2, D, poison=True)
    start = torch.tensor([0, 0, 0, 20, 64, 16], device=device)
    clean = [t.nan_to_num(0.0) for t in (k, v)]
    for b, first in enumerate(start.tolist()):
        k[b, :first] = v[b, :first] = NAN
    if unit == "kv_group":
        k[:, :, 1] = v[:, :, 1] = NAN
    expected = head_attention_decode(q, *clean, seqlens, 1, unit, k_start=start)
    assert torch.equal(head_attention_decode(q, k, v, seqlens, 1, unit, k_start=start), expected)
    assert not expected.isnan().any() and not expected[2].any()
    v[0, 149] = NAN  # and one that is seen shows
    shown = head_attention_decode(q, k, v, seqlens, 1, unit, k_start=start)
    assert shown[0, 1, 0].isnan().all() and torch.equal(shown[1:], expected[1:])


@each_dtype
def test_keys_before_k_start_might_as_well_not_be_there(dtype, device):
    q, k, v, _ = make(device, 4, 2, 64, dtype, (200,))
    cut = head_attention_decode(q, k[:, 37:], v[:, 37:], torch.tensor([163], device=device), 2)
    start = torch.tensor([37], device=device)
    assert torch.equal(
        head_attention_decode(q, k, v, torch.tensor([200], device=device), 2, k_start=start), cut
    )


@each_dtype
@pytest.mark.parametrize("D", [64, 80, 96, 128])
def test_any_address_and_stride_gives_the_same_bits(D, dtype, device):
    q, k, v, seqlens = make(device, 2, 2, D, dtype)
    expected = head_attention_decode(q, k, v, seqlens, 2)

    def moved(t):  # an element further, rows of an odd length
        room = t.new_full((*t.shape[:-1], t.shape[-1] + 3), NAN)
        room[..., 1:-2] = t
        return room[..., 1:-2]

    assert torch.equal(head_attention_decode(*map(moved, (q, k, v)), seqlens, 2), expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(head_attention_decode(*heads_first, seqlens, 2), expected)


def test_more_sequences_than_a_block_has_threads(device):
    lengths = tuple(b % 3 * 40 for b in range(150))
    q, k, v, seqlens = make(device, 2, 1, 64, lengths=lengths)
    ours = check(torch.bfloat16, q, k, v, seqlens, 2)
    assert torch.equal(head_attention_decode(q[140:], k[140:], v[140:], seqlens[140:], 2), ours[140:])


@pytest.mark.parametrize("T", [1, 16])
@pytest.mark.parametrize("D", [64, 80, 96, 128])
def test_copies_run_ahead_over_short_units(D, T, device):
    """Units of no key, of one and of two steps in turn: what is under way is of several, and of no later row's."""
    lengths = (0, 3, 128, 0, 0, 70, 1, 1, 65, 0, 12, 200, 0, 5)
    q, k, v, seqlens = make(device, 2, T, D, lengths=lengths)
    ours = check(torch.bfloat16, q, k, v, seqlens, 2)
    for b in range(len(lengths)):
        one = slice(b, b + 1)
        assert torch.equal(head_attention_decode(q[one], k[one], v[one], seqlens[one], 2), ours[one])


@pytest.mark.parametrize("keys", [64, 1024, 1025, 2049, 4096, 4097])
def test_lengths_where_chunks_change(keys, device):
    check(torch.bfloat16, *make(device, 2, 1, 64, lengths=(keys,), G=1), 1)


def test_values_out_of_range_are_moved_into_it(device):
    """Never a fault: the host does not read them."""
    q, k, v, _ = make(device, 2, 1, 64)
    for wrong, right in ((1 << 40, 150), (-5, 0)):
        both = [torch.full((len(q),), value, device=device) for value in (wrong, right)]
        for name in ("seqlens", "k_start", "extent"):
            arguments = {"seqlens": torch.full((len(q),), 150, device=device)}
            limit = min(right, 2) if name == "extent" else right
            ours, expected = (
                head_attention_decode(q, k, v, heads=2, **arguments | {name: value})
                for value in (both[0], both[1].clamp(max=limit))
            )
            assert torch.equal(ours, expected)
    k_pages, v_pages, table = paged(k, v, 64)
    seqlens = torch.full((len(q),), 150, device=device)
    wild = table + (table % 2 * 2 - 1) * (1 << 40)
    ours = head_attention_decode(q, k_pages, v_pages, seqlens, 2, block_table=wild)
    clamped = wild.clamp(0, len(k_pages) - 1)
    expected = head_attention_decode(q, k_pages, v_pages, seqlens, 2, block_table=clamped)
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())
