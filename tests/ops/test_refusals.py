"""What every op refuses, raw and wrapped: tensors elsewhere, of no kind or another; settings that are no numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from test_ops import backward_arguments, overload

import flextron_ext
from flextron_ext import Decoder

NAN, INF = float("nan"), float("inf")
each_op = pytest.mark.parametrize("row", cases.CASES, ids=lambda row: row.name)


def calls(row):
    """(op, arguments) of the op, and of its backward."""
    case = list(row.inputs("cpu", torch.float32))[1]
    yield row.name, case
    if row.differentiable:
        yield f"{row.name}_backward", backward_arguments(row, case)


def changed(value, change):
    return [change(v) for v in value] if isinstance(value, list) else change(value)


def is_tensors(value) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, list) and any(isinstance(v, torch.Tensor) for v in value)
    )


def sentence_of(op: str, arguments: dict) -> str:
    with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
        overload(op)(**cases.taken(arguments))
    return str(error.value)


@each_op
def test_a_tensor_on_another_device_is_refused_by_name(row):
    for op, case in calls(row):
        tensors = [name for name, value in case.items() if is_tensors(value)]
        for name in tensors if len(tensors) > 1 else ():
            spoiled = case | {name: changed(case[name], lambda t: t.to("meta"))}
            assert sentence_of(op, spoiled) == f"{op}: {name} must be on cpu, got meta"


@each_op
def test_a_sparse_tensor_is_refused_by_name(row):
    for op, case in calls(row):
        for name in (name for name, value in case.items() if is_tensors(value)):
            spoiled = case | {name: changed(case[name], lambda t: t.to_sparse())}
            assert sentence_of(op, spoiled) == f"{op}: {name} must be a dense tensor, got torch.sparse_coo"


def test_a_sparse_tensor_is_refused_before_it_is_reshaped():
    sparse, dense = torch.randn(2, 3, 8).to_sparse(), torch.randn(8, 8)
    with pytest.raises(TypeError, match=r"^elastic_linear: x must be a dense tensor, got torch.sparse_coo$"):
        flextron_ext.elastic_linear(sparse, dense, None, 8, 8)
    with pytest.raises(
        TypeError, match=r"^pack_linear: weight must be a dense tensor, got torch.sparse_coo$"
    ):
        flextron_ext.pack_linear(dense.to_sparse())


@each_op
def test_none_for_a_tensor_is_refused_by_name(row):
    for op, case in calls(row):
        schema = {argument.name: str(argument.type) for argument in overload(op)._schema.arguments}
        for name in (name for name in case if schema[name] == "Tensor"):
            assert sentence_of(op, case | {name: None}) == f"{op}: {name} must be a tensor, got None"


@each_op
def test_meta_tensors_give_shapes(row):
    for case in row.inputs("cpu", torch.float32):
        away = {n: changed(v, lambda t: t.to("meta")) if is_tensors(v) else v for n, v in case.items()}
        for run in (lambda case: overload(row.name)(**cases.taken(case)), lambda case: row.wrapper(**case)):
            real, shapes = run(case), run(away)
            pairs = [(real, shapes)] if isinstance(real, torch.Tensor) else zip(real, shapes, strict=True)
            for ours, shape in pairs:
                assert (ours.shape, ours.dtype) == (shape.shape, shape.dtype) and shape.is_meta


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["head_attention", "head_attention_decode"])
def test_a_scale_that_is_no_number_is_refused(name, value):
    row = next(row for row in cases.CASES if row.name == name)
    for op, case in calls(row):
        assert sentence_of(op, case | {"scale": value}) == f"{op}: scale must be finite, got {value}"
    case = next(iter(calls(row)))[1]
    with pytest.raises(ValueError, match=f"^{name}: scale must be finite, got {value}$"):
        getattr(flextron_ext, name)(**case | {"scale": value})
    with pytest.raises(TypeError, match=f"^{name}: scale must be a number, got str$"):
        getattr(flextron_ext, name)(**case | {"scale": str(value)})


@pytest.mark.parametrize("value", [-1.0, -0.0, 0.0])
def test_a_scale_may_be_any_number(value):
    """Of head_attention and its brother in the decoder; with 0 every key has the same weight."""
    q, k = torch.randn(4, 2, 8), torch.randn(9, 2, 8)
    ours = flextron_ext.head_attention(q, k, k, 2, scale=value)
    torch.testing.assert_close(ours, flextron_ext.head_attention(q * value, k, k, 2, scale=1.0))


@pytest.mark.parametrize(
    "setting, value", [("scale", NAN), ("scale", INF), ("scale", -INF), ("eps", NAN), ("eps", INF)]
)
def test_a_setting_of_a_decoder_that_is_no_number_is_refused(setting, value):
    decoder = list(cases.decoder_step("cpu", torch.float32))[1]["held"]
    message = f"^decoder_hold: {setting} must be finite, got {value}$"
    with pytest.raises(ValueError, match=message):
        Decoder(decoder.weights, replace(decoder.shape, **{setting: value}))
    with pytest.raises(RuntimeError, match=message):
        hold(decoder, **{setting: value})
    with pytest.raises(TypeError, match=f"^decoder_hold: {setting} must be a number, got str$"):
        Decoder(decoder.weights, replace(decoder.shape, **{setting: str(value)}))


def test_an_eps_that_is_negative_is_refused():
    decoder = list(cases.decoder_step("cpu", torch.float32))[1]["held"]
    message = re.escape("decoder_hold: eps must not be negative, got -1e-06")
    with pytest.raises(ValueError, match=f"^{message}$"):
        Decoder(decoder.weights, replace(decoder.shape, eps=-1e-6))
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        hold(decoder, eps=-1e-6)


def hold(decoder: Decoder, eps: float = 1e-6, scale: float = 1.0, **weights: Any) -> int:
    """The op itself, past its wrapper."""
    s, given = decoder.shape, decoder.weights | weights
    tensors = [t for w in given.values() for t in (w if isinstance(w, list) else [w])]
    shape = [s.layers, s.neurons, s.query_heads, s.groups, s.head_size]
    return torch.ops.flextron.decoder_hold(tensors, " ".join(given), shape, [eps, scale])


@pytest.mark.parametrize("name", ["embedding", "norm", "q", "up"])
def test_a_weight_that_is_elsewhere_or_sparse_is_not_held(name):
    decoder = list(cases.decoder_step("cpu", torch.float32))[1]["held"]
    meta = changed(decoder.weights[name], lambda t: t.to("meta"))
    with pytest.raises(
        NotImplementedError, match=r"^decoder_hold: tensors must be on a device .* got cpu, meta$"
    ):
        hold(decoder, **{name: meta})
    sparse = changed(decoder.weights[name], lambda t: t.to_sparse())
    with pytest.raises(
        TypeError, match=r"^decoder_hold: weights must be a dense tensor, got torch.sparse_coo$"
    ):
        hold(decoder, **{name: sparse})


def overlapping(case: dict, cache: str, how: str) -> dict:
    t = case[cache][0]
    shared = dict(
        batch=t[:1].expand(t.shape),
        keys=t[:, :1].expand(t.shape),
        groups=t[:, :, :1].expand(t.shape),
        diagonal=t.as_strided(t.shape, (t.stride(0), 1, t.stride(1), 1)),
    )[how]
    return {cache: [shared, *case[cache][1:]]}


@pytest.mark.parametrize("how", ["batch", "keys", "groups", "diagonal"])
@pytest.mark.parametrize("cache", ["keys", "values"])
def test_a_cache_that_overlaps_itself_is_refused(cache, how):
    case = list(cases.decoder_step("cpu", torch.float32))[2]
    before = [t.clone() for t in (*case["keys"], *case["values"])]
    message = f"decoder_step: {cache} must have memory of its own for every element, got strides"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        cases.step_of_decoder(**case | overlapping(case, cache, how))
    assert all(torch.equal(a, b) for a, b in zip(before, (*case["keys"], *case["values"]), strict=True))


def test_one_cache_for_keys_and_values_is_refused():
    case = list(cases.decoder_step("cpu", torch.float32))[2]
    with pytest.raises(RuntimeError, match=r"^decoder_step: values must have other memory than keys, got"):
        cases.step_of_decoder(**case | {"values": case["keys"]})


def test_caches_in_one_buffer_are_taken():
    """Of keys and values side by side, or with the groups before the tokens, every element has its place."""
    case = list(cases.decoder_step("cpu", torch.float32))[2]
    right = cases.step_of_decoder(**case | {n: [t.clone() for t in case[n]] for n in ("keys", "values")})[0]
    both = [torch.stack(pair, 3) for pair in zip(case["keys"], case["values"], strict=True)]
    beside = {"keys": [t[:, :, :, 0] for t in both], "values": [t[:, :, :, 1] for t in both]}
    assert torch.equal(cases.step_of_decoder(**case | beside)[0], right)
    turned = {
        n: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in case[n]] for n in ("keys", "values")
    }
    assert torch.equal(cases.step_of_decoder(**case | turned)[0], right)


def test_a_step_refuses_tensors_elsewhere():
    row = list(cases.decoder_step("cpu", torch.float32))[1]
    ids = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    step = torch.ops.flextron.decoder_step
    with pytest.raises(ValueError, match=r"^decoder_step: ids must be on cpu, got meta$"):
        step(ids, row["cos"], row["sin"], row["held"].number, [], [], 0, [], [], [])
