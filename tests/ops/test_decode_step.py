"""decode_step beyond its rows: what it writes, what it must not read, every instruction set, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import cases
import pytest
import torch
from torch import Tensor

import flextron_ext
from flextron_ext import decode_step, reference

ROWS = len(list(cases.decode_step("cpu", torch.float32)))


def row(i: int, dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(i)
    return list(cases.decode_step("cpu", dtype))[i]


def copied(case: dict) -> dict:
    return case | {name: [t.clone() for t in case[name]] for name in ("keys", "values")}


@pytest.mark.parametrize("i", range(ROWS))
def test_the_cache_holds_what_the_reference_writes_and_nothing_else_changes(i):
    ours, theirs, before = copied(row(i)), copied(row(i)), row(i)
    decode_step(**ours)
    reference.decode_step(**theirs)
    cached, T = before["cached"], before["x"].shape[1]
    for name in ("keys", "values"):
        for mine, exact, old, stored in zip(
            ours[name], theirs[name], before[name], ours["kv_heads"], strict=True
        ):
            new = (slice(None), slice(cached, cached + T), slice(0, stored))
            torch.testing.assert_close(mine[new], exact[new], rtol=1e-4, atol=1e-5)
            mine[new] = old[new]
            assert torch.equal(mine, old)


def poison(t: Tensor, used: slice, dim: int) -> None:
    kept = t.narrow(dim, used.start, used.stop - used.start).clone()
    t.fill_(torch.nan).narrow(dim, used.start, used.stop - used.start).copy_(kept)


def test_nothing_beyond_an_extent_is_used():
    case = row(1)  # two layers, the second of 16 of 40 neurons and one of two groups, room in the cache
    expected = decode_step(**copied(case))
    names = case["parts"].split()
    w = dict(zip(names, case["weights"][len(names) :], strict=True))
    for name in ("gate", "up"):
        poison(w[name], slice(0, 16), 0)
    poison(w["down"], slice(0, 16), 1)
    poison(w["q"], slice(0, 16), 0), poison(w["k"], slice(0, 8), 0), poison(w["v"], slice(0, 8), 0)
    poison(w["o"], slice(0, 16), 1)
    for name in ("keys", "values"):
        for t in case[name]:
            poison(t, slice(0, case["cached"]), 1)
    assert torch.equal(decode_step(**case), expected)


def test_a_sequence_is_the_same_alone_and_in_a_batch():
    case = row(2)  # three sequences, padded on the left
    together = decode_step(**copied(case))
    for b in range(3):
        alone = case | {"x": case["x"][b : b + 1], "k_start": case["k_start"][b : b + 1]}
        alone |= {name: [t[b : b + 1].clone() for t in case[name]] for name in ("keys", "values")}
        torch.testing.assert_close(decode_step(**alone), together[b : b + 1], rtol=1e-5, atol=1e-6)


def test_panels_give_what_plain_weights_give():
    case = row(1)
    names, weights, parts = case["parts"].split(), [], "in_norm q k v o mlp_norm up down"
    for i in range(2):
        w = dict(zip(names, case["weights"][i * len(names) : (i + 1) * len(names)], strict=True))
        w["up"], w["down"], _, _ = flextron_ext.pack_mlp(w["gate"], w["up"], w["down"])
        w |= {name: flextron_ext.pack_linear(w[name])[0] for name in "qkvo"}
        weights += [w[name] for name in parts.split()]
    packed = copied(case) | {
        "weights": weights,
        "parts": parts,
        "head": flextron_ext.pack_linear(case["head"])[0],
    }
    torch.testing.assert_close(decode_step(**packed), decode_step(**copied(case)), rtol=1e-5, atol=1e-5)


CHECK = """
import sys, torch, cases
from flextron_ext import decode_step, reference
for dtype, tolerance in {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}.items():
    torch.manual_seed(0)
    for case in cases.decode_step("cpu", dtype):
        ours, exact = decode_step(**case), reference.decode_step(**case)
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
print("right")
"""


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_each_instruction_set(isa):
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this machine has no AVX2")
    environment = {**os.environ, "FLEXTRON_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "right", result.stderr


BAD = {
    "x must have 3 dimensions, got 2": lambda c: {"x": c["x"][0]},
    "norm must be float32": lambda c: {"norm": c["norm"].long()},
    "parts must name each part of a layer once, got bias": lambda c: {"parts": c["parts"] + " bias"},
    "parts must have q, got": lambda c: {"parts": c["parts"].replace("q ", "", 1)},
    "weights must have 20 entries, got 19": lambda c: {"weights": c["weights"][:-1], "parts": c["parts"]},
    "heads must have 2 entries, got 1": lambda c: {"heads": [2]},
    "widths must lie in .0, 40., got 41": lambda c: {"widths": [41, 16]},
    "heads must lie in .0, 2., got 3": lambda c: {"heads": [3, 1]},
    "kv_heads must lie in .2, 2., got 1": lambda c: {"kv_heads": [1, 1]},
    "keys must have shape .1, at least 8, at least 2, 8.": lambda c: {
        "cached": 7,
        "keys": [t[:, :7] for t in c["keys"]],
    },
    "values must have dtype Float, got Double": lambda c: {"values": [t.double() for t in c["values"]]},
    "keep must lie in .0, 1., got 2": lambda c: {"keep": 2},
    "cos.size.2. must be even and at most 8, got 10": lambda c: {"cos": torch.ones(1, 1, 10)},
    "unit must be kv_group or query, got head": lambda c: {"unit": "head"},
    "activation must be one of relu": lambda c: {"activation": "tanh"},
    "query_heads must be a multiple of the 2 groups, got 3": lambda c: {"query_heads": 3},
    "q must have shape .48, 24.": lambda c: {"query_heads": 6},
    "gate must be given with a plain up": lambda c: without_gate(c),
}


def without_gate(case: dict) -> dict:
    names = case["parts"].split()
    kept = [w for i, w in enumerate(case["weights"]) if names[i % len(names)] != "gate"]
    return {"weights": kept, "parts": " ".join(name for name in names if name != "gate")}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named_and_change_nothing(message):
    case = row(1)
    if "20 entries" in message:
        message = f"weights must have {len(case['weights'])} entries, got {len(case['weights']) - 1}"
        changes = {"weights": case["weights"][:-1]}
    else:
        changes = BAD[message](case)
    changed = copied(case | changes)
    before = copied(changed)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"decode_step: {message}"):
        decode_step(**changed)
    for name in ("keys", "values"):
        assert all(torch.equal(a, b) for a, b in zip(changed[name], before[name], strict=True))


def test_a_gradient_is_refused():
    case = row(0)
    with pytest.raises(NotImplementedError, match="decode_step: inputs must not need a gradient"):
        decode_step(**case | {"x": case["x"].requires_grad_()})
    with torch.no_grad():
        decode_step(**case)
