"""The decoder beyond its rows: what it writes, what it must not read, each instruction set, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, run_python
from torch import Tensor

import flextron_ext
from flextron_ext import Decoder, reference

ROWS = len(list(cases.decoder_step("cpu", torch.float32)))
LLAMAS = ROWS - len(cases.DECODER_KINDS)  # the rows before are of Llama's kind


def row(i: int, dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(i)
    return list(cases.decoder_step("cpu", dtype))[i]


def copied(case: dict) -> dict:
    return case | {name: [t.clone() for t in case[name]] for name in ("keys", "values")}


def step(case: dict) -> Tensor:
    """The logits."""
    return cases.step_of_decoder(**case)[0]


def exact(case: dict) -> Tensor:
    return reference.decoder_step(**case)[0]


def holding(case: dict, shape: dict[str, Any] | None = None, **weights: Any) -> dict:
    """The case of another decoder, with these weights and fields of the shape in place of its own; None: without."""
    given = {n: w for n, w in (case["held"].weights | weights).items() if w is not None}
    return case | {"held": Decoder(given, replace(case["held"].shape, **shape or {}))}


@pytest.mark.parametrize("i", range(ROWS))
def test_the_cache_holds_what_the_reference_writes_and_nothing_else_changes(i):
    ours, theirs, before = copied(row(i)), copied(row(i)), row(i)
    step(ours)
    exact(theirs)
    cached, T = before["cached"], before["ids"].shape[1]
    for name in ("keys", "values"):
        for mine, other, old, stored in zip(
            ours[name], theirs[name], before[name], ours["kv_heads"], strict=True
        ):
            new = (slice(None), slice(cached, cached + T), slice(0, stored))
            torch.testing.assert_close(mine[new], other[new], rtol=1e-4, atol=1e-5)
            mine[new] = old[new]
            assert torch.equal(mine, old)


def poison(t: Tensor, used: slice, dim: int) -> None:
    kept = t.narrow(dim, used.start, used.stop - used.start).clone()
    t.fill_(torch.nan).narrow(dim, used.start, used.stop - used.start).copy_(kept)


def second_layer(case: dict) -> dict[str, Tensor]:
    return {name: value[1] for name, value in case["held"].weights.items() if isinstance(value, list)}


def test_nothing_beyond_an_extent_is_used():
    case = row(1)  # two layers, the second of 16 of 40 neurons and one of two groups, room in the cache
    expected = step(copied(case))
    w = second_layer(case)
    for name in ("gate", "up"):
        poison(w[name], slice(0, 16), 0)
    poison(w["down"], slice(0, 16), 1)
    poison(w["q"], slice(0, 16), 0), poison(w["k"], slice(0, 8), 0), poison(w["v"], slice(0, 8), 0)
    poison(w["o"], slice(0, 16), 1)
    for name in ("keys", "values"):
        for t in case[name]:
            poison(t, slice(0, case["cached"]), 1)
    assert torch.equal(step(case), expected)


PLAIN_KINDS = [
    LLAMAS + i
    for i, settings in enumerate(cases.DECODER_KINDS)
    if "packed" not in settings and not cases.is_routed(i)
]


@pytest.mark.parametrize("i", PLAIN_KINDS)
def test_no_kind_of_layer_uses_what_is_beyond_an_extent_or_before_a_window(i):
    case = row(i)  # the second layer of 24 of 40 neurons and one of two groups
    expected = step(copied(case))
    w = second_layer(case)
    q_norm, k_norm = {"heads": (16, 8), "each": (2, 1)}.get(case["held"].shape.norm_over, (8, 8))
    for dim, used, names in (
        (0, 24, "gate up"),
        (1, 24, "down"),
        (0, 16, "q"),
        (0, 8, "k v"),
        (0, 32, "qkv"),
        (0, q_norm, "q_norm"),
        (0, k_norm, "k_norm"),
        (1, 16, "o"),
    ):
        for name in names.split():
            for t in [w[n] for n in (name, f"{name}_bias") if n in w and dim < w[n].dim()]:
                poison(t, slice(0, used), dim)
    windows = case["held"].shape.windows or [0, 0]
    for layer, window in enumerate(windows):
        first = case["cached"] + 1 - window if window else 0
        for name in ("keys", "values"):
            poison(case[name][layer], slice(first, case[name][layer].shape[1]), 1)
    assert expected.isfinite().all() and torch.equal(step(case), expected)


@pytest.mark.parametrize("i", PLAIN_KINDS)
def test_a_part_that_no_row_uses_is_not_read_and_nor_are_its_norms(i):
    case = row(i)
    case |= {name: [case[name][0], 0] for name in ("widths", "heads", "kv_heads")}
    expected = exact(copied(case))
    for t in second_layer(case).values():
        t.fill_(torch.nan)
    for name in ("keys", "values"):
        case[name][1] = case[name][1][:, :, :0]
    torch.testing.assert_close(step(case), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("i", PLAIN_KINDS)
def test_to_a_row_that_skips_a_part_it_adds_nothing(i):
    """Neither the bias of a projection nor that of a norm behind it; the others of the batch are as they are alone."""
    case = row(i)
    case["ids"] = torch.tensor([[5], [11]])
    for name in ("keys", "values"):
        case[name] = [t[:1].repeat(2, 1, 1, 1) for t in case[name]]
    case |= {"k_start": None, "keep": 1, "cos": case["cos"][:1, :1], "sin": case["sin"][:1, :1]}
    skipping = case | {"widths": [0, 40, 16, 0], "heads": [2, 0, 0, 1], "kv_heads": [2, 1]}
    expected = exact(copied(skipping))
    torch.testing.assert_close(step(copied(skipping)), expected, rtol=1e-4, atol=1e-5)
    for b in range(2):
        alone = skipping | {name: skipping[name][b::2] for name in ("widths", "heads")}
        alone |= {"ids": case["ids"][b : b + 1]} | {
            name: [t[b : b + 1] for t in case[name]] for name in ("keys", "values")
        }
        torch.testing.assert_close(step(copied(alone)), expected[b : b + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_router", [False, True])
def test_nothing_beyond_a_rows_own_extent_reaches_it(by_router):
    """Neurons, heads and cached groups beyond the first row's hold NaN: its logits are finite, the second row's not."""
    torch.manual_seed(0)
    case = row(LLAMAS - 4 if by_router else LLAMAS - 5)
    case["ids"] = torch.tensor([[5], [11]])
    for name in ("keys", "values"):
        case[name] = [t[:1].repeat(2, 1, 1, 1) for t in case[name]]
    case |= {"k_start": None, "keep": 1, "cos": case["cos"][:, :1], "sin": case["sin"][:, :1]}
    if by_router:  # a base beyond any token's say chooses
        base = torch.zeros(2, 2, 5)
        base[:, 0, 0] = base[:, 0, 3] = base[:, 1, 2] = base[:, 1, 4] = 1e6
        case["router"] = [*case["router"][:2], torch.zeros(2, 2, 5), base]
    else:
        case |= {"widths": [8, 40] * 2, "heads": [1, 2] * 2}
    expected = step(copied(case))
    for i in range(2):
        w = {name: value[i] for name, value in case["held"].weights.items() if isinstance(value, list)}
        poison(w["gate"], slice(0, 8), 0), poison(w["up"], slice(0, 8), 0), poison(w["down"], slice(0, 8), 1)
        poison(w["q"], slice(0, 16), 0), poison(w["o"], slice(0, 16), 1)
        poison(case["keys"][i], slice(0, 1), 2), poison(case["values"][i], slice(0, 1), 2)
    got = step(case)
    assert torch.equal(got[0], expected[0]) and not got[1].isfinite().any()


def test_the_router_chooses_as_the_reference_for_every_token():
    """128 tokens whose norm is not 1: enough that some choice would turn if a term of the logits were wrong."""
    case = row(LLAMAS - 4)
    case["ids"] = torch.arange(128).view(16, 8)
    case |= {name: [torch.randn(16, 13, 2, 8) for _ in range(2)] for name in ("keys", "values")}
    angle = torch.rand(1, 8, 4).repeat(1, 1, 2) * 6
    case |= {"cos": angle.cos(), "sin": angle.sin(), "keep": 8}
    norms = {name: value for name, value in case["held"].weights.items() if name.endswith("norm")}
    thrice = {
        name: [w * 3 for w in value] if isinstance(value, list) else value for name, value in norms.items()
    }
    tokens = dict(embedding=torch.randn(128, 24), head=torch.randn(128, 24) * 24**-0.5)
    case = holding(case, **thrice, **tokens)
    expected = exact(copied(case))
    torch.testing.assert_close(step(case), expected, rtol=1e-3, atol=1e-3)


def test_a_sequence_is_the_same_alone_and_in_a_batch():
    case = row(2)  # three sequences, padded on the left
    together = step(copied(case))
    for b in range(3):
        alone = case | {"ids": case["ids"][b : b + 1], "k_start": case["k_start"][b : b + 1]}
        alone |= {name: [t[b : b + 1].clone() for t in case[name]] for name in ("keys", "values")}
        torch.testing.assert_close(step(alone), together[b : b + 1], rtol=1e-5, atol=1e-6)


def test_a_sequence_that_sees_no_key_adds_nothing_in_any_layer():
    case = row(2)  # three sequences
    T = case["ids"].shape[1]
    for name in ("keys", "values"):  # more than one part of keys
        case[name] = [torch.randn(3, 600 + T, *t.shape[2:]) for t in case[name]]
    case |= {"cached": 600, "k_start": torch.tensor([0, 600 + T, 3])}
    expected = exact(copied(case))
    for _ in range(20):
        torch.full(
            (3 * T * case["held"].shape.query_heads * 8,), torch.nan
        )  # memory that the op is given next
        torch.testing.assert_close(step(copied(case)), expected, rtol=1e-4, atol=1e-5)


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
        results.append([step(case), *case["keys"], *case["values"]])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_panels_give_what_plain_weights_give():
    case = row(1)
    w = case["held"].weights
    mlps = [flextron_ext.pack_mlp(*of_layer) for of_layer in zip(w["gate"], w["up"], w["down"], strict=True)]
    panels = {name: [flextron_ext.pack_linear(t)[0] for t in w[name]] for name in "qkvo"}
    panels |= dict(gate=None, up=[mlp[0] for mlp in mlps], down=[mlp[1] for mlp in mlps])
    panels |= {"head": flextron_ext.pack_linear(w["head"])[0]}
    packed = holding(copied(case), {"format": "float32"}, **panels)
    torch.testing.assert_close(step(packed), step(copied(case)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", cases.FLOATING[:3])
@pytest.mark.parametrize("i", range(ROWS))
def test_a_step_gives_the_same_bits_however_often_the_weights_are_held(i, dtype):
    ours = copied(row(i, dtype))
    again = holding(copied(ours))
    for _ in range(2):  # a second call, over what the first one wrote
        logits, best = cases.step_of_decoder(**ours)
        assert torch.equal(logits, step(again))
        assert torch.equal(best, logits[:, -1].argmax(-1) if logits.shape[1] else torch.empty(0).long())
        for name in ("keys", "values"):
            assert all(map(torch.equal, ours[name], again[name]))


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 255, 256, 257, 700])
@pytest.mark.parametrize("dtype", cases.FLOATING[:3])
def test_the_best_is_the_first_of_equals_and_nan_before_all(dtype, vocabulary):
    case = row(0, dtype)
    K = case["held"].weights["embedding"].shape[1]
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
        some = holding(case, head=head, embedding=torch.randn(vocabulary, K, dtype=dtype))
        logits, best = cases.step_of_decoder(**some | {"ids": torch.randint(0, vocabulary, (1, 1))})
        last = logits[:, -1]
        first = last.isnan() if last.isnan().any() else last == last.amax(-1, keepdim=True)
        assert torch.equal(best, first.int().argmax(-1))


def test_held_weights_may_change_in_place_but_not_move():
    case = row(1)
    before = copied(case)
    case["held"].weights["q"][0].mul_(2)
    torch.testing.assert_close(step(copied(case)), exact(copied(case)), rtol=1e-4, atol=1e-5)
    w = case["held"].weights["q"][0]
    w.data = w.clone()
    with pytest.raises(RuntimeError, match=r"^decoder_step: held must have weights that stayed"):
        step(case)
    assert unchanged(case, before)


def unchanged(case: dict, before: dict) -> bool:
    """Whether nothing was written into the cache."""
    return all(
        torch.equal(a, b)
        for name in ("keys", "values")
        for a, b in zip(case[name], before[name], strict=True)
    )


def test_what_is_held_goes_with_its_holder_and_is_not_copied():
    case = row(1)
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^Decoder: it must not be copied"):
            copier(case["held"])
    raw = cases.taken(case)
    number = raw["held"]
    del case
    gc.collect()
    with pytest.raises(
        RuntimeError, match=f"^decoder_step: held must come from decoder_hold .* got {number}"
    ):
        torch.ops.flextron.decoder_step(**raw)
    with pytest.raises(RuntimeError, match=f"^decoder_drop: held must come .* got {number}"):
        torch.ops.flextron.decoder_drop(number)


@pytest.mark.parametrize(
    "message, changes",
    {
        "embedding must be float32": dict(embedding=lambda t: t.double()),
        "embedding must be contiguous": dict(embedding=lambda t: t.T),
        "embedding must be a tensor, got NoneType": dict(embedding=lambda t: None),
        "norm must be float32": dict(norm=lambda t: t.long()),
        "head must have shape .37, 24.": dict(head=lambda t: t[:-1]),
        "names must name each weight once, got bias": dict(bias=lambda t: torch.ones(1)),
        "names must have q, got": dict(q=lambda t: None),
        "q must have 2 entries, got 1": dict(q=lambda t: t[:1]),
        "names must have qkv or q, k and v, and nothing of the other": dict(
            qkv=lambda t: [torch.ones(64, 24)] * 2
        ),
        "qkv must have shape .64, 24., got .48, 24.": dict(
            q=lambda t: None, k=lambda t: None, v=lambda t: None, qkv=lambda t: [torch.ones(48, 24)] * 2
        ),
        "gate must be given with a plain up": dict(gate=lambda t: None),
        "k_scales must not be given for a plain weight": dict(k_scales=lambda t: [torch.ones(1, 1, 16)] * 2),
        "up must have the strides of gate": dict(up=lambda t: [torch.cat((w, w), 1)[:, :24] for w in t]),
        "in_norm must be given with its bias, got none": dict(
            in_norm=lambda t: None, in_norm_bias=lambda t: [torch.ones(24)] * 2
        ),
        "mlp_post must have shape .24., got .8.": dict(mlp_post=lambda t: [torch.ones(8)] * 2),
    }.items(),
)
def test_bad_weights_are_not_held(message, changes):
    case = row(1)
    weights = {name: change(case["held"].weights.get(name)) for name, change in changes.items()}
    if "bias" in weights:
        weights["bias"] = [weights["bias"]] * 2
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^decoder_hold: {message}"):
        holding(case, **weights)


@pytest.mark.parametrize(
    "message, shape",
    {
        "head_size must lie in .1, 1024., got 0": dict(head_size=0, scale=1.0),
        "unit must be kv_group or query, got head": dict(unit="head"),
        "activation must be one of relu": dict(activation="tanh"),
        "format must be one of float32.* got int3": dict(format="int3"),
        "gate must be .* among the panels of a packed one, got both": dict(format="float32"),
        "query_heads must be a multiple of the 2 groups, got 3": dict(query_heads=3),
        "q must have shape .48, 24.": dict(query_heads=6),
        "groups must be at least 1, got 0": dict(groups=0),
        "q must have 3 entries, got 2": dict(layers=3),
        "eps must not be negative, got -1": dict(eps=-1.0),
        "norms must be one of rms, rms.1, layer, layer.1, got batch": dict(norms="batch"),
        "rotation must be one of halves, pairs, got quarters": dict(rotation="quarters"),
        "norm_over must be one of head, heads, each, got all": dict(norm_over="all"),
        "norms must be rms or rms.1 where norm_over is heads, got layer": dict(
            norm_over="heads", norms="layer"
        ),
        "norm_last must be false where norm_over is heads, got true": dict(norm_over="heads", norm_last=True),
        "clip must be above 0, got 0": dict(clip=0.0),
        "gate must not be given, nor its bias, where gated is false, got one": dict(gated=False),
        "logit_scale must be finite, got nan": dict(logit_scale=float("nan")),
        "logit_cap must be above 0, got 0": dict(logit_cap=0.0),
        "softcap must be above 0, got -1": dict(softcap=-1.0),
        "tables must have 2 entries, got 1": dict(tables=[1]),
        "tables must lie in .0, 2., got 3": dict(tables=[1, 3]),
        "windows must lie in .0, .*got -1": dict(windows=[0, -1]),
    }.items(),
)
def test_a_bad_shape_is_not_held(message, shape):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^decoder_hold: {message}"):
        holding(row(1), shape)


def test_a_parallel_layer_has_no_norm_behind_a_part():
    posts = [torch.ones(24)] * 2
    with pytest.raises(
        RuntimeError, match=r"^decoder_hold: attention_post and mlp_post must not be given wh"
    ):
        holding(row(1), dict(parallel=True), mlp_post=posts)


def test_projections_of_groups_have_no_norm_over_all_heads():
    fused = dict(q=None, k=None, v=None, qkv=[torch.ones(64, 24)] * 2)
    with pytest.raises(RuntimeError, match=r"^decoder_hold: qkv must not be given where norm_over is heads"):
        holding(row(1), dict(norm_over="heads"), **fused)


def test_the_op_itself_refuses_lists_of_another_length():
    w = {"embedding": torch.ones(3, 2), "norm": torch.ones(2), "head": torch.ones(3, 2)}
    hold, names = torch.ops.flextron.decoder_hold, " ".join(w) + " in_norm q k v o mlp_norm gate up down"
    for message, tensors, shape, numbers in (
        ("weights must have 12 entries, got 3", [*w.values()], [1, 2, 1, 1, 2], [1e-6, 1.0]),
        ("shape must have 5 entries, got 4", [*w.values()], [1, 2, 1, 1], [1e-6, 1.0]),
        ("numbers must have 2 entries, got 1", [*w.values()], [0, 2, 1, 1, 2], [1e-6]),
        ("layers must lie in .0, 3., got -1", [*w.values()], [-1, 2, 1, 1, 2], [1e-6, 1.0]),
    ):
        with pytest.raises(RuntimeError, match=f"^decoder_hold: {message}"):
            hold(tensors, names, shape, numbers)
    message = "scales must have 3 entries, got 1"
    with pytest.raises(RuntimeError, match=f"^decoder_hold: {message}"):
        hold([*w.values()], " ".join(w) + " q k v o up down", [0, 2, 1, 1, 2], [1e-6, 1.0], scales=[1.0])


@pytest.mark.parametrize("case", [3, 6])
def test_a_token_that_is_nan_reaches_no_earlier_one(case):
    """Of a prompt of several blocks, and of few new tokens."""
    given = row(case)
    given["ids"] %= 36
    T = given["ids"].shape[1]
    given["keep"] = T
    clean = step(copied(given))
    embedding = given["held"].weights["embedding"].clone()
    embedding[36] = torch.nan
    for token in (T - 1, T // 2):
        spoiled = holding(copied(given | {"ids": given["ids"].clone()}), embedding=embedding)
        spoiled["ids"][:, token] = 36
        found = step(spoiled)
        assert torch.equal(found[:, :token], clean[:, :token]) and found[:, token:].isnan().all()


CHECK = """
import sys, torch, cases
from flextron_ext import reference
for dtype, tolerance in {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}.items():
    torch.manual_seed(7)  # no token's router has two choices so near that rounding to 16 bits swaps them
    for case in cases.decoder_step("cpu", dtype):
        ours, exact = cases.step_of_decoder(**case)[0], reference.decoder_step(**case)[0]
        # of integers: an input beside the middle of two becomes the other one
        bound = 6e-2 if case["held"].shape.format in ("w8a8", "int4") else tolerance
        torch.testing.assert_close(ours, exact, rtol=bound, atol=bound)
