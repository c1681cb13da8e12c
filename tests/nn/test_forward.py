"""A forward in one op gives what the modules give, is taken where it applies, and keeps the cache's contract."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nn.models import FAMILIES, GQA, small_model
from nn.test_elastic_model import UNITS, elastic, mixed, relative, tokens
from nn.test_policy import routed, three, turned
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap

import flextron
from flextron.nn import ElasticCache, make_elastic
from flextron.nn.policy import Mixed
from flextron.nn.router import Probabilities


@contextmanager
def counted(monkeypatch, on: bool = True):
    """The tokens of each forward that was one op; none may be with ``on=False``."""
    steps: list[int] = []
    taken = flextron.nn.forward.ElasticForward.__call__

    def call(self: Any, model: Any, ids: Any, *rest: Any) -> Any:
        steps.append(ids.shape[1])
        return taken(self, model, ids, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(flextron.nn.forward.ElasticForward, "__call__", call)
        if not on:
            patch.setattr(flextron.nn.model, "try_forward", lambda *_: None)
            patch.setattr(flextron.nn.model, "is_plain", lambda *_: False)
        yield steps


# A prompt within the kernels' blocks of rows and queries and one beyond, single tokens, and a prompt's second part.
CUTS = [5, 1, 1, 8, 2, 3, 40, 1, 300]


def logits_of(model: Any, ids: Any, cuts: list[int], cache: ElasticCache, **kwargs: Any) -> Any:
    with torch.no_grad():
        parts = [model(part, cache=cache, **kwargs).logits for part in ids.split(cuts, dim=1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kv", ["selected", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_gives_the_logits_and_the_cache_of_the_modules(family, kv, unit, monkeypatch):
    biases = dict(attention_bias=True, mlp_bias=True) if family == "llama" else {}
    model, ids = elastic(family, "3:1", unit, **biases), tokens(T=sum(CUTS))
    model.set_widths(mixed(model.elastic), kv)
    found = {}
    for on in (True, False):
        with counted(monkeypatch, on) as steps:
            cache = ElasticCache()
            found[on] = logits_of(model, ids, CUTS, cache), cache
        assert steps == (CUTS if on else [])
    (ours, mine), (exact, theirs) = found[True], found[False]
    assert relative(ours, exact) < 1e-5
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        assert (a.length, a.groups) == (b.length, b.groups) == (sum(CUTS), b.groups)
        for name in ("keys", "values"):
            mine, theirs = (getattr(layer, name)[:, : sum(CUTS)] for layer in (a, b))
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dial", ["requests", "tokens"])
def test_a_step_gives_each_request_or_token_its_own_widths(dial, unit, packed, monkeypatch):
    model, ids = routed(elastic("qwen3", "3:1", unit)), tokens(6, sum(CUTS))
    if dial == "requests":
        model.set_widths(three(model.elastic))
    else:
        turned(model, 0.4, 0.6, 0.8)
    if packed:
        flextron.pack(model)
    found = {}
    for on in (True, False):
        with counted(monkeypatch, on) as steps:
            cache = ElasticCache()
            found[on] = logits_of(model, ids, CUTS, cache), cache.layers[2].keys[:, : sum(CUTS)]
        assert steps == (CUTS if on else [])
    for a, b in zip(found[True], found[False], strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gqa", GQA)
def test_a_step_is_no_less_exact_than_the_modules(gqa, dtype, monkeypatch):
    model, ids = elastic("qwen3", gqa), tokens(T=12)
    model.set_widths(mixed(model.elastic))
    exact = logits_of(model.to(dtype).double(), ids, [6, 1, 5], ElasticCache())
    model.to(dtype)
    found = []
    for on in (True, False):
        with counted(monkeypatch, on):
            found.append(relative(logits_of(model, ids, [6, 1, 5], ElasticCache()).double(), exact))
    assert found[0] <= 1.5 * found[1]


def test_generation_takes_the_same_tokens(monkeypatch):
    model, ids = elastic("llama", "3:1"), tokens(T=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for widths in (model.elastic.full(), mixed(model.elastic)):
        model.set_widths(widths)
        for settings in (
            dict(do_sample=False),
            dict(do_sample=True, top_k=5),
            dict(num_beams=3, do_sample=False),
        ):
            runs = []
            for on in (True, False):
                torch.manual_seed(3)
                with counted(monkeypatch, on) as steps:
                    runs.append(
                        model.generate(
                            ids, attention_mask=mask, max_new_tokens=10, pad_token_id=0, **settings
                        )
                    )
                assert len(steps) == (10 if on else 0)
            assert torch.equal(*runs)


def test_the_cache_may_be_cropped_reordered_and_narrowed_between_steps(monkeypatch):
    model, ids = elastic(gqa="1:1"), tokens(T=9)
    wide, narrow = model.elastic.uniform(1, 2), model.elastic.uniform(0, 0)
    runs = []
    for on in (True, False):
        with counted(monkeypatch, on):
            cache, parts = ElasticCache(), []
            model.set_widths(wide)
            parts.append(logits_of(model, ids, [6, 3], cache))
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([1, 1]))
            parts.append(logits_of(model, ids[:, :3], [1, 2], cache))
            cache.batch_repeat_interleave(2)
            model.set_widths(narrow)
            parts.append(logits_of(model, ids[:, :4].repeat(2, 1), [2, 2], cache))
            runs.append(parts)
        model.set_widths(wide)
        with pytest.raises(ValueError, match="more key/value groups than the cache holds"):
            model(ids[:1].repeat(4, 1)[:, :1], cache=cache)
    for a, b in zip(*runs, strict=True):
        assert relative(a, b) < 1e-5


def test_the_first_token_after_a_prompt_copies_no_cache():
    """Growing SmolLM2's cache of 512 tokens takes 5 ms, half a step."""
    model, ids, cache = elastic(), tokens(T=65), ElasticCache()
    logits_of(model, ids[:, :64], [64], cache)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    logits_of(model, ids[:, 64:], [1], cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before


def test_weights_that_are_replaced_or_changed_are_seen(monkeypatch):
    model, ids = elastic(), tokens(T=7)
    with counted(monkeypatch) as steps:
        before = logits_of(model, ids, [5, 1, 1], ElasticCache())
        layer = model.model.layers[1]
        with torch.no_grad():
            layer.mlp.down_proj.weight.mul_(2)
        layer.self_attn.q_proj.weight = nn.Parameter(layer.self_attn.q_proj.weight * 0.5)
        layer.self_attn.k_proj.weight.data = layer.self_attn.k_proj.weight.data * 0.5
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data * 3
        after = logits_of(model, ids, [5, 1, 1], ElasticCache())
    assert steps == [5, 1, 1] * 2
    with counted(monkeypatch, on=False):
        assert relative(after, logits_of(model, ids, [5, 1, 1], ElasticCache())) < 1e-5
    assert relative(after, before) > 1e-2


def test_a_copy_of_a_model_has_its_own_weights(monkeypatch):
    model, ids = elastic(), tokens(T=7)
    before = logits_of(model, ids, [5, 1, 1], ElasticCache())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(2)
    with counted(monkeypatch) as steps:
        changed = logits_of(other, ids, [5, 1, 1], ElasticCache())
    assert steps == [5, 1, 1] and relative(changed, before) > 1e-2
    assert torch.equal(logits_of(model, ids, [5, 1, 1], ElasticCache()), before)


def hooked(model: Any, seen: list[Any]) -> Any:
    return model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))


