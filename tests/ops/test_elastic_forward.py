"""elastic_forward beyond its rows: what it writes, what it must not read, each instruction set, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import cases
import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, run_python
from torch import Tensor

import flextron_ext
from flextron_ext import HeldForward, elastic_forward, reference

ROWS = len(list(cases.elastic_forward("cpu", torch.float32)))


def row(i: int, dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(i)
    return list(cases.elastic_forward("cpu", dtype))[i]


def copied(case: dict) -> dict:
    return case | {name: [t.clone() for t in case[name]] for name in ("keys", "values")}


@pytest.mark.parametrize("i", range(ROWS))
def test_the_cache_holds_what_the_reference_writes_and_nothing_else_changes(i):
    ours, theirs, before = copied(row(i)), copied(row(i)), row(i)
    elastic_forward(**ours)
    reference.elastic_forward(**theirs)
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
    expected = elastic_forward(**copied(case))
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
    assert torch.equal(elastic_forward(**case), expected)


@pytest.mark.parametrize("by_router", [False, True])
def test_nothing_beyond_a_rows_own_extent_reaches_it(by_router):
    """Neurons, heads and cached groups beyond the first row's hold NaN: its logits are finite, the second row's not."""
    torch.manual_seed(0)
    case = row(ROWS - 4 if by_router else ROWS - 5)
    case["x"] = torch.randn(2, 1, 24)
    for name in ("keys", "values"):
        case[name] = [t[:1].repeat(2, 1, 1, 1) for t in case[name]]
    case |= {"k_start": None, "keep": 1, "cos": case["cos"][:, :1], "sin": case["sin"][:, :1]}
    if by_router:  # a base beyond any token's say chooses
        base = torch.zeros(2, 2, 5)
        base[:, 0, 0] = base[:, 0, 3] = base[:, 1, 2] = base[:, 1, 4] = 1e6
        case["router"] = [*case["router"][:2], torch.zeros(2, 2, 5), base]
    else:
        case |= {"widths": [8, 40] * 2, "heads": [1, 2] * 2}
    expected = elastic_forward(**copied(case))
    names = case["parts"].split()
    for i in range(2):
        w = dict(zip(names, case["weights"][i * len(names) : (i + 1) * len(names)], strict=True))
        poison(w["gate"], slice(0, 8), 0), poison(w["up"], slice(0, 8), 0), poison(w["down"], slice(0, 8), 1)
        poison(w["q"], slice(0, 16), 0), poison(w["o"], slice(0, 16), 1)
        poison(case["keys"][i], slice(0, 1), 2), poison(case["values"][i], slice(0, 1), 2)
    got = elastic_forward(**case)
    assert torch.equal(got[0], expected[0]) and not got[1].isfinite().any()


def test_the_router_chooses_as_the_reference_for_every_token():
    """128 tokens whose norm is not 1: enough that some choice would turn if a term of the logits were wrong."""
    case = row(ROWS - 4)
    case["x"] = torch.randn(16, 8, 24)
    case |= {name: [torch.randn(16, 13, 2, 8) for _ in range(2)] for name in ("keys", "values")}
    angle = torch.rand(1, 8, 4).repeat(1, 1, 2) * 6
    case |= {"cos": angle.cos(), "sin": angle.sin(), "keep": 8}
    case["weights"] = [w * 3 if w.dim() == 1 else w for w in case["weights"]]
    exact = reference.elastic_forward(**copied(case))
    torch.testing.assert_close(elastic_forward(**case), exact, rtol=1e-3, atol=1e-3)


def test_a_sequence_is_the_same_alone_and_in_a_batch():
    case = row(2)  # three sequences, padded on the left
    together = elastic_forward(**copied(case))
    for b in range(3):
        alone = case | {"x": case["x"][b : b + 1], "k_start": case["k_start"][b : b + 1]}
        alone |= {name: [t[b : b + 1].clone() for t in case[name]] for name in ("keys", "values")}
        torch.testing.assert_close(elastic_forward(**alone), together[b : b + 1], rtol=1e-5, atol=1e-6)


def test_a_sequence_that_sees_no_key_adds_nothing_in_any_layer():
    case = row(2)  # three sequences
    T = case["x"].shape[1]
    for name in ("keys", "values"):  # more than one part of keys
        case[name] = [torch.randn(3, 600 + T, *t.shape[2:]) for t in case[name]]
    case |= {"cached": 600, "k_start": torch.tensor([0, 600 + T, 3])}
    exact = reference.elastic_forward(**copied(case))
    for _ in range(20):
        torch.full((3 * T * case["query_heads"] * 8,), torch.nan)  # memory that the op is given next
        torch.testing.assert_close(elastic_forward(**copied(case)), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("i", [3, 4])
def test_threads_do_not_change_a_bit(i, set_threads):
    """A prompt, and a token with many keys: every loop has work for several threads, and some more than cores."""
    results = []
    for threads in (1, 2, 3, 8):
        set_threads(threads)
        case = copied(row(i))
        if case["cached"] == 600:  # alone too few for a second thread
            case |= {
                name: [torch.randn(1, 20001, *t.shape[2:]) for t in case[name]] for name in ("keys", "values")
            }
            case["cached"] = 20000
        results.append([elastic_forward(**case), *case["keys"], *case["values"]])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_panels_give_what_plain_weights_give():
    case = row(1)
    names, weights, parts = case["parts"].split(), [], "in_norm q k v o mlp_norm up down"
    for i in range(2):
        w = dict(zip(names, case["weights"][i * len(names) : (i + 1) * len(names)], strict=True))
        w["up"], w["down"], *_ = flextron_ext.pack_mlp(w["gate"], w["up"], w["down"])
        w |= {name: flextron_ext.pack_linear(w[name])[0] for name in "qkvo"}
        weights += [w[name] for name in parts.split()]
    packed = copied(case) | {
        "weights": weights,
        "parts": parts,
        "head": flextron_ext.pack_linear(case["head"])[0],
        "format": "float32",
    }
    torch.testing.assert_close(
        elastic_forward(**packed), elastic_forward(**copied(case)), rtol=1e-5, atol=1e-5
    )


OF_A_MODEL = ("weights", "parts", "neurons", "query_heads", "groups", "norm", "head", "head_scales", "eps")


def held(case: dict) -> tuple[HeldForward, dict, dict]:
    """A row's model held, the arguments of a call with some tokens' ids, and those of elastic_forward for them."""
    B, T, K = case["x"].shape
    embedding = torch.randn(case["vocabulary"], K, dtype=case["x"].dtype)
    ids = torch.randint(0, case["vocabulary"], (B, T))
    own = [*OF_A_MODEL, "unit", "activation", "scale", "format"]
    model = {name: case[name] for name in own if name in case}
    whole = case | {"x": embedding[ids]}
    call = {name: value for name, value in case.items() if name not in {*own, "x", "vocabulary"}} | {
        "ids": ids
    }
    head_size = case["keys"][0].shape[3]
    return HeldForward(embedding=embedding, head_size=head_size, **model), copied(call), whole


@pytest.mark.parametrize("dtype", cases.FLOATING[:3])
@pytest.mark.parametrize("i", range(ROWS))
def test_held_weights_give_the_same_bits(i, dtype):
    model, call, whole = held(row(i, dtype))
    ours, exact = copied(call), copied(whole)
    for _ in range(2):  # a second call, over what the first one wrote
        logits, best = model(**ours)
        assert torch.equal(logits, elastic_forward(**exact))
        assert torch.equal(best, logits[:, -1].argmax(-1) if logits.shape[1] else torch.empty(0).long())
        for name in ("keys", "values"):
            assert all(map(torch.equal, ours[name], exact[name]))


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 255, 256, 257, 700])
@pytest.mark.parametrize("dtype", cases.FLOATING[:3])
def test_the_best_is_the_first_of_equals_and_nan_before_all(dtype, vocabulary):
    case = row(0, dtype)
    K = case["x"].shape[2]
    base = torch.randn(vocabulary, K, dtype=dtype)
    for places, value in (
        ([], 0),
        ([vocabulary - 1], 50),
        ([vocabulary // 2, vocabulary - 1], 50),
        ([vocabulary // 2, vocabulary - 1], torch.nan),
        (range(vocabulary), -torch.inf),
    ):
        head = base.clone()
        for place in places:
            head[place] = base[0].sign() * value if value != 50 else base[0] * value
        model, call, _ = held(case | {"head": head, "head_scales": None, "vocabulary": vocabulary})
        logits, best = model(**call)
        last = logits[:, -1]
        first = last.isnan() if last.isnan().any() else last == last.amax(-1, keepdim=True)
        assert torch.equal(best, first.int().argmax(-1))


def test_held_weights_may_change_in_place_but_not_move():
    model, call, whole = held(row(1))
    whole["weights"][1].mul_(2)
    assert torch.equal(model(**copied(call))[0], elastic_forward(**copied(whole)))
    before = copied(call)
    whole["weights"][1].data = whole["weights"][1].clone()
    with pytest.raises(RuntimeError, match="elastic_forward_held: held must have weights that stayed"):
        model(**before)
    assert all(
        torch.equal(a, b)
        for name in ("keys", "values")
        for a, b in zip(before[name], call[name], strict=True)
    )


def test_what_is_held_goes_with_its_holder_and_is_not_copied():
    model, call, _ = held(row(1))
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="HeldForward: it must not be copied"):
            copier(model)
    number = model.number
    del model
    gc.collect()
    cached, args = call["cached"], (call["widths"], call["heads"], call["kv_heads"])
    lists = call["keys"], call["values"]
    with pytest.raises(RuntimeError, match=f"held must come from elastic_forward_hold .* got {number}"):
        torch.ops.flextron.elastic_forward_held(
            call["ids"], call["cos"], call["sin"], number, *lists, cached, *args
        )
    with pytest.raises(RuntimeError, match=f"elastic_forward_drop: held must come .* got {number}"):
        torch.ops.flextron.elastic_forward_drop(number)


BAD_HELD = {
    "elastic_forward_held: ids must lie in .0, 36., got 37": lambda c: {"ids": c["ids"] * 0 + 37},
    "elastic_forward_held: ids must lie in .0, 36., got -1": lambda c: {"ids": c["ids"] * 0 - 1},
    "elastic_forward_held: ids must have dtype Long, got Int": lambda c: {"ids": c["ids"].int()},
    "elastic_forward_held: ids must have 2 dimensions, got 1": lambda c: {"ids": c["ids"][0]},
    "elastic_forward: kv_heads must have 2 entries, got 1": lambda c: {"kv_heads": [2]},
    "elastic_forward: keys must have 2 entries, got 1": lambda c: {"keys": c["keys"][:1]},
    "elastic_forward: widths must lie in .0, 40., got 41": lambda c: {"widths": [41, 16]},
}


@pytest.mark.parametrize("message", BAD_HELD)
def test_bad_arguments_of_a_held_call_are_named_and_change_nothing(message):
    model, call, _ = held(row(1))
    changed = copied(call | BAD_HELD[message](call))
    before = copied(changed)
    with pytest.raises(RuntimeError, match=message):
        model(**changed)
    for name in ("keys", "values"):
        assert all(torch.equal(a, b) for a, b in zip(changed[name], before[name], strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: {"embedding": c["embedding"].double()}, "embedding must be float32"),
        (lambda c: {"embedding": c["embedding"].T}, "embedding must be contiguous"),
        (lambda c: {"weights": c["weights"][:-1]}, "weights must have 18 entries, got 17"),
        (lambda c: {"head": c["head"][:-1]}, "head must have shape .37, 24."),
        (lambda c: {"head_size": 0}, "the size of a head must lie in .1, 1024., got 0"),
        (lambda c: {"unit": "head"}, "unit must be kv_group or query"),
    ],
)
def test_bad_weights_are_not_held(change, message):
    case = row(1)
    given = {name: case[name] for name in OF_A_MODEL} | {"embedding": torch.randn(37, 24), "head_size": 8}
    with pytest.raises((RuntimeError, TypeError), match=f"elastic_forward: {message}"):
        HeldForward(**given | change(given))


@pytest.mark.parametrize("case", [3, 6])
def test_a_token_that_is_nan_reaches_no_earlier_one(case):
    """Of a prompt of several blocks, and of few new tokens."""
    given = row(case)
    T = given["x"].shape[1]
    given["keep"] = T
    clean = elastic_forward(**copied(given))
    for token in (T - 1, T // 2):
        spoiled = copied(given | {"x": given["x"].clone()})
        spoiled["x"][:, token] = torch.nan
        found = elastic_forward(**spoiled)
        assert torch.equal(found[:, :token], clean[:, :token]) and found[:, token:].isnan().all()


CHECK = """
import sys, torch, cases
from flextron_ext import elastic_forward, reference
for dtype, tolerance in {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}.items():
    torch.manual_seed(0)
    for case in cases.elastic_forward("cpu", dtype):
        ours, exact = elastic_forward(**case), reference.elastic_forward(**case)
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
print("right")
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_each_instruction_set(isa):
    result = run_python(isa, "-c", CHECK)
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
    "kv_heads must lie in .2, 2., got 0": lambda c: with_router(c, kv_heads=[2, 0]),
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
    "widths must have 2 entries, got 3": lambda c: {"widths": [40, 16, 16]},
    "mlp_choices must be given with a router and with none else": lambda c: {"mlp_choices": [8]},
    "head_choices must be given with a router and with none": lambda c: with_router(c, head_choices=None),
    "router must have 4 tensors, got 3": lambda c: with_router(c, router=with_router(c)["router"][:3]),
    "widths must have no entries with a router, got 2": lambda c: with_router(c, widths=[40, 16]),
    "mlp_choices must lie in .0, 40., got 41": lambda c: with_router(c, mlp_choices=[8, 41]),
    "head_choices must have an entry, got none": lambda c: with_router(c, head_choices=[]),
    "router.1. must have shape .2, 3, 5., got .2, 4, 5.": lambda c: with_router(c, mlp_choices=[8]),
    "router.2. must have dtype Float, got Double": lambda c: with_router(
        c, router=[t.double() if i == 2 else t for i, t in enumerate(with_router(c)["router"])]
    ),
    "x.size.0. must be a multiple of the 2 requests of the router, got 1": lambda c: with_router(
        c, router=[t.repeat(1, 1 + (i > 1), 1) for i, t in enumerate(with_router(c)["router"])]
    ),
}


def with_router(case: dict, **changes: Any) -> dict:
    shapes = (2, 5, 24), (2, 4, 5), (2, 1, 5), (2, 1, 4)
    router = [torch.randn(*shape) for shape in shapes]
    given = dict(
        router=router, mlp_choices=[8, 40], head_choices=[1, 2], widths=[], heads=[], kv_heads=[2, 2]
    )
    caches = {name: [torch.zeros(1, 9, 2, 8) for _ in range(2)] for name in ("keys", "values")}
    return given | caches | changes


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
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"elastic_forward: {message}"):
        elastic_forward(**changed)
    for name in ("keys", "values"):
        assert all(torch.equal(a, b) for a, b in zip(changed[name], before[name], strict=True))


def test_a_gradient_is_refused():
    case = row(0)
    with pytest.raises(NotImplementedError, match="elastic_forward: inputs must not need a gradient"):
        elastic_forward(**case | {"x": case["x"].requires_grad_()})
    with torch.no_grad():
        elastic_forward(**case)
