"""What head_attention_decode's CUDA kernels read and write, counted by the emulator: what is active and seen, once."""

import pytest
import torch
from emulator import build as emulator

from flextron_ext import head_attention_decode

if not emulator.loaded():
    pytest.skip("FLEXTRON_EMULATE=1 asks for the emulator", allow_module_level=True)

SIZE = 2  # bytes of bfloat16


def launched(lengths, heads, unit="kv_group", M=4, T=1, G=3, D=64, page=0, **options):
    """The launches' counters, with the bytes read of k and v; all keys of the caches are there."""
    B, S = len(lengths), max(lengths)
    q = torch.randn(B, T, G * M, D, dtype=torch.bfloat16)
    shape = (B, S, G, D)
    if page:
        columns = -(-S // page)
        shape = (B * columns, page, G, D)
        options["block_table"] = torch.randperm(B * columns).view(B, columns)
    k, v = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(2))
    emulator.reset()
    emulator.watch("k", k)
    emulator.watch("v", v)
    head_attention_decode(q, k, v, torch.tensor(lengths), heads, unit, **options)
    launches = emulator.counters()
    for launch in launches:
        for name in "kv":
            launch[name], written = launch["watched"].get(name, (0, 0))
            assert written == 0
    return launches


def row_bytes(D):
    """Of a partial: maximum and sum, then the output in float."""
    return 8 + 4 * -(-D // 4) * 4


@pytest.mark.parametrize("D", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("page", [0, 16])
def test_each_key_in_use_is_read_once_and_no_other(D, page):
    """Whatever the number of heads and queries: they share what is read."""
    lengths = (130, 7, 64)
    for M, T in ((1, 1), (4, 1), (8, 4)):
        decode, _ = launched(lengths, 2, M=M, T=T, D=D, page=page)
        assert decode["k"] == decode["v"] == 2 * sum(lengths) * D * SIZE
        assert decode["bank_conflicts"] == 0 and decode["mma"] > 0


def test_keys_before_k_start_are_not_read():
    decode, _ = launched((130, 70), 3, k_start=torch.tensor([100, 1]))
    assert decode["k"] == decode["v"] == 3 * (30 + 69) * 64 * SIZE


def test_keys_before_the_window_are_not_read():
    for T in (1, 4):  # the first query's window begins before the last one's
        decode, *_ = launched((130, 70, 9), 3, T=T, window=33)
        assert decode["k"] == decode["v"] == 3 * (2 * (33 + T - 1) + 9) * 64 * SIZE


@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_cost_falls_with_the_extent(unit):
    """By groups: bytes of the cache. By query heads: every group is needed; a head that is not active is no row."""
    lengths, M, G, D = (200, 30), 4, 3, 64
    for extent in ((3, 3), (1, 2), (0, 3), (0, 0)):
        decode, combine = launched(lengths, 3, unit, M=M, G=G, D=D, extent=torch.tensor(extent))
        groups = [e if unit == "kv_group" else G * (e > 0) for e in extent]
        rows = [e * (M if unit == "kv_group" else G) for e in extent]
        used = sum(g * length for g, length in zip(groups, lengths, strict=True)) * D * SIZE
        assert decode["k"] == decode["v"] == used
        # q and the lengths are read as well; out is written by whom it is complete with.
        assert decode["bytes_written"] == rows[0] * 4 * row_bytes(D) + rows[1] * D * SIZE
        assert combine["bytes_written"] == rows[0] * D * SIZE
        assert combine["bytes_read"] == rows[0] * 4 * row_bytes(D)
        assert decode["bytes_read"] == 2 * used + (rows[0] * 4 + rows[1]) * D * SIZE


def test_one_chunk_is_written_directly():
    """And where no cache can have more, there is no second launch."""
    decode, combine = launched((64, 64, 65), 3)
    assert combine["bytes_written"] == 12 * 64 * SIZE
    (decode,) = launched((64, 3), 3)
    assert decode["bytes_written"] == 2 * 12 * 64 * SIZE


@pytest.mark.parametrize("D", [64, 80, 96, 128])
@pytest.mark.parametrize("T", [1, 5])
def test_no_bank_conflicts(D, T):
    for launch in launched((150, 64, 3), 3, M=5, T=T, D=D):
        assert launch["bank_conflicts"] == 0
