"""What head_attention's portable gradients read and multiply, counted by the emulator: active heads and keys seen."""

import pytest
import torch
from emulator import build as emulator

from flextron_ext import head_attention

if not emulator.loaded():
    pytest.skip("FLEXTRON_EMULATE=1 asks for the emulator", allow_module_level=True)

UNITS = ("kv_group", "query")
TILE = 64  # rows of a tile of the tensor cores' kernels
PRODUCTS = {"Delta": 2, "Queries": 3, "Keys": 4}  # of each kernel, per pair of tiles


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    monkeypatch.setenv("FLEXTRON_ARCH", "80")


def launched(T, S, G, M, D, heads, mask=7, dtype=torch.bfloat16, **options):
    """The counters of each kernel of the backward pass; q, k, v and dout are watched."""
    tensors = {name: torch.randn(T, G * M, D, dtype=dtype) for name in ("q", "dout")}
    tensors |= {name: torch.randn(S, G, D, dtype=dtype) for name in ("k", "v")}
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    out, lse = head_attention(q, k, v, heads, return_lse=True, **options)
    emulator.reset()
    for name, tensor in tensors.items():
        emulator.watch(name, tensor)
    arguments = dict(
        unit="kv_group", extent=None, extent_per="sequence", index=None, cu_seqlens_q=None, cu_seqlens_k=None,
        k_start=None, causal=True, scale=None,
        window=None, softcap=None, sinks=None,
    )  # fmt: skip
    arguments |= options
    torch.ops.flextron.head_attention_backward(dout, q, k, v, out, lse, heads, output_mask=mask, **arguments)
    launches = [launch for launch in emulator.counters() if "backward" in launch["kernel"]]
    return {launch["kernel"].split("::k")[1].split(",")[0]: launch for launch in launches}


def read_of(launch):
    """Bytes of each tensor, in elements of 2 bytes."""
    assert all(written == 0 for _, written in launch["watched"].values())
    return {name: launch["watched"].get(name, (0, 0))[0] // 2 for name in ("q", "k", "v", "dout")}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("M", [1, 3, 4, 7, 8])
def test_cost_falls_with_the_heads(M, unit):
    G, T, S, D = 2, TILE, 2 * TILE, 64
    for heads in {0, 1, G if unit == "kv_group" else M}:
        found = launched(T, S, G, M, D, heads, unit=unit, causal=False)
        if heads == 0:
            assert not found
            continue
        groups, active = (heads, heads * M) if unit == "kv_group" else (G, heads * G)
        for part, products in PRODUCTS.items():
            assert found[part]["flops"] == 2 * products * active * T * S * D
        for part in ("Delta", "Queries"):  # a block of queries is one head's
            rows, keys = active * T * D, active * S * D
            assert read_of(found[part]) == dict(q=rows, dout=rows, k=keys, v=keys)
        rows, keys = active * S // TILE * T * D, groups * S * D
        assert read_of(found["Keys"]) == dict(q=rows, dout=rows, k=keys, v=keys)
        assert found["Queries"]["bytes_written"] == active * T * D * 2
        assert found["Keys"]["bytes_written"] == 2 * groups * S * D * 2


def test_what_no_query_sees_costs_nothing():
    T = 4 * TILE
    all_keys, causal = (launched(T, T, 1, 1, 64, 1, causal=causal) for causal in (False, True))
    pieces = T // 16
    for part in PRODUCTS:
        assert causal[part]["flops"] * 2 * pieces == all_keys[part]["flops"] * (pieces + 1)
    tiles = T // TILE
    for part, passing in (("Queries", "k"), ("Keys", "q")):
        assert read_of(causal[part])[passing] * 2 * tiles == read_of(all_keys[part])[passing] * (tiles + 1)
    # Two tiles of keys for each of queries but the first, two of queries for each of keys but the last, and of
    # these no query that none of the keys is seen by.
    windowed = launched(T, T, 1, 1, 64, 1, window=TILE)
    assert read_of(windowed["Queries"])["k"] == (2 * tiles - 1) * TILE * 64
    assert read_of(windowed["Keys"])["q"] == ((2 * tiles - 1) * TILE - (tiles - 1)) * 64


def test_extents_cost_what_their_rows_cost():
    """Of each token or each sequence: blocks of queries are of one extent here, sorted by it."""
    M, G, D = 2, 4, 64
    T = 4 * TILE
    extent = torch.tensor([4, 1, 2, 0])
    per_token = extent.repeat_interleave(TILE)[torch.randperm(T)]
    ends = torch.arange(5) * TILE
    options = dict(cu_seqlens_q=ends, cu_seqlens_k=ends)
    full = launched(T, T, G, M, D, G, causal=False, **options)
    by_sequence = launched(T, T, G, M, D, G, causal=False, extent=extent, **options)
    by_token = launched(T, TILE, G, M, D, G, causal=False, extent=per_token, extent_per="token")
    for part in PRODUCTS:
        for found in (by_sequence, by_token):
            assert found[part]["flops"] * 4 * G == full[part]["flops"] * extent.sum()
    by_rows = int(extent.sum()) * M * TILE * D
    assert read_of(by_sequence["Keys"]) == dict.fromkeys(("q", "dout"), by_rows) | dict.fromkeys(
        ("k", "v"), by_rows // M
    )
    assert read_of(by_token["Keys"]) == dict.fromkeys(("q", "dout"), by_rows) | dict.fromkeys(
        ("k", "v"), G * TILE * D
    )


@pytest.mark.parametrize("mask", [1, 2, 4, 6])
def test_only_what_is_asked_for_is_computed(mask):
    found = launched(TILE, TILE, 1, 1, 64, 1, mask=mask)
    assert set(found) == {"Delta", "Queries" if mask == 1 else "Keys"}
    assert found["Delta"]["bytes_written"] == TILE * 4
    written = found["Queries" if mask == 1 else "Keys"]["bytes_written"]
    assert written == TILE * 64 * 2 * (2 if mask == 6 else 1)


@pytest.mark.parametrize("D", [64, 80, 96, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_no_bank_conflicts(D, causal):
    found = launched(100, 150, 2, 2, D, 2, causal=causal)
    for launch in found.values():
        assert launch["shared_accesses"] > 0 and launch["bank_conflicts"] == 0


def test_float_and_wide_heads_take_the_plain_kernels():
    for D, dtype in ((16, torch.float32), (16, torch.float64), (136, torch.bfloat16)):
        found = launched(40, 40, 1, 1, D, 1, dtype=dtype)
        assert set(found) == set(PRODUCTS) and all(launch["flops"] == 0 for launch in found.values())
        assert all("plain" in launch["kernel"] for launch in found.values())
