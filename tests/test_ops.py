"""Every row of cases.py, on each dtype and device: values, gradients, opcheck, compile, export."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import CASES, OpCase, taken
from torch import Tensor

import flextron_ext
from flextron.testing.numerics import assert_no_worse
from flextron_ext import Decoder, DecoderRouter, DecoderStep, reference

NAMES = [schema.split("(")[0] for schema in flextron_ext.schemas()]


def overload(name: str):
    return getattr(torch.ops.flextron, name).default


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def is_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, list) and any(isinstance(v, Tensor) for v in value)
    )


def in_double(value: Any) -> Any:
    if isinstance(value, list):
        return [in_double(v) for v in value]
    return value.double() if is_floating(value) else value


def fresh(case: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same inputs, floating ones in dtype and asking for a gradient."""
    return {
        name: value.detach().to(value.dtype if dtype is None else dtype).requires_grad_()
        if is_floating(value)
        else value
        for name, value in case.items()
    }


def gradients(run, case: dict[str, Any], cotangents: list[Tensor]) -> dict[str, Tensor]:
    outputs = [out for out in as_tuple(run(**case)) if out.requires_grad]
    inputs = {name: value for name, value in case.items() if is_floating(value)}
    cotangents = [g.to(out.dtype) for g, out in zip(cotangents, outputs, strict=False)]
    found = torch.autograd.grad(
        outputs[: len(cotangents)], list(inputs.values()), cotangents, allow_unused=True
    )
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(inputs.items(), found, strict=True)
    }