def test_the_modules_run_where_a_step_would_miss_something(monkeypatch):
    model, ids = elastic(), tokens(T=6)

    def run(ids: Any = ids[:, 5:], **kwargs: Any) -> list[int]:
        cache = ElasticCache()
        with torch.no_grad():
            model(tokens(T=6)[:, :5], cache=cache)
        with counted(monkeypatch) as steps, torch.set_grad_enabled(kwargs.pop("grad", False)):
            model(ids, cache=cache, **kwargs)
        return steps

    assert run() == [1]
    assert run(logits_to_keep=1) == [1]
    assert run(grad=True) == []
    assert run(tokens(T=9)) == [9]
    assert run(labels=ids[:, 5:]) == []
    assert run(output_hidden_states=True) == []
    assert run(return_dict=False) == []
    assert run(logits_to_keep=torch.tensor([0])) == []
    assert run(logits_to_keep=-1) == []
    seen: list[Any] = []
    handle = hooked(model, seen)
    assert run() == [] and len(seen) == 2  # the prompt's pass, and the step's
    handle.remove()
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(1))
    assert run() == [] and len(seen) == 4
    handle.remove()
    assert run() == [1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run() == []
    model.set_widths([model.elastic.full(), model.elastic.smallest()])
    assert run() == [1]
    turned(routed(model), 0.6)
    assert run() == [1]
    with model.watched() as forwards:
        assert run() == [] and forwards[1].mlp.shape[:2] == (2, 1)
    c = model.elastic
    ones = Probabilities(torch.ones(2, 3, len(c.mlp_choices)), torch.ones(2, 3, len(c.head_choices)))
    model.set_policy(Mixed(ones), c.full(), "all")
    assert run() == []
    model.set_widths(model.elastic.full())
    with counted(monkeypatch) as steps, torch.no_grad():
        model(inputs_embeds=model.model.embed_tokens(ids))
    assert steps == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.model.norm, "variance_epsilon", 0.5),
        lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 0.5),
        lambda m: setattr(m.model.layers[1].self_attn.k_norm, "variance_epsilon", 0.5),
        lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.9),
    ],
)
def test_the_modules_run_where_layers_differ_in_what_a_step_takes_once(change):
    stock, ids = small_model("qwen3"), tokens()
    with torch.no_grad():
        before = stock(ids).logits
        change(stock)
        exact = stock(ids).logits
        assert relative(before, exact) > 1e-3
        assert relative(make_elastic(stock)(ids).logits, exact) < 1e-5


