"""What every op refuses, raw and wrapped: tensors elsewhere, of no kind or another; settings that are no numbers."""

from __future__ import annotations

import re

import cases
import pytest
import torch
from test_ops import backward_arguments, overload

import flextron_ext
from flextron_ext import HeldForward

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
        overload(op)(**arguments)
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
    for wrapper in (overload(row.name), getattr(flextron_ext, row.name)):
        for case in row.inputs("cpu", torch.float32):
            real = wrapper(**case)
            away = {n: changed(v, lambda t: t.to("meta")) if is_tensors(v) else v for n, v in case.items()}
            shapes = wrapper(**away)
            pairs = [(real, shapes)] if isinstance(real, torch.Tensor) else zip(real, shapes, strict=True)
            for ours, shape in pairs:
                assert (ours.shape, ours.dtype) == (shape.shape, shape.dtype) and shape.is_meta


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["head_attention", "head_attention_decode", "elastic_forward"])
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


@pytest.mark.parametrize("value", [NAN, INF, -1e-6])
def test_an_eps_that_is_no_number_or_negative_is_refused(value):
    case = list(cases.elastic_forward("cpu", torch.float32))[1]
    must = "not be negative" if value < 0 else "be finite"
    message = re.escape(f"elastic_forward: eps must {must}, got {value}")
    for run in (torch.ops.flextron.elastic_forward, flextron_ext.elastic_forward):
        with pytest.raises((RuntimeError, ValueError), match=f"^{message}$"):
            run(**case | {"eps": value})
    held = {
        name: case[name] for name in ("weights", "parts", "neurons", "query_heads", "groups", "norm", "head")
    }
    held |= dict(embedding=torch.randn(37, 24), head_size=8, head_scales=None)
    with pytest.raises(ValueError, match=f"^{message}$"):
        HeldForward(**held, eps=value)


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
    case = list(cases.elastic_forward("cpu", torch.float32))[2]
    before = [t.clone() for t in (*case["keys"], *case["values"])]
    message = f"elastic_forward: {cache} must have memory of its own for every element, got strides"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        flextron_ext.elastic_forward(**case | overlapping(case, cache, how))
    assert all(torch.equal(a, b) for a, b in zip(before, (*case["keys"], *case["values"]), strict=True))


def test_one_cache_for_keys_and_values_is_refused():
    case = list(cases.elastic_forward("cpu", torch.float32))[2]
    with pytest.raises(RuntimeError, match=r"^elastic_forward: values must have other memory than keys, got"):
        flextron_ext.elastic_forward(**case | {"values": case["keys"]})


def test_caches_in_one_buffer_are_taken():
    """Of keys and values side by side, or with the groups before the tokens, every element has its place."""
    case = list(cases.elastic_forward("cpu", torch.float32))[2]
    right = flextron_ext.elastic_forward(
        **case | {n: [t.clone() for t in case[n]] for n in ("keys", "values")}
    )
    both = [torch.stack(pair, 3) for pair in zip(case["keys"], case["values"], strict=True)]
    beside = {"keys": [t[:, :, :, 0] for t in both], "values": [t[:, :, :, 1] for t in both]}
    assert torch.equal(flextron_ext.elastic_forward(**case | beside), right)
    turned = {
        n: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in case[n]] for n in ("keys", "values")
    }
    assert torch.equal(flextron_ext.elastic_forward(**case | turned), right)


def test_a_held_call_refuses_tensors_elsewhere():
    row = list(cases.elastic_forward("cpu", torch.float32))[1]
    held = torch.ops.flextron.elastic_forward_held
    with pytest.raises(
        (RuntimeError, TypeError, NotImplementedError), match=r"^elastic_forward_held: "
    ) as error:
        held(
            torch.zeros(1, 1, dtype=torch.int64, device="meta"),
            row["cos"],
            row["sin"],
            1,
            [],
            [],
            0,
            [],
            [],
            [],
        )
    assert "\n" not in str(error.value)