print("right")
"""


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_each_instruction_set(isa, processes):
    result = run_python(processes, isa, CHECK)
    assert result.out.strip() == "right", result.err


BAD = {
    "ids must lie in .0, 36., got 37": lambda c: {"ids": c["ids"] * 0 + 37},
    "ids must lie in .0, 36., got -1": lambda c: {"ids": c["ids"] * 0 - 1},
    "ids must have dtype Long, got Int": lambda c: {"ids": c["ids"].int()},
    "ids must have 2 dimensions, got 1": lambda c: {"ids": c["ids"][0]},
    "kv_heads must have 2 entries, got 1": lambda c: {"kv_heads": [2]},
    "keys must have 2 entries, got 1": lambda c: {"keys": c["keys"][:1]},
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
    "cos.size.2. must be even and at most 8 in each of two tables, got 20": lambda c: {
        "cos": torch.ones(1, 1, 20),
        "held": holding(c, dict(tables=[1, 2]))["held"],
    },
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
    "ids.size.0. must be a multiple of the 2 requests of the router, got 1": lambda c: with_router(
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


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named_and_change_nothing(message):
    case = row(1)
    given = case | BAD[message](case)
    changed = copied(cases.taken(given))
    before = copied(changed)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^decoder_step: {message}"):
        torch.ops.flextron.decoder_step(**changed)
    assert unchanged(changed, before)


def test_a_gradient_is_refused():
    case = row(0)
    with pytest.raises(NotImplementedError, match=r"^decoder_step: inputs must not need a gradient"):
        step(case | {"cos": case["cos"].requires_grad_()})
    with torch.no_grad():
        step(case)
