"""A budget of one call or block is that call's alone: threads that share a model get what each gets alone."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from nn.test_elastic_model import elastic, mixed, tokens
from nn.test_policy import GREEDY, left_padded, routed, three

import flextron.nn.model
from flextron.config import Widths

THREADS = 8


def planned(model: Any) -> Any:
    """The model with a planner for which a fraction is the place of a uniform network in the menus."""

    class Planner:
        def at(self, *_: Any) -> Any:
            return self

        def resolve(self, fraction: float, **_: Any) -> Widths:
            menus = model.elastic.mlp_choices, model.elastic.head_choices
            return model.elastic.uniform(*(round(fraction * (len(menu) - 1)) for menu in menus))

        def target(self, fraction: float, **_: Any) -> float:
            return fraction

    model.planner = Planner()
    return model


def budgets(model: Any) -> list[Any]:
    """Eight ways of saying one: static, of each request, adaptive."""
    c = model.elastic
    return [
        0.3,
        {"widths": mixed(c)},
        three(c),
        {"fraction": 0.4, "adaptive": True},
        c.smallest(),
        {"fraction": [0.4, 0.6, 0.9], "adaptive": True},
        {"fraction": [0.2, 0.6, 1.0], "kv": "all"},
        {"fraction": 0.8, "adaptive": True},
    ]


@pytest.mark.parametrize("path", ["one op", "modules"])
def test_threads_get_the_tokens_that_each_gets_alone(path, monkeypatch):
    model = planned(routed(elastic("qwen3", "3:1")))
    if path == "modules":
        monkeypatch.setattr(flextron.nn.model, "try_forward", lambda *_: None)
        monkeypatch.setattr(flextron.nn.model, "is_plain", lambda *_: False)
    ids, mask = left_padded()
    settings = GREEDY | {"attention_mask": mask, "max_new_tokens": 12}
    wanted = budgets(model)
    alone = [model.generate(ids, budget=budget, **settings) for budget in wanted]
    assert len({tuple(found.flatten().tolist()) for found in alone}) == THREADS
    start = threading.Barrier(THREADS)

    def run(i: int) -> list[Any]:
        start.wait()
        found = [model.generate(ids, budget=wanted[i], **settings) for _ in range(3)]
        with model.budget(**flextron.nn.model._by_name(wanted[i])):
            return [*found, model.generate(ids, **settings)]

    before = model.dial
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(run, range(THREADS)))
    for mine, theirs in zip(alone, together, strict=True):
        assert all(torch.equal(mine, found) for found in theirs)
    assert model.dial is before


def test_what_is_watched_is_the_blocks_own():
    """A router's choices are handed on, and written down, within a thread."""
    model, ids = planned(routed(elastic())), tokens()
    targets = [0.4 + 0.05 * i for i in range(THREADS)]

    def watch(target: float) -> Any:
        with torch.no_grad(), model.budget(target, adaptive=True), model.watched() as forwards:
            for _ in range(5):
                model(ids, use_cache=False)
        return forwards

    alone = [watch(target) for target in targets]
    assert any(not torch.equal(alone[0][0].mlp, other[0].mlp) for other in alone)
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(watch, targets))
    for mine, theirs in zip(alone, together, strict=True):
        assert len(theirs) == 5
        for a, b in zip(mine, theirs, strict=True):
            assert all(map(torch.equal, a, b))


def test_a_block_is_its_threads_and_set_budget_is_everybodys():
    model = elastic()
    c = model.elastic

    def elsewhere() -> Widths:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: model.widths).result()

    with model.budget(widths=c.smallest()):
        assert model.widths == c.smallest() and elsewhere() == c.full()
        model.set_budget(widths=mixed(c))  # the block's, and over with it
        assert model.widths == mixed(c) and elsewhere() == c.full()
        assert copy.deepcopy(model).widths == mixed(c)
        assert pickle.loads(pickle.dumps(model.settings)).now().widths == mixed(c)
    assert model.widths == c.full()
    model.set_budget(widths=mixed(c))
    assert model.widths == elsewhere() == mixed(c)
    with pytest.raises(ValueError, match="exactly one budget"):
        model.generate(tokens(), budget={}, **GREEDY)
    assert model.widths == mixed(c)


