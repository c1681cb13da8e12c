"""A decode step of tensors alone gives the logits of the modules, and no value of a tensor reaches the host."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from nn.models import FAMILIES
from nn.test_elastic_model import elastic, mixed, relative, tokens
from nn.test_policy import routed, three, turned
from nn.test_static_cache import by_modules, static_cache  # noqa: F401
from torch import Tensor, nn

from flextron.nn import ElasticCache, StaticCache
from flextron.nn.decode_step import can_step
from flextron.nn.forward import ElasticForward
from flextron.nn.graph import Begin, CapturedStep, router_of
from flextron.testing.numerics import assert_no_worse


def captured_step(model: Any, cache: StaticCache) -> CapturedStep:
    forward = ElasticForward.of(model)
    assert can_step(model, forward)
    return CapturedStep(model, forward, cache, router_of(model.settings.now()))


def set_to(model: Any, how: str) -> None:
    """A budget for all in another width of each layer, one for each of three requests, or a choice of each token."""
    if how == "adaptive":
        turned(model, 0.4, 0.6, 0.8)
    else:
        kind, kv = how.split("-")
        model.set_widths(mixed(model.elastic) if kind == "one" else three(model.elastic), kv)


HOWS = ("one-selected", "one-all", "each-selected", "each-all", "adaptive")
CASES = [  # each budget with each unit, the families in turn
    (family, *case)
    for family, case in zip(
        itertools.cycle(FAMILIES), itertools.product(["kv_group", "query"], HOWS), strict=False
    )
]


@pytest.mark.parametrize("family, unit, how", CASES)
@torch.no_grad()
def test_the_logits_are_those_of_the_modules(family, unit, how, by_modules):  # noqa: F811
    """Beside a sequence that is not there, which keeps nothing."""
    model, ids = routed(elastic(family, "3:1", unit, tie_word_embeddings=unit == "query")), tokens(3, 12)
    set_to(model, how)
    expected, cache = ElasticCache(), static_cache(model, 4, 16, page=4 if family == "qwen3" else None)
    for each in (expected, cache):
        model(ids[:, :9], cache=each)
    step = captured_step(model, cache)
    step.turn(model.settings.now().extents(3), 3)
    step.begin(Begin(ids[:, 9], torch.full((3,), 9), 9, None))
    for t in range(9, 12):
        step.state.ids[:3] = ids[:, t]
        assert relative(step()[:3], model(ids[:, t : t + 1], cache=expected).logits[:, 0]) < 1e-5


@torch.no_grad()
def test_in_bfloat16_norms_round_as_the_modules_do(by_modules):  # noqa: F811
    """Weighed before it is rounded, each fourth value is another: a greedy token may be, then."""
    model, ids = elastic("qwen3", "3:1", "kv_group").bfloat16(), tokens(3, 9)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.copy_(1 + 0.2 * torch.randn_like(p))
    cache = static_cache(model, 4, 16)
    model(ids, cache=cache)
    step, norm = captured_step(model, cache).step, model.model.norm
    x = torch.randn(64, model.config.hidden_size).bfloat16()
    assert torch.equal(step._norm(x, norm.weight), norm(x))


@pytest.mark.parametrize("how", ["one-all", "each-selected"])
@torch.no_grad()
def test_16_bit_logits_are_as_exact_as_the_modules(how, device, by_modules):  # noqa: F811
    ids, found = tokens(3, 10).to(device), {}
    for kind in ("ours", "plain", "exact"):
        model = elastic("qwen3", "3:1").bfloat16().to(device, torch.float64 if kind == "exact" else None)
        set_to(model, how)
        cache = static_cache(model, 4, 16) if kind == "ours" else ElasticCache()
        model(ids[:, :9], cache=cache)
        if isinstance(cache, StaticCache):
            step = captured_step(model, cache)
            step.turn(model.settings.now().extents(3), 3)
            step.begin(Begin(ids[:, 9], torch.full_like(ids[:, 9], 9), 9, None))
            found[kind] = step()[:3]
        else:
            found[kind] = model(ids[:, 9:], cache=cache).logits[:, 0]
    assert_no_worse(**found)


class Exported(nn.Module):
    """A captured step for torch.export, which wants to know the weights as parameters."""

    def __init__(self, step: CapturedStep, *owners: Any) -> None:
        super().__init__()
        self.step, self.owners = step, nn.ModuleList(owners)

    def forward(self, state: Any) -> Tensor:
        return self.step._run(state)


@pytest.mark.parametrize("how", ["each-selected", "adaptive"])
@torch.no_grad()
def test_the_step_is_exported_with_budgets_and_lengths_as_inputs(how):
    """Its values are unknown to the exporter, which would refuse a step that asks for one."""
    model, ids = routed(elastic("qwen3", "3:1", "query", num_hidden_layers=1)), tokens(3, 9)
    set_to(model, how)
    cache = static_cache(model, 4, 16, page=4)
    step = captured_step(model, cache)
    program = torch.export.export(Exported(step, model, model.adaptive), (step.state,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ops = ("elastic_linear", "elastic_mlp", "head_attention_decode")
    assert {f"flextron.{op}.default" for op in ops} <= targets
    reads = ("aten.item", "_local_scalar_dense", "nonzero", "_assert_scalar", "_assert_async")
    assert not [target for target in targets if any(name in target for name in reads)]

    run = program.module()
    for widths in (three(model.elastic), [model.elastic.smallest()]):
        if how != "adaptive":
            model.set_widths(widths)
        cache.reset()
        model(ids, cache=cache)
        step.turn(model.settings.now().extents(3), 3)
        results = []
        for go in (step, lambda: run(step.state)):
            step.begin(Begin(ids[:, -1], torch.full((3,), 9), 9, None))
            results.append((go()[:3].clone(), step.state.lengths.tolist(), step.state.ids.tolist()))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
        assert results[0][1:] == results[1][1:] and results[0][1] == [10, 10, 10, 0]


@torch.no_grad()
def test_where_tensors_have_no_values_the_step_runs():
    """On meta, where reading a value raises."""
    for how in ("each-all", "adaptive"):
        model = routed(elastic("qwen2", "3:1"))
        set_to(model, how)
        model.adaptive.to("meta")
        cache = static_cache(model.to("meta"), 4, 16)
        step = CapturedStep(
            model, ElasticForward.of(model), cache, model.adaptive if how == "adaptive" else None
        )
        assert step._run(step.state).shape == (4, 61)
        with pytest.raises((RuntimeError, NotImplementedError)):
            step.state.lengths.tolist()