def backward_arguments(row: OpCase, case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of <op>_backward for a forward case, found by name in its schema."""
    outputs = as_tuple(overload(row.name)(**taken(case)))
    known = {a.name: a.default_value for a in overload(row.name)._schema.arguments if a.has_default_value()}
    known |= case | {"out": outputs[0], "lse": outputs[-1]}
    schema = overload(f"{row.name}_backward")._schema
    if row.name == "elastic_mlp":
        _, *hidden = overload("elastic_mlp_with_hidden")(**case)
        known |= dict(zip(("hidden_up", "hidden_gate"), hidden, strict=True))
    known |= {
        "output_mask": 2 ** len(schema.returns) - 1,
        schema.arguments[0].name: torch.randn_like(outputs[0]),
    }
    return {a.name: known[a.name] for a in schema.arguments}


def parameters():
    for row in CASES:
        for dtype in row.dtypes:
            yield pytest.param(row, dtype, id=f"{row.name}-{str(dtype).removeprefix('torch.')}")


each_dtype = pytest.mark.parametrize("row, dtype", list(parameters()))
each_op = pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)
each_gradient = pytest.mark.parametrize(
    "row", [row for row in CASES if row.differentiable], ids=lambda row: row.name
)


@pytest.fixture(autouse=True)
def kernels_for_the_device(request):
    if "device" in request.fixturenames and "row" in request.fixturenames:
        row, device = request.getfixturevalue("row"), request.getfixturevalue("device")
        if device not in row.devices:
            pytest.skip(f"{row.name} has no {device} kernels")


def test_no_op_without_a_case():
    rows = {row.name for row in CASES}
    backward = {f"{row.name}_backward" for row in CASES if row.differentiable}
    around = {"decoder_hold", "decoder_drop"}  # every row of decoder_step holds one and drops it
    assert rows | backward | around == set(NAMES)


@each_op
def test_every_op_has_a_wrapper_and_a_reference_with_the_same_arguments(row):
    arguments = [argument.name for argument in overload(row.name)._schema.arguments]
    assert list(inspect.signature(getattr(reference, row.name)).parameters) == arguments
    if row.name == "decoder_step":
        return  # its wrapper is Decoder.step: below
    wrapper = inspect.signature(row.wrapper)
    assert list(wrapper.parameters)[: len(arguments)] == arguments
    for argument in overload(row.name)._schema.arguments:
        if argument.has_default_value():
            assert wrapper.parameters[argument.name].default == argument.default_value


def test_the_decoder_names_the_arguments_of_its_op():
    """`Decoder.step` takes those of decoder_step in order, ``held`` being itself and some in `DecoderStep`."""
    arguments = overload("decoder_step")._schema.arguments
    taken_by_step = inspect.signature(Decoder.step).parameters
    names = [a.name for a in arguments if a.name in taken_by_step]
    assert names == [name for name in taken_by_step if name not in ("self", "step")]
    grouped = [*DecoderStep._fields, *DecoderRouter._fields[1:]]
    assert [a.name for a in arguments if a.name not in names] == ["held", *grouped]
    for argument in arguments:
        if argument.has_default_value() and argument.name in names:
            assert taken_by_step[argument.name].default == argument.default_value


@each_dtype
def test_values(row, dtype, device):
    for i, case in enumerate(row.inputs(device, dtype)):
        wide = {name: in_double(value) for name, value in case.items()}
        ours = as_tuple(overload(row.name)(**taken(case)))
        plain = as_tuple(getattr(reference, row.name)(**case))
        exact = as_tuple(getattr(reference, row.name)(**wide))
        for j, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
            if mine.is_floating_point():
                assert_no_worse(mine, theirs, truth, f"{row.name}, case {i}, result {j}", dtype)
            elif row.name == "decoder_step":  # the best of its own logits: rounding may swap near ones
                assert mine.numel() == theirs.numel() and (
                    mine.numel() == 0 or torch.equal(mine, ours[0][:, -1].argmax(-1))
                )
            else:
                assert torch.equal(mine, theirs), f"{row.name}, case {i}, result {j}"


@each_op
def test_wrapper_gives_the_values_of_the_op(row, device):
    for case in row.inputs(device, torch.float32):
        ours, raw = as_tuple(row.wrapper(**case)), as_tuple(overload(row.name)(**taken(case)))
        assert all(torch.equal(a, b) for a, b in zip(ours, raw, strict=False))


@each_dtype
def test_gradients(row, dtype, device):
    if not row.differentiable:
        pytest.skip("not differentiable")
    for i, case in enumerate(row.inputs(device, dtype)):
        cotangents = [torch.randn_like(as_tuple(overload(row.name)(**taken(case)))[0])]
        ours = gradients(overload(row.name), fresh(case), cotangents)
        plain = gradients(getattr(reference, row.name), fresh(case), cotangents)
        exact = gradients(getattr(reference, row.name), fresh(case, torch.float64), cotangents)
        for name in ours:
            assert_no_worse(
                ours[name], plain[name], exact[name], f"{row.name}, case {i}, gradient of {name}", dtype
            )


@each_op
def test_opcheck(row, device):
    """Schema, fake with its strides, autograd registration, and the dynamic-shape trace both ways."""
    for i, case in enumerate(row.inputs(device, torch.float32)):
        utils = ["test_schema", "test_faketensor", "test_autograd_registration"]
        if i % 4 == 1:  # a trace takes a second
            utils.append("test_aot_dispatch_dynamic")
        inputs = fresh(case) if row.differentiable else taken(case)
        torch.library.opcheck(overload(row.name), (), inputs, test_utils=utils)


@each_gradient
def test_opcheck_of_the_backward_op(row, device):
    for case in row.inputs(device, torch.float32):
        arguments = backward_arguments(row, case)
        torch.library.opcheck(
            overload(f"{row.name}_backward"), (), arguments, test_utils=["test_schema", "test_faketensor"]
        )


@each_gradient
def test_an_unwanted_gradient_is_empty(row, device):
    case = next(iter(row.inputs(device, torch.float32)))
    arguments = backward_arguments(row, case)
    everything = as_tuple(overload(f"{row.name}_backward")(**arguments))
    for bit in range(len(everything)):
        some = as_tuple(overload(f"{row.name}_backward")(**arguments | {"output_mask": 1 << bit}))
        for i, (one, all_of_them) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(one, all_of_them) if i == bit else one.shape == (0,)


@each_gradient
def test_a_second_gradient_is_refused(row, device):
    cases = list(row.inputs(device, torch.float64))
    case = fresh(cases[1])
    inputs = [value for value in case.values() if is_floating(value)]
    out = as_tuple(overload(row.name)(**taken(case)))[0]
    first = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=f"{row.name}_backward"):
        first.sum().backward()


def compiled_inputs(row: OpCase, device: str) -> list[dict[str, Any]]:
    return list(row.inputs(device, torch.float32))[1:8:3]


@each_op
def test_compiles_as_one_graph(row, device):
    wrapper = row.wrapper
    for case in compiled_inputs(row, device):
        torch._dynamo.reset()
        compiled = torch.compile(lambda case: wrapper(**case), fullgraph=True, backend="aot_eager")
        for ours, eager in zip(as_tuple(compiled(case)), as_tuple(wrapper(**case)), strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@each_gradient
def test_compiles_with_its_gradient(row, device):
    torch._dynamo.reset()
    case = compiled_inputs(row, device)[0]
    wrapper = row.wrapper
    compiled = torch.compile(lambda **case: wrapper(**case), fullgraph=True, backend="aot_eager")
    cotangents = [torch.randn_like(as_tuple(wrapper(**case))[0])]
    ours, eager = gradients(compiled, fresh(case), cotangents), gradients(wrapper, fresh(case), cotangents)
    for name in ours:
        torch.testing.assert_close(ours[name], eager[name], rtol=0, atol=0)


@each_op
def test_exports(row, device):
    wrapper = row.wrapper
    case = compiled_inputs(row, device)[0]
    tensors = {name: value for name, value in case.items() if is_tensors(value)}
    settings = {name: value for name, value in case.items() if name not in tensors}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return as_tuple(wrapper(**tensors, **settings))

    program = torch.export.export(Module(), (tensors,))
    assert f"flextron.{row.name}.default" in str(program.graph)
    for ours, eager in zip(program.module()(tensors), as_tuple(wrapper(**case)), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@pytest.mark.parametrize("row", [row for row in CASES if row.differentiable], ids=lambda row: row.name)
def test_autocast_computes_in_its_dtype(row, device):
    case = compiled_inputs(row, device)[0]
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = as_tuple(row.wrapper(**fresh(case)))[0]
    low = {
        name: value.bfloat16() if is_floating(value) and name != "gate" else value
        for name, value in case.items()
    }
    assert ours.dtype == torch.bfloat16 and ours.requires_grad
    assert torch.equal(ours, as_tuple(row.wrapper(**fresh(low)))[0])


@each_op
def test_two_runs_are_equal(row, device):
    for case in row.inputs(device, torch.float32):
        first, second = (
            as_tuple(overload(row.name)(**taken(case))),
            as_tuple(overload(row.name)(**taken(case))),
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", ["elastic_linear", "elastic_mlp"])
def test_exports_with_any_number_of_tokens(op):
    torch.manual_seed(0)
    w = torch.randn(8, 8)
    arguments = {"elastic_linear": (w, None, 6, 8), "elastic_mlp": (w, w, w, None, None, None, 6)}[op]

    class Module(torch.nn.Module):
        def forward(self, x):
            return getattr(flextron_ext, op)(x, *arguments)

    T = torch.export.Dim("T")
    program = torch.export.export(Module(), (torch.randn(5, 8),), dynamic_shapes={"x": {0: T}}).module()
    x = torch.randn(11, 8)
    assert torch.equal(program(x), Module()(x))


def test_route_takes_a_new_seed_without_compiling_again():
    torch._dynamo.reset()
    logits = torch.randn(20, 4)
    compiled = torch.compile(flextron_ext.route, backend="eager", fullgraph=True)
    for seed in range(2, 14):  # more seeds than dynamo recompiles for
        assert torch.equal(compiled(logits, seed)[0], flextron_ext.route(logits, seed)[0])