def test_what_another_thread_sets_comes_with_the_next_forward():
    model, ids = elastic(), tokens()
    c = model.elastic

    def logits() -> Any:
        return model(ids, use_cache=False).logits  # with gradients: the modules run

    wanted = {}
    for widths in (c.smallest(), mixed(c), c.full()):
        model.set_widths(widths)
        wanted[widths] = logits()
    with ThreadPoolExecutor(1) as pool:
        handle = model.model.layers[0].register_forward_hook(
            lambda *_: pool.submit(model.set_widths, c.smallest()).result() and None
        )
        assert torch.equal(logits(), wanted[c.full()])
        handle.remove()
    assert torch.equal(logits(), wanted[c.smallest()])
    handle = model.model.layers[0].register_forward_hook(lambda *_: model.set_widths(c.full()))
    begun = logits()  # what its own thread sets comes with the next layer
    handle.remove()
    assert not torch.equal(begun, wanted[c.smallest()]) and model.widths == c.full()


def test_a_block_is_its_tasks_and_what_they_give_to_threads():
    model, ids = elastic(), tokens()
    small, other = model.elastic.smallest(), mixed(model.elastic)
    alone = [model.generate(ids, budget=widths, **GREEDY) for widths in (small, other)]

    async def task(widths: Widths, turn: asyncio.Event, mine: asyncio.Event) -> Any:
        with model.budget(widths=widths):
            mine.set()
            await turn.wait()  # the other one's block has begun
            return await asyncio.to_thread(model.generate, ids, **GREEDY), model.generate(ids, **GREEDY)

    async def both() -> Any:
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task(small, a, b), task(other, b, a))

    for wanted, found in zip(alone, asyncio.run(both()), strict=True):
        assert all(torch.equal(wanted, one) for one in found)


def test_a_compiled_model_keeps_each_threads_budget():
    model, ids = elastic(num_hidden_layers=1), tokens()
    small = model.elastic.smallest()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def logits(forward: Any, widths: Widths | None) -> Any:
        with torch.no_grad():
            if widths is None:
                return forward(ids, use_cache=False).logits
            with model.budget(widths=widths):
                return forward(ids, use_cache=False).logits

    wanted = [logits(model, widths) for widths in (None, small)]
    with ThreadPoolExecutor(1) as pool, model.budget(widths=small):
        found = [pool.submit(logits, compiled, None).result(), logits(compiled, None)]
    torch._dynamo.reset()
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_threads_get_rotary_tables_of_their_own_positions(kind):
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 16}

    def fresh() -> Any:
        return elastic(rope_parameters=rope, max_position_embeddings=16 if kind == "dynamic" else 64)

    def tables(model: Any, length: int) -> Any:
        return model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])

    lengths = [4, 30, 12, 40, 8, 20, 15, 34]
    alone = {length: tables(fresh(), length) for length in lengths}
    model = fresh()

    def run(length: int) -> bool:
        return all(
            torch.equal(*both)
            for _ in range(50)
            for both in zip(tables(model, length), alone[length], strict=True)
        )

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(run, lengths))
    ids = tokens(1, 20)
    assert torch.equal(model.generate(ids, **GREEDY), fresh().generate(ids, **GREEDY))


def test_layers_that_are_run_again_need_a_budget_that_stays():
    model, ids = elastic().train(), tokens()
    model.activation_checkpointing_enable()
    with (
        model.budget(widths=model.elastic.smallest()),
        pytest.raises(NotImplementedError, match="must be set by set_budget with gradient checkpointing"),
    ):
        model(ids, labels=ids)
    model.set_budget(widths=model.elastic.smallest())
    model(ids, labels=ids).loss.backward()


def test_the_dynamic_cache_is_ours():
    model, ids = elastic(), tokens()
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation="dynamic", **GREEDY), expected)
    model.generation_config.cache_implementation = "dynamic"
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert model.generation_config.cache_implementation == "dynamic"
