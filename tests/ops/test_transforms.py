"""The ops under torch.func and forward-mode gradients: right, or refused by name; and what autograd is told."""

from __future__ import annotations

import cases
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import flextron_ext

DIFFERENTIABLE = [row for row in cases.CASES if row.differentiable]
WITHOUT_GRADIENT = [row for row in cases.CASES if row.name in ("packed_linear", "packed_mlp")]
each_gradient = pytest.mark.parametrize("row", DIFFERENTIABLE, ids=lambda row: row.name)


def call(row, which: int):
    """A function of the op's floating inputs alone, which gives its first result, and those inputs."""
    torch.manual_seed(0)
    case = list(row.inputs("cpu", torch.float32))[which]
    inputs = {n: v for n, v in case.items() if isinstance(v, Tensor) and v.is_floating_point()}
    wrapper = row.wrapper

    def run(inputs: dict[str, Tensor]) -> Tensor:
        result = wrapper(**case | inputs)
        return result if isinstance(result, Tensor) else result[0]

    return run, inputs


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def gradients(run, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    found = torch.autograd.grad(run(leaves).square().sum(), list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), found, strict=True)
    }


@each_gradient
@pytest.mark.parametrize("which", [1, 4])
def test_torch_func_gives_the_gradients_of_autograd(row, which):
    run, inputs = call(row, which)
    ours = torch.func.grad(lambda inputs: run(inputs).square().sum())(inputs)
    assert equal(ours, gradients(run, inputs))


@each_gradient
@pytest.mark.parametrize("which", [1, 4])
def test_vmap_gives_what_a_loop_does(row, which):
    run, inputs = call(row, which)
    others = {name: value.flip(0) for name, value in inputs.items()}
    both = {name: torch.stack((value, others[name])) for name, value in inputs.items()}
    with torch.no_grad():
        assert torch.equal(torch.vmap(run)(both), torch.stack((run(inputs), run(others))))
    assert torch.equal(torch.vmap(run)(both), torch.stack((run(inputs), run(others))))
    each = torch.vmap(torch.func.grad(lambda inputs: run(inputs).square().sum()))(both)
    for i, single in enumerate((inputs, others)):
        assert equal({name: value[i] for name, value in each.items()}, gradients(run, single))


@each_gradient
def test_a_second_gradient_of_torch_func_is_refused(row):
    run, inputs = call(row, 1)

    def total(inputs):
        return run(inputs).square().sum()

    with pytest.raises(NotImplementedError, match=f"{row.name}_backward: inputs must not need a gradient"):
        torch.func.grad(lambda inputs: next(iter(torch.func.grad(total)(inputs).values())).sum())(inputs)


@pytest.mark.parametrize("row", WITHOUT_GRADIENT, ids=lambda row: row.name)
def test_torch_func_is_refused_where_there_is_no_gradient(row):
    run, inputs = call(row, 1)
    with pytest.raises(NotImplementedError, match=f"{row.name}: inputs must not need a gradient through it"):
        torch.func.grad(lambda inputs: run(inputs).sum())(inputs)


@pytest.mark.parametrize("row", DIFFERENTIABLE + WITHOUT_GRADIENT, ids=lambda row: row.name)
@pytest.mark.parametrize("recording", [True, False])
def test_forward_mode_is_refused_by_name(row, recording):
    run, inputs = call(row, 1)
    for name in inputs:
        message = (
            f"^{row.name}(_with_hidden)?: {name} must not be a dual tensor: it has no forward-mode gradient$"
        )

        def along(value, name=name):
            return run(inputs | {name: value})

        tangent = torch.ones_like(inputs[name])
        with torch.set_grad_enabled(recording):
            with pytest.raises(NotImplementedError, match=message):
                torch.func.jvp(along, (inputs[name],), (tangent,))
            with pytest.raises(NotImplementedError, match=message):
                torch.func.jacfwd(along)(inputs[name])
            if row.differentiable:  # of a gradient, forward over reverse
                first = torch.func.grad(lambda value: along(value).sum())
                with pytest.raises(NotImplementedError, match=message):
                    torch.func.jvp(first, (inputs[name],), (tangent,))
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
                along(forward_ad.make_dual(inputs[name], tangent))


def test_a_route_has_no_tangent():
    logits = torch.randn(5, 3)
    with forward_ad.dual_level():
        routing = flextron_ext.route(forward_ad.make_dual(logits, torch.ones_like(logits)))
        assert all(forward_ad.unpack_dual(t).tangent is None for t in routing)
    assert torch.equal(routing.choice, logits.argmax(1))


step = cases.step_of_decoder


def decoder() -> dict:
    torch.manual_seed(0)
    return list(cases.decoder_step("cpu", torch.float32))[2]


def test_the_decoder_refuses_tangents_and_vmap_by_name():
    case = decoder()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="decoder_step: cos must not be a"),
    ):
        step(**case | {"cos": forward_ad.make_dual(case["cos"], torch.ones_like(case["cos"]))})
    with pytest.raises((RuntimeError, NotImplementedError), match="decoder_step"):
        torch.vmap(lambda cos: step(**case | {"cos": cos}))(torch.stack((case["cos"], case["cos"])))


def raw(**case):
    return torch.ops.flextron.decoder_step(**cases.taken(case))


@pytest.mark.parametrize("run", [step, raw], ids=["wrapper", "op"])
@pytest.mark.parametrize("recording", [True, False])
def test_a_written_cache_has_a_new_version(run, recording):
    case = decoder()
    with torch.set_grad_enabled(recording):
        run(**case)
    assert all(cache._version > 0 for cache in (*case["keys"], *case["values"]))
    assert case["cos"]._version == 0
    for weight in case["held"].weights.values():
        assert all(w._version == 0 for w in (weight if isinstance(weight, list) else [weight]))


def test_a_cache_that_a_gradient_needs_is_not_overwritten_unseen():
    case = decoder()
    leaf = torch.ones((), requires_grad=True)
    loss = (leaf * case["keys"][0]).sum()
    step(**case)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_caches_of_inference_mode_are_written():
    case = decoder()
    with torch.inference_mode():
        caches = {name: [cache.clone() for cache in case[name]] for name in ("keys", "values")}
        inside = step(**case | caches)[0]
    with torch.no_grad():
        assert torch.equal(step(**case | caches)[0], inside)
