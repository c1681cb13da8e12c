"""What head_attention's CUDA kernels read, write and multiply, counted by the emulator: active heads, and no more."""

import os

import pytest
import torch
from emulator import build as emulator

from flextron_ext import head_attention

if not emulator.loaded():
    pytest.skip("FLEXTRON_EMULATE=1 asks for the emulator", allow_module_level=True)

HOPPER = os.environ.get("FLEXTRON_ARCH", "90") == "90"
ROWS = 128  # of a tile: they share what is read of keys and values
G, M = 3, 2


def launched(T, S, D, heads, dtype=torch.bfloat16, **options):
    """The counters of head_attention's kernels, the schedule's first; q, k and v are watched."""
    q = torch.randn(T, G * M, D, dtype=dtype)
    k, v = torch.randn(S, G, D, dtype=dtype), torch.randn(S, G, D, dtype=dtype)
    emulator.reset()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        emulator.watch(name, tensor)
    head_attention(q, k, v, heads, **options)
    return [launch for launch in emulator.counters() if launch["kernel"].startswith("head_attention")]


def read_of(launch, name) -> int:
    read, written = launch["watched"].get(name, (0, 0))  # what no access met is not listed
    assert written == 0
    return read


@pytest.mark.parametrize("D", [64, 80, 96, 128, 40])
@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_bytes_and_products_follow_the_active_heads(D, unit):
    """Of T = 2 tiles and as many keys: q and the result once, keys and values once for each tile and head."""
    T, size = 2 * ROWS, 2
    previous = None
    for heads in range((G if unit == "kv_group" else M) + 1):
        launches = launched(T, T, D, heads, unit=unit, causal=False)
        if heads == 0:
            assert not launches
            continue
        schedule, launch = launches
        assert schedule["kernel"].startswith("head_attention_schedule_kernel")
        active = heads * (M if unit == "kv_group" else G)
        assert read_of(launch, "q") == T * active * D * size
        assert read_of(launch, "k") == read_of(launch, "v") == T // ROWS * T * active * D * size
        assert launch["bytes_written"] == T * active * (D * size + 4)
        assert (launch["wgmma"] > 0, launch["mma"] > 0) in ((False, True), (HOPPER, not HOPPER))
        assert previous is None or launch["flops"] * (heads - 1) == previous * heads
        previous = launch["flops"]


def test_keys_that_no_query_of_a_tile_sees_are_not_read():
    T, D, size = 3 * ROWS, 64, 2
    _, launch = launched(T, T, D, G)
    assert read_of(launch, "k") == read_of(launch, "v") == (1 + 2 + 3) * ROWS * G * M * D * size
    _, full = launched(T, T, D, G, causal=False)
    assert launch["flops"] < 0.75 * full["flops"]
    _, started = launched(T, T, D, G, k_start=torch.tensor([2 * ROWS]))
    assert read_of(started, "k") == ROWS * G * M * D * size
    _, windowed = launched(T, T, D, G, window=ROWS)
    assert read_of(windowed, "k") == read_of(windowed, "v") == (1 + 2 + 2) * ROWS * G * M * D * size


def test_an_extent_of_zero_costs_nothing():
    ends = torch.tensor([0, ROWS, 2 * ROWS])
    for extent, tiles in (([3, 3], 2), ([3, 0], 1), ([0, 0], 0)):
        options = dict(extent=torch.tensor(extent), cu_seqlens_q=ends, cu_seqlens_k=ends)
        _, launch = launched(2 * ROWS, 2 * ROWS, 64, G, **options)
        assert read_of(launch, "q") == tiles * ROWS * G * M * 64 * 2
        assert read_of(launch, "k") == tiles * ROWS * G * M * 64 * 2
        assert (launch["flops"] > 0) == (tiles > 0)


@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_extents_per_token_cost_what_their_tokens_cost(unit):
    """Tokens in any order: they are sorted first, so that four extents cost what each alone costs its tokens."""
    most = G if unit == "kv_group" else M
    steps = [most, 1, 0]
    T = ROWS * len(steps)
    extent = torch.tensor(steps).repeat_interleave(ROWS)[torch.randperm(T)]
    *_, launch = launched(T, 64, 64, most, unit=unit, extent=extent, extent_per="token", causal=False)
    active = (most + 1) * (M if unit == "kv_group" else G)
    assert read_of(launch, "q") == ROWS * active * 64 * 2
    assert read_of(launch, "k") == read_of(launch, "v") == 64 * active * 64 * 2
    assert launch["bytes_written"] == ROWS * active * (64 * 2 + 4)


def test_groups_that_a_list_leaves_out_are_not_read():
    _, launch = launched(ROWS, 64, 64, 2, index=torch.tensor([5, 1]), causal=False)
    assert read_of(launch, "q") == ROWS * 2 * 64 * 2
    assert read_of(launch, "k") == 64 * 2 * 64 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "T, S, D", [(150, 200, 64), (70, 130, 80), (40, 70, 96), (130, 66, 128), (33, 70, 24)]
)
def test_no_bank_conflicts(T, S, D, dtype):
    if dtype != torch.bfloat16:
        T, S = 33, 70
    *_, launch = launched(T, S, D, 1, dtype, extent=torch.randint(0, 2, (T,)), extent_per="token")
    assert launch["shared_accesses"] > 0 and launch["bank_conflicts"] == 0