def test_the_modules_run_under_transforms(monkeypatch):
    model, ids = elastic(), tokens()
    model.set_widths(mixed(model.elastic))
    own = {name: p.detach() for name, p in model.named_parameters()}

    def logits(parameters: Any, ids: Any = ids) -> Any:
        return functional_call(model, parameters, (ids,), {"use_cache": False}).logits

    with torch.no_grad():
        model(ids)
        with counted(monkeypatch) as steps:
            ensemble = {name: torch.stack([p, 1.2 * p]) for name, p in own.items()}
            together = vmap(logits)(ensemble)
            assert relative(vmap(logits, (None, 0))(own, ids[:, None]), model(ids)[0][:, None]) < 1e-5
        assert steps == [12]
        for i in range(2):
            alone = logits({name: p[i] for name, p in ensemble.items()})
            assert relative(together[i], alone) < 1e-5
        ones = {name: torch.ones_like(p) for name, p in own.items()}
        with pytest.raises(NotImplementedError, match=r"elastic_linear: .* no forward-mode gradient"):
            jvp(logits, (own,), (ones,))
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(p, ones[name]) for name, p in own.items()}
            with pytest.raises(NotImplementedError, match=r"elastic_linear: .* no forward-mode gradient"):
                logits(dual)


def test_a_layer_that_was_moved_is_known_by_its_place():
    """A model put together of another's layers, whose attentions say where they came from."""
    model, ids = small_model(), tokens()
    layers = [model.model.layers[i] for i in (2, 0)]
    model.model.layers = nn.ModuleList([*layers, copy.deepcopy(layers[0])])
    exact = copy.deepcopy(model)
    for i, layer in enumerate(exact.model.layers):
        layer.self_attn.layer_idx = i
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    model = make_elastic(model)
    model.set_widths(mixed(model.elastic))
    right = make_elastic(exact)
    right.set_widths(mixed(model.elastic))
    with torch.enable_grad():
        assert torch.equal(model(ids).logits, right(ids).logits)
    assert torch.equal(model.generate(ids, **settings), right.generate(ids, **settings))


@pytest.mark.parametrize("dial", ["all", "requests", "tokens"])
@pytest.mark.parametrize("side", [None, "left"])
def test_a_forward_without_a_cache_gives_the_logits_of_the_modules(side, dial, monkeypatch):
    model, ids = routed(elastic("llama", "3:1")), tokens(3, 150)
    if dial == "all":
        model.set_widths(mixed(model.elastic))
    elif dial == "requests":
        model.set_widths(three(model.elastic))
    else:
        turned(model, 0.4, 0.6, 0.8)
    mask = torch.ones_like(ids)
    if side is not None:
        mask[1, :70] = 0
    found = []
    for on in (True, False):
        with counted(monkeypatch, on) as steps, torch.no_grad():
            given = {} if side is None else {"attention_mask": mask}
            outputs = [model(ids, use_cache=False, logits_to_keep=keep, **given) for keep in (0, 2)]
        assert steps == ([150, 150] if on else []) and all(output.cache is None for output in outputs)
        assert [output.logits.shape[1] for output in outputs] == [150, 2]
        found.append(
            torch.cat([output.logits for output in outputs], 1)[torch.cat([mask, mask[:, -2:]], 1) > 0]
        )
    assert relative(*found) < 1e-5


def test_a_cache_that_is_given_is_used_and_given_back(monkeypatch):
    model, ids = elastic(), tokens(T=6)
    for on in (True, False):
        for use_cache in (True, False):
            cache = ElasticCache()
            with counted(monkeypatch, on), torch.no_grad():
                output = model(ids, cache=cache, use_cache=use_cache)
            assert output.cache is cache and cache.get_seq_length() == 6


def test_a_budget_may_rise_while_nothing_is_cached(monkeypatch):
    for on in (True, False):
        model, ids, cache = elastic(gqa="1:1"), tokens(T=6), ElasticCache()
        with counted(monkeypatch, on):
            model.set_widths(model.elastic.smallest())
            logits_of(model, ids, [6], cache)
            cache.crop(-6)
            model.set_widths(model.elastic.full())
            again = logits_of(model, ids, [4, 2], cache)
            assert relative(again, logits_of(model, ids, [4, 2], ElasticCache())) == 0
