"""An elastic model at any width is the parent with the rest masked: values, gradients, padding and cached decoding."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from nn.models import FAMILIES, GQA, small_model
from torch import Tensor

from flextron.config import ElasticConfig, Widths
from flextron.nn import ElasticCache, elastic_config, make_elastic

UNITS = ("kv_group", "query")


def tokens(B: int = 2, T: int = 12) -> Tensor:
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(1))


def elastic(family: str = "llama", gqa: str = "2:1", unit: str = "kv_group", **overrides: Any) -> Any:
    model = small_model(family, gqa, **overrides)
    return make_elastic(model, elastic_config(model, unit))


def mixed(config: ElasticConfig) -> Widths:
    """Widths that differ between layers on both axes."""
    pick = [
        menu[i % len(menu)]
        for menu in (config.mlp_choices, config.head_choices)
        for i in range(config.num_layers)
    ]
    return Widths(pick[: config.num_layers], pick[config.num_layers :])


def mask_(model: Any, config: ElasticConfig, widths: Widths) -> Any:
    """Cut everything beyond the widths off in a stock model: what a dropped neuron or head writes is nothing."""
    M, G, D = config.heads_per_group, config.num_kv_heads, config.head_dim
    with torch.no_grad():
        for layer, d, n in zip(model.model.layers, widths.mlp, widths.heads, strict=True):
            layer.mlp.down_proj.weight[:, d:] = 0
            o = layer.self_attn.o_proj.weight.view(-1, G, M, D)
            (o[:, n:] if config.unit == "kv_group" else o[:, :, n:]).zero_()
    return model


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("gqa", GQA)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_width_is_the_parent(family, gqa):
    parent, model, ids = small_model(family, gqa), elastic(family, gqa), tokens()
    assert relative(model(ids).logits, parent(ids).logits) < 1e-5
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **settings), parent.generate(ids, **settings))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("gqa", GQA)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_widths_equal_the_masked_parent(family, gqa, unit):
    model, ids = elastic(family, gqa, unit), tokens()
    widths = mixed(model.elastic)
    masked = mask_(small_model(family, gqa), model.elastic, widths)
    model.set_widths(widths)
    ours, exact = model(ids, labels=ids), masked(ids, labels=ids)
    assert relative(ours.logits, exact.logits) < 1e-5

    ours.loss.backward()
    exact.loss.backward()
    cut = mask_(
        copy.deepcopy(masked), model.elastic, widths
    )  # gradients reach cut columns of the masked parent only
    for p, g in zip(cut.parameters(), masked.parameters(), strict=True):
        p.data.copy_(g.grad)
    mask_(cut, model.elastic, widths)
    for (name, p), g in zip(model.named_parameters(), cut.parameters(), strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_beyond_the_widths_are_exact_zeros(unit):
    model, ids = elastic(unit=unit, attention_bias=True, mlp_bias=True), tokens()
    c, widths = model.elastic, model.elastic.smallest()
    model.set_widths(widths)
    model(ids, labels=ids).loss.backward()
    d, n, D = widths.mlp[0], widths.heads[0], c.head_dim
    mlp, attention = model.layers_of()[0].mlp, model.layers_of()[0].attention
    beyond = [p.grad[d:] for lin in (mlp.gate_proj, mlp.up_proj) for p in lin.parameters()]
    beyond.append(mlp.down_proj.weight.grad[:, d:])
    q = attention.q_proj.weight.grad.view(c.num_kv_heads, c.heads_per_group, D, -1)
    beyond.append(q[n:] if unit == "kv_group" else q[:, n:])
    if unit == "kv_group":
        beyond += [p.grad[n * D :] for lin in (attention.k_proj, attention.v_proj) for p in lin.parameters()]
    assert all(torch.count_nonzero(g) == 0 and g.numel() for g in beyond)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kv", ["selected", "all"])
@pytest.mark.parametrize("gqa", GQA)
def test_cached_decode_equals_the_full_pass(gqa, kv, unit):
    model, ids = elastic("qwen3", gqa, unit), tokens(T=20)
    model.set_widths(mixed(model.elastic), kv)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache, steps = ElasticCache(), []
        for a, b in [
            (0, 5),
            (5, 6),
            (6, 7),
            (7, 9),
            (9, 19),
            (19, 20),
        ]:  # prompt, single tokens, a few, a chunk
            steps.append(model(ids[:, a:b], cache=cache).logits)
    assert relative(torch.cat(steps, 1), full) < 1e-5
    assert cache.get_seq_length() == 20
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert stored == [model.elastic.kv_heads(n, kv) for n in model.widths.heads]


def test_gradients_flow_through_cached_decode():
    model, ids = elastic(), tokens(T=6)
    model.set_widths(mixed(model.elastic))
    full = torch.autograd.grad(model(ids, use_cache=False).logits[:, -1].sum(), list(model.parameters()))
    cache = ElasticCache()
    model(ids[:, :5], cache=cache)
    step = torch.autograd.grad(model(ids[:, 5:], cache=cache).logits[:, -1].sum(), list(model.parameters()))
    for a, b in zip(step, full, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_padding_on_either_side_changes_nothing():
    model, ids = elastic("qwen2", "3:1"), tokens(T=9)
    model.set_widths(mixed(model.elastic))
    with torch.no_grad():
        alone = model(ids[:1, 3:]).logits
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(ids, attention_mask=mask, position_ids=positions).logits[:1, 3:]
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        right = model(torch.cat([ids[:, 3:], ids[:, :3]], 1), attention_mask=mask).logits[:1, :6]
        padded = model.generate(
            ids,
            attention_mask=torch.ones_like(ids).index_fill(1, torch.arange(3), 0),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
        plain = model.generate(
            ids[:, 3:],
            attention_mask=torch.ones_like(ids[:, 3:]),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
    assert relative(left, alone) < 1e-5
    assert relative(right, alone) < 1e-5
    assert torch.equal(padded[:, 9:], plain[:, 6:])


def test_selected_cache_goes_down_but_not_up():
    model, ids = elastic(gqa="1:1"), tokens()
    c = model.elastic
    outputs = {}
    for kv in ("selected", "all"):
        cache = ElasticCache()
        with torch.no_grad():
            model.set_widths(c.uniform(1, 2), kv)
            model(ids[:, :6], cache=cache)
            model.set_widths(c.uniform(1, 0), kv)
            outputs[kv] = model(ids[:, 6:9], cache=cache).logits
            model.set_widths(c.uniform(1, 2), kv)
            if kv == "all":
                model(ids[:, 9:], cache=cache)
                assert cache.get_seq_length() == 12
                continue
            with pytest.raises(ValueError, match="more key/value groups than the cache holds, got 3 for 1"):
                model(ids[:, 9:], cache=cache)
            assert cache.get_seq_length() == 9  # refused before anything was appended
    assert relative(outputs["selected"], outputs["all"]) < 1e-6


def test_raising_a_budget_with_all_kv_equals_one_pass_with_mixed_tokens():
    """The later tokens see, at full width, exactly the keys and values that the earlier, smaller ones stored."""
    model, ids = elastic(gqa="1:1"), tokens()
    c = model.elastic
    layer = model.layers_of()[0].attention
    small, full = Widths((40, 40, 40), (1, 4, 4)), Widths((40, 40, 40), (4, 4, 4))
    with torch.no_grad():
        cache = ElasticCache()
        model.set_widths(small, "all")
        model(ids[:, :6], cache=cache)
        stored = cache.layers[0].keys[:, :6].clone()
        model.set_widths(full, "all")
        whole = ElasticCache()
        model(ids[:, :6], cache=whole)
    assert torch.equal(
        stored, whole.layers[0].keys[:, :6]
    )  # layer 0 reads the embeddings: its K/V know no width
    assert stored.shape[2] == c.num_kv_heads and layer.heads == 4


def test_setting_widths_copies_no_weight():
    model = elastic()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    for widths in (model.elastic.smallest(), mixed(model.elastic), model.elastic.full()):
        model.set_widths(widths)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_bad_widths_change_nothing():
    model = elastic()
    model.set_widths(mixed(model.elastic))
    before = copy.deepcopy((model.widths, [(x.attention.heads, x.mlp.width) for x in model.layers_of()]))
    for bad in (Widths((7,) * 3, (1,) * 3), Widths((40,) * 3, (9,) * 3), Widths((40,), (1,))):
        with pytest.raises(ValueError, match="widths: "):
            model.set_widths(bad)
    with pytest.raises(ValueError, match="kv must be one of selected, all, got 'none'"):
        model.set_widths(model.elastic.full(), "none")
    assert before == (model.widths, [(x.attention.heads, x.mlp.width) for x in model.layers_of()])


def test_budget_block_restores_what_was_set():
    model = elastic()
    model.set_widths(mixed(model.elastic), "all")
    before = model.widths
    with pytest.raises(RuntimeError, match="inside"), model.budget(widths=model.elastic.smallest()) as widths:
        assert model.widths == widths == model.elastic.smallest() and model.kv == "selected"
        raise RuntimeError("inside")
    assert model.widths == before and model.kv == "all"


def test_budget_must_be_one_and_resolvable():
    model = elastic()
    with pytest.raises(ValueError, match="exactly one budget must be given, got none"):
        model.set_budget()
    with pytest.raises(ValueError, match="exactly one budget must be given, got fraction, params"):
        model.set_budget(0.5, params=100)
    with pytest.raises(ValueError, match="fraction needs a planner"):
        model.set_budget(0.5)
    assert model.set_budget(1.0) == model.elastic.full()


def test_names_and_tensors_stay_those_of_the_parent():
    parent, model = small_model("qwen3"), elastic("qwen3")
    mine, theirs = model.state_dict(), parent.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert type(model).__name__ == type(parent).__name__


def test_what_is_not_supported_is_refused():
    with pytest.raises(NotImplementedError, match="alibi of a falcon must be False, got True"):
        make_elastic(small_model("falcon", alibi=True))
    with pytest.raises(NotImplementedError, match=r"attention_dropout must be 0, got 0\.1"):
        make_elastic(small_model(attention_dropout=0.1))
    with pytest.raises(NotImplementedError, match="is_causal must be True, got False"):
        make_elastic(small_model(is_causal=False))
    with pytest.raises(NotImplementedError, match="return_dict must be True, got False"):
        make_elastic(small_model(return_dict=False))
    with pytest.raises(NotImplementedError, match="activation must be one of"):
        make_elastic(small_model(hidden_act="tanh"))
    with pytest.raises(TypeError, match="make_elastic: model must be a transformers causal LM, got Linear"):
        make_elastic(torch.nn.Linear(2, 2))
    model = elastic()
    with pytest.raises(ValueError, match="must not be elastic already"):
        make_elastic(model)
    with pytest.raises(ValueError, match="config must describe the model, got num_heads=8"):
        make_elastic(small_model("llama", "1:1"), model.elastic)
    with pytest.raises(TypeError, match="cache must be an ElasticCache, got DynamicCache"):
        from transformers import DynamicCache

        model(tokens(), cache=DynamicCache())


def test_parameter_count_of_full_width_is_the_parents():
    for family in FAMILIES:
        for tied in (True, False):
            parent = small_model(family, "3:1", tie_word_embeddings=tied)
            config = elastic_config(parent)
            assert config.params(config.full()) == sum(p.numel() for p in parent.parameters())


def test_a_forward_refuses_more_arguments_than_it_has():
    model, ids = elastic(), torch.tensor([[1, 2, 3]])
    with pytest.raises(TypeError, match="positional"):
        model.forward(ids, *[None] * 40)
    with torch.no_grad():
        model(ids, cache=(cache := ElasticCache()))
        with pytest.raises(TypeError, match="positional"):
            given = dict(input_ids=ids[:, :1], cache=cache, logits_to_keep=0)
            names = [
                p.name
                for p in inspect.signature(model.forward).parameters.values()
                if p.kind != p.VAR_KEYWORD
            ]
            model.forward(*(given.get(name) for name in names), None)
    assert cache.get_seq_length() == 3


def test_beam_search_reorders_the_cache():
    parent, model, ids = small_model(), elastic(), tokens()
    settings = dict(max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **settings), parent.generate(ids, **settings))


@pytest.mark.parametrize("where", ["config", "generation_config", "argument"])
def test_generating_without_a_cache_says_the_same(where):
    parent, model, ids = small_model(), elastic(), tokens()
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = parent.generate(ids, **settings)
    if where == "argument":
        settings["use_cache"] = False
    else:
        getattr(model, where).use_cache = False
    assert torch.equal(model.generate(ids, **settings), expected)


def test_a_cache_may_be_given_by_position():
    model, ids = elastic(), tokens()
    cache = ElasticCache()
    with torch.no_grad():
        model(ids[:, :8], None, None, cache)
        step = model(ids[:, 8:], None, None, cache).logits
        assert relative(step, model(ids).logits[:, 8:]) < 1e-5


def test_what_a_cache_or_output_cannot_be_is_said():
    model, ids = elastic(), tokens()
    with pytest.raises(ValueError, match="cache_implementation must be None or 'dynamic', got 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="output_attentions must be False"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kv", ["selected", "all"])
def test_estimated_bytes_are_those_that_are_held(unit, kv):
    """Weights that are read, and keys and values that are valid, of a bfloat16 model with a cache."""
    model, ids = elastic("qwen2", "3:1", unit).to(torch.bfloat16), tokens(B=2, T=12)
    c, widths = model.elastic, mixed(model.elastic)
    model.set_widths(widths, kv)
    cache = ElasticCache()
    with torch.no_grad():
        model(ids, cache=cache)
    cached = sum(2 * x.keys[:, : x.length].numel() for x in cache.layers)
    weights = c.params(widths, kv)
    assert c.memory_bytes(widths, batch=2, context=12, bytes_per_value=2, kv=kv) == 2 * (weights + cached)


def test_a_budget_counts_what_the_model_is_in():
    model = elastic().to(torch.bfloat16)
    seen = {}

    class Planner:
        def at(self, device: torch.device, dtype: torch.dtype) -> Any:
            assert (device, dtype) == (torch.device("cpu"), torch.bfloat16)
            return self

        def resolve(self, **budget: Any) -> Widths:
            seen.update(budget)
            return model.elastic.smallest()

    model.planner = Planner()
    model.set_budget(memory_gb=0.1, batch=3, context=100, kv="all")
    counted = dict(batch=3, context=100, kv="all", bytes_per_value=2)
    assert seen == dict(memory_gb=0.1, phase="prefill", machine=None, **counted)
