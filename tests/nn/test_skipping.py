"""Menus that begin at 0: a layer may skip its MLP, its attention or both, in every family."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from nn.models import EVERY, VARIANTS, row_model, small_model
from nn.test_decode_step import captured_step
from nn.test_forward import counted
from nn.test_policy import routed, turned
from nn.test_static_cache import by_modules, static_cache  # noqa: F401

import flextron
from flextron.artefacts.ladder import uniform_ladder
from flextron.config import Widths
from flextron.conversion import convert
from flextron.exporting.plain import export, load_plain
from flextron.nn import ElasticCache, elastic_config, make_elastic
from flextron.nn.graph import Begin
from flextron.nn.plain import build, extract, padded_problem
from flextron.nn.policy import Given, Mixed, Relaxed, menus_of
from flextron.nn.proof import logits_of, prove_sub_network, require_close
from flextron.nn.router import Indices, Logits, Probabilities

STREAM_NORMS = "opt, norms last"
ROWS = [row for row in (*EVERY, *VARIANTS) if row != STREAM_NORMS]
each_row = pytest.mark.parametrize("row", ROWS)
GREEDY = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0))


def skipping(model: Any, unit: str = "kv_group") -> Any:
    """The model with the menus that it has by default, from 0."""
    usual = elastic_config(model, unit)
    return make_elastic(model, elastic_config(model, unit, *((0, *menu) for menu in usual.menus)))


def networks(config: Any) -> list[Widths]:
    """The first layer without attention, the second with nothing, the last without MLP; and the other way round."""
    d, n = config.mlp_choices[1], config.head_choices[-1]
    return [Widths((d, 0, 0), (0, 0, n)), Widths((0, config.mlp_choices[-1], d), (n, 0, 0))]


def unit_of(row: str) -> str:
    return ("kv_group", "query")[ROWS.index(row) % 2]


@each_row
def test_a_network_that_skips_is_its_plain_model(row):
    """By the op of all layers, by the modules and with a cache; ragged, and padded with zeros for stock readers."""
    model = skipping(row_model(row), unit_of(row))
    ids = tokens(1, 24)
    for widths in networks(model.elastic):
        prove_sub_network("test", model, widths, ids)
        plain = extract(model, widths)
        assert sum(p.numel() for p in plain.parameters()) == model.elastic.params(widths)
        expected = logits_of(plain, ids)
        if padded_problem(model.elastic, widths) is None:
            require_close("test", "ragged", expected, logits_of(build(model, widths, "padded"), ids))
        said = model.generate(ids[:, :9], budget=widths, **GREEDY)
        assert torch.equal(plain.generate(ids[:, :9], **GREEDY), said)


@each_row
def test_requests_that_skip_keep_to_themselves(row):
    """One batch, padded on the left, of requests that skip different parts and one that skips none."""
    model = skipping(row_model(row), unit_of(row))
    several = [*networks(model.elastic), model.elastic.full()]
    ids, skips = tokens(3, 9), (0, 3, 1)
    mask = torch.ones_like(ids)
    for i, skip in enumerate(skips):
        mask[i, :skip] = 0
    with model.budget(widths=several):
        mixed = model.generate(ids, attention_mask=mask, **GREEDY)
    for i, (widths, skip) in enumerate(zip(several, skips, strict=True)):
        own = dict(attention_mask=mask[i : i + 1, skip:], budget=widths)
        assert torch.equal(mixed[i, -3:], model.generate(ids[i : i + 1, skip:], **own, **GREEDY)[0, -3:])


@each_row
def test_what_is_skipped_gets_a_gradient_of_zeros(row):
    model = skipping(row_model(row), unit_of(row)).train()
    widths, ids = networks(model.elastic)[0], tokens(2, 12)
    plain = extract(model, widths).train()
    with model.budget(widths=widths):
        model(ids, use_cache=False, labels=ids).loss.backward()
    plain(ids, use_cache=False, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for i, layer in enumerate(model.layers_of()):
        for axis, weights in zip(
            widths.axes, (layer.mlp.weights(), [*layer.attention.parameters()]), strict=True
        ):
            assert any(bool(p.grad.any()) for p in weights) == (axis[i] > 0)
    ours, theirs = (m.get_input_embeddings().weight.grad for m in (model, plain))
    require_close("test", "plain", theirs, ours)


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_tokens_that_skip_are_the_same_by_the_op_and_by_the_modules(unit, overrides, monkeypatch):
    model = routed(skipping(small_model(**overrides), unit))
    ids = tokens(2, 14)
    turned(model, 0.5)
    with model.watched() as forwards:
        by_modules = model(ids, use_cache=False).logits
    chosen = forwards[0]
    assert all(0 in axis and axis.max() > 0 for axis in chosen)
    cache = ElasticCache()
    with torch.no_grad(), counted(monkeypatch) as steps:
        parts = [model(part, cache=cache).logits for part in ids.split((9, 4, 1), 1)]
    assert steps == [9, 4, 1]
    require_close("test", "modules", by_modules, torch.cat(parts, 1))


@pytest.mark.parametrize("row", ["llama", "starcoder2", "gpt_oss", "gpt2"])
def test_a_mixture_of_skipping_and_not_is_in_between(row):
    """A part's output is linear in the share of its full width, bias and all, down to nothing where it is skipped."""
    model = skipping(row_model(row))
    config = model.elastic
    attention, mlp = model.layers_of()[0]
    turned = config.head_dim // (2 if model.anatomy.rotary == "half_once" else 1)
    x, tables = torch.randn(1, 6, config.hidden_size), (torch.ones(1, 6, turned),) * 2
    found = []
    for share in (0.0, 1.0, 0.25):
        p = Probabilities(*(torch.zeros(1, config.num_layers, count) for count in config.choices))
        for axis in p:
            axis[..., 0], axis[..., -1] = 1 - share, share
        model.set_policy(Mixed(p), config.full(), "all")
        setting = model.settings.now()
        decision = setting.decide(x, 0)
        seen, _ = attention(x, tables, setting=setting, decision=decision.heads)
        found.append((seen, mlp(x, setting, decision.mlp)))
    for none, full, part in zip(*found, strict=True):
        assert not none.any() and full.any()
        torch.testing.assert_close(part, 0.25 * full)


@pytest.mark.parametrize("row", ["llama", "starcoder2", "gpt_oss"])
def test_a_router_learns_through_choices_that_skip(row):
    """Straight through: the values are those of the choices alone, bias and all, and every logit gets a gradient."""
    model, ids = skipping(row_model(row)).train(), tokens(2, 9)
    config, generator = model.elastic, torch.Generator().manual_seed(0)
    logits = [
        Logits(*(torch.randn(18, count, generator=generator).requires_grad_() for count in config.choices))
        for _ in range(config.num_layers)
    ]
    menus = menus_of(config, model.device)
    found = []
    chosen = Indices(
        *(torch.stack([own.argmax(-1) for own in axis], 1) for axis in zip(*logits, strict=True))
    )
    assert all(0 in axis for axis in chosen)
    for policy in (Relaxed(lambda x, i: logits[i], menus, None, 1.0, 1.0, True), Given(chosen, menus)):
        model.set_policy(policy, config.full(), "all")
        found.append(model(ids, use_cache=False).logits)
    require_close("test", "choices", found[1].detach(), found[0].detach())
    found[0].square().sum().backward()
    assert all(axis.grad.isfinite().all() and axis.grad.any() for layer in logits for axis in layer)


def test_without_heads_and_all_groups_cached_a_later_token_may_use_them():
    model = skipping(small_model())
    none, full, ids = networks(model.elastic)[0], model.elastic.full(), tokens(1, 12)
    cache = ElasticCache()
    with torch.no_grad():
        with model.budget(widths=none, kv="all"):
            model(ids[:, :8], cache=cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [4, 4, 4]
        with model.budget(widths=full, kv="all"):
            late = model(ids[:, 8:], cache=cache).logits
    model.train()  # the same by the modules
    again = ElasticCache()
    with model.budget(widths=none, kv="all"):
        model(ids[:, :8], cache=again)
    with model.budget(widths=full, kv="all"):
        require_close("test", "op", late, model(ids[:, 8:], cache=again).logits)


@pytest.mark.parametrize("unit", ["kv_group", "query"])
@torch.no_grad()
def test_a_captured_step_adds_no_bias_of_what_is_skipped(unit, by_modules):  # noqa: F811
    model = skipping(small_model(attention_bias=True, mlp_bias=True), unit)
    ids, several = tokens(3, 10), [*networks(model.elastic), model.elastic.full()]
    expected, cache = ElasticCache(), static_cache(model, 3, 16)
    with model.budget(widths=several):
        for each in (expected, cache):
            model(ids[:, :9], cache=each)
        step = captured_step(model, cache)
        step.turn(model.settings.now().extents(3), 3)
        step.begin(Begin(ids[:, 9], torch.full((3,), 9), 9, None))
        require_close("test", "modules", model(ids[:, 9:], cache=expected).logits[:, 0], step())


def test_a_layer_without_heads_stores_nothing_and_counts_the_tokens():
    model = skipping(small_model())
    widths, ids = networks(model.elastic)[0], tokens(2, 7)
    for training in (False, True):  # by the op, by the modules
        cache = ElasticCache()
        model.train(training)
        with torch.set_grad_enabled(training), model.budget(widths=widths):
            model(ids, cache=cache)
        assert [layer.keys.numel() for layer in cache.layers[:2]] == [0, 0]
        assert cache.get_seq_length() == 7 and cache.layers[2].keys.numel() > 0
        with pytest.raises(ValueError, match="must not need more key/value groups than the cache holds"):
            model(ids, cache=cache)
    assert model.elastic.memory_bytes(widths, context=1) == 4 * (
        model.elastic.params(widths) + 2 * 4 * model.elastic.head_dim
    )


def test_the_ladder_skips_a_part_only_below_all_that_use_it():
    config = skipping(small_model()).elastic
    rungs = uniform_ladder(config).rungs
    assert rungs[0] == config.smallest() == Widths((0,) * 3, (0,) * 3) and rungs[-1] == config.full()
    for lower, upper in pairwise(rungs):
        assert upper.covers(lower)
        for below, above in zip(lower.axes, upper.axes, strict=True):
            assert all(not b for b, a in zip(below, above, strict=True) if a == 0)


def test_norms_of_the_stream_cannot_be_skipped():
    with pytest.raises(
        ValueError, match="menus of a opt whose norms follow the sum must begin above 0, got 0"
    ):
        elastic_config(row_model(STREAM_NORMS), "kv_group", (0, 40), None)


def test_a_conversion_proves_and_an_export_keeps_what_is_skipped(tmp_path):
    report = convert(
        small_model("qwen2"),
        tmp_path / "elastic",
        calibration=tokens(4, 24),
        mlp_choices=(0, 16, 40),
        head_choices=(0, 2, 4),
    )
    proven = report["parity"]["sub_networks"]
    assert any(0 in own["mlp"] for own in proven) and any(0 in own["heads"] for own in proven)
    model, ids = flextron.from_pretrained(tmp_path / "elastic"), tokens(1, 12)
    widths = Widths((16, 0, 40), (0, 2, 2))
    for layout in ("ragged", "padded"):
        told = export(model, tmp_path / layout, widths, layout=layout)
        assert told["parity"]["max_rel"] < 1e-4 and "differ in mlp and heads" in told["note"]
        read = load_plain(tmp_path / layout)
        with model.budget(widths=widths):
            require_close("test", "elastic", logits_of(model, ids), logits_of(read, ids))
    alike = replace(widths, mlp=(0, 0, 0), heads=(2, 2, 2))
    assert "layers have no mlp" in export(model, tmp_path / "flat", alike)["note"]
