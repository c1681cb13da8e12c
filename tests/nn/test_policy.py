"""Widths of every request's, or token's, own: each gets what it would get alone; how routers learn through them."""

import copy
from typing import Any

import pytest
import torch
from nn.models import GQA, small_model
from nn.test_elastic_model import elastic, mixed, relative, tokens
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import flextron.nn.model
from flextron.config import Widths
from flextron.nn import Dial, ElasticCache, elastic_mlp, make_elastic
from flextron.nn.policy import PerToken, Relaxed
from flextron.nn.router import AdaptiveRouter, GumbelSampler, Logits, Menus, Probabilities
from flextron.routing.learning import relaxed_loss
from flextron.routing.search import one_hot

UNITS = ("kv_group", "query")
GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)


def routed(model: Any, spread: float = 1.0, seed: int = 0) -> Any:
    """The model with an adaptive router of random choices, calibrated by hand."""
    c = model.elastic
    router = AdaptiveRouter(c.num_layers, c.hidden_size, c.choices, (0.5, 1.0), 16, seed).requires_grad_(
        False
    )
    torch.nn.init.normal_(router.w2, std=spread, generator=torch.Generator().manual_seed(seed))
    router.ramp.copy_(torch.cat([torch.arange(n) for n in c.choices]).float())
    router.calibration = {"prefill": ((0.3, 0.9), (-2.0, 2.0))}
    model.attach_router(router)
    return model


def turned(model: Any, *targets: float) -> Any:
    model.turn(Dial.adaptive(model.elastic, targets))
    return model


def three(config: Any) -> list[Widths]:
    return [config.smallest(), mixed(config), config.full()]


def left_padded() -> tuple[Tensor, Tensor]:
    """Three sequences of 9, 5 and 7 tokens, and their mask."""
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :2] = 0
    return ids, mask


# ---- a budget for each request ----


@pytest.mark.parametrize("kv", ["selected", "all"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("gqa", GQA)
def test_each_request_gets_what_it_gets_alone(gqa, unit, kv):
    model, ids = elastic("qwen2", gqa, unit), tokens(3)
    widths = three(model.elastic)
    with torch.no_grad():
        alone = []
        for row, w in zip(ids.split(1), widths, strict=True):
            model.set_widths(w)
            alone.append(model(row, use_cache=False).logits)
        model.set_widths(widths, kv)
        assert relative(model(ids, use_cache=False).logits, torch.cat(alone)) < 1e-5
        cache = ElasticCache()
        steps = [model(ids[:, a:b], cache=cache).logits for a, b in [(0, 5), (5, 6), (6, 9), (9, 12)]]
    assert relative(torch.cat(steps, 1), torch.cat(alone)) < 1e-5
    assert [layer.keys.shape[2] for layer in cache.layers] == [
        model.elastic.kv_heads(n, kv) for n in model.widths.heads
    ]


def test_requests_of_one_ragged_batch_generate_as_they_do_alone():
    model = elastic()
    ids, mask = left_padded()
    widths = three(model.elastic)
    together = _generated(model, widths, ids, mask)
    for i, w in enumerate(widths):
        own = ids[i : i + 1, int((1 - mask[i]).sum()) :]
        alone = _generated(model, [w], own, torch.ones_like(own))
        assert torch.equal(together[i, 9:], alone[0, own.shape[1] :])


def _generated(model: Any, widths: list[Widths], ids: Tensor, mask: Tensor) -> Tensor:
    model.set_budget(widths=widths)
    return model.generate(ids, attention_mask=mask, **GREEDY)


def test_beams_and_samples_share_the_budget_of_their_request():
    model, ids = elastic(), tokens(2)
    widths = [model.elastic.smallest(), model.elastic.full()]
    settings = dict(max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    model.set_widths(widths)
    together = model.generate(ids, **settings)
    for i, w in enumerate(widths):
        model.set_widths(w)
        assert torch.equal(together[i], model.generate(ids[i : i + 1], **settings)[0])


def test_a_batch_of_another_size_is_refused():
    model = elastic()
    model.set_widths(three(model.elastic))
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 budgets that are set, got 2"):
        model(tokens(2), use_cache=False)


def test_lists_of_budgets_give_lists_of_widths():
    model = elastic()
    full, small = model.elastic.full(), model.elastic.smallest()
    assert model.set_budget(widths=[small, full]) == [small, full]
    assert model.widths == full and model.dial == Dial((small, full), "selected")
    assert model.set_budget([1.0, 1]) == [full, full]
    before = model.dial
    with pytest.raises(ValueError, match="widths must be given for at least one request, got none"):
        model.set_budget(widths=[])
    with pytest.raises(ValueError, match="mlp\\[0\\] must be one of"):
        model.set_budget(widths=[full, Widths((7,) * 3, (1,) * 3)])
    assert model.dial == before
    with model.budget(widths=small):
        assert model.widths == small
    assert model.dial == before


# ---- widths of every token's own ----


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("gqa", GQA)
def test_adaptive_at_one_choice_is_the_static_model(gqa, unit):
    model, ids = routed(elastic("qwen3", gqa, unit), spread=0.0), tokens()
    c = model.elastic
    widths = mixed(c)
    for layer in range(c.num_layers):  # logits that leave no doubt
        model.adaptive.base[layer, :, c.mlp_choices.index(widths.mlp[layer])] = 100.0
        model.adaptive.base[layer, :, len(c.mlp_choices) + c.head_choices.index(widths.heads[layer])] = 100.0
    model.set_widths(widths, "all")
    with torch.no_grad():
        static = model(ids, use_cache=False).logits
        found = turned(model, 0.5)(ids, use_cache=False).logits
    assert relative(found, static) < 1e-6


@pytest.mark.parametrize("unit", UNITS)
def test_every_token_gets_its_own_layer(unit):
    """Layer by layer, each token's output is that of the layer at its own widths, on the same inputs."""
    model, ids = turned(routed(elastic(unit=unit)), 0.6), tokens(2, 9)
    c, inputs, outputs = model.elastic, [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
        )
        layer.register_forward_hook(lambda m, args, out: outputs.append(out))
    with torch.no_grad(), model.watched() as forwards:
        model(ids, use_cache=False)
    chosen = forwards[0]
    assert chosen.mlp.shape == (2, 9, c.num_layers)
    assert len(chosen.mlp.unique()) > 1 and len(chosen.heads.unique()) > 1
    for i, (args, kwargs) in enumerate(inputs[:]):
        for place in ((0, 8), (1, 3), (1, 8)):
            mlp, heads = c.mlp_choices[chosen.mlp[*place, i]], c.head_choices[chosen.heads[*place, i]]
            model.set_widths(Widths((mlp,) * c.num_layers, (heads,) * c.num_layers), "all")
            with torch.no_grad():
                alone = model.model.layers[i](*args, **kwargs)
            assert relative(outputs[i][place], alone[place]) < 1e-5


@pytest.mark.parametrize("unit", UNITS)
def test_adaptive_decode_equals_the_full_pass_and_stores_all_groups(unit):
    model, ids = turned(routed(elastic("qwen3", "3:1", unit)), 0.6), tokens(2, 20)
    with torch.no_grad():
        full, cache = model(ids, use_cache=False).logits, ElasticCache()
        pieces = [(0, 5), (5, 6), (6, 7), (7, 9), (9, 19), (19, 20)]
        steps = [model(ids[:, a:b], cache=cache).logits for a, b in pieces]
    assert relative(torch.cat(steps, 1), full) < 1e-5
    assert [layer.keys.shape[2] for layer in cache.layers] == [model.elastic.num_kv_heads] * 3


def test_an_adaptive_budget_may_rise_and_fall_within_a_cache():
    model, ids = routed(elastic()), tokens()
    cache = ElasticCache()
    with torch.no_grad():
        for i, target in enumerate((0.4, 0.9, 1.0, 0.3)):
            turned(model, target)(ids[:, 3 * i : 3 * i + 3], cache=cache)
    assert cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="kv must be 'all' when adaptive, got 'selected'"):
        model.set_budget(0.5, adaptive=True, kv="selected")


def test_tokens_of_a_ragged_batch_choose_as_they_do_alone():
    model = routed(elastic())
    ids, mask = left_padded()
    turned(model, 0.4, 0.6, 0.8)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for i, target in enumerate((0.4, 0.6, 0.8)):
        own = ids[i : i + 1, int((1 - mask[i]).sum()) :]
        alone = turned(model, target).generate(own, attention_mask=torch.ones_like(own), **GREEDY)
        assert torch.equal(together[i, 9:], alone[0, own.shape[1] :])


def test_the_choice_is_deterministic_and_costs_no_random_number():
    model, ids = turned(routed(elastic()), 0.6), tokens()
    before = torch.get_rng_state()
    with torch.no_grad():
        first, second = (model(ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


def test_what_no_token_chose_is_never_used():
    """Neurons and heads beyond the largest choice hold NaN: no mask would keep them out."""
    model, ids = routed(elastic(), spread=0.0), tokens()
    c = model.elastic
    model.adaptive.base[:, :, 1] = 100.0
    model.adaptive.base[:, :, len(c.mlp_choices)] = 100.0
    d, n = c.mlp_choices[1], c.head_choices[0] * c.heads_per_group * c.head_dim
    with torch.no_grad():
        for mlp, attention in ((x.mlp, x.attention) for x in model.layers_of()):
            mlp.gate_proj.weight[d:] = mlp.up_proj.weight[d:] = float("nan")
            mlp.down_proj.weight[:, d:] = attention.o_proj.weight[:, n:] = float("nan")
            attention.q_proj.weight[n:] = float("nan")
        assert turned(model, 0.5)(ids, use_cache=False).logits.isfinite().all()


def test_target_one_is_the_full_model_also_beside_others():
    model, ids = routed(elastic(), spread=5.0), tokens()
    with torch.no_grad():
        model.set_widths(model.elastic.full())
        full = model(ids, use_cache=False).logits
        assert relative(turned(model, 1.0)(ids, use_cache=False).logits, full) < 1e-6
        assert relative(turned(model, 0.4, 1.0)(ids, use_cache=False).logits[1], full[1]) < 1e-6


def test_an_adaptive_budget_needs_a_router_for_the_phase():
    model = elastic()
    model.planner = type(
        "Everything", (), {"at": lambda self, *_: self, "target": lambda self, fraction, **_: fraction}
    )()
    with pytest.raises(
        ValueError, match="needs an adaptive router; run `flextron route DIR --adaptive` first"
    ):
        model.set_budget(0.5, adaptive=True)
    routed(model)
    with pytest.raises(ValueError, match=r"phase must be one it is calibrated for \(prefill\), got 'decode'"):
        model.set_budget(0.5, adaptive=True, phase="decode")
    with pytest.raises(
        ValueError, match=r"must be one of latency .* got params; some token may need any weight"
    ):
        model.set_budget(params=1e6, adaptive=True)
    assert model.set_budget(0.5, adaptive=True) == 0.5 and model.kv == "all"
    assert model.set_budget([0.5, 0.9], adaptive=True) == [0.5, 0.9]
    assert list(model.state_dict()) == list(small_model().state_dict())
    with pytest.raises(ValueError, match="must be adaptive, got one that chooses for no token"):
        model.set_widths(model.elastic.full())
        with model.watched():
            pass


@pytest.mark.parametrize("dial", ["requests", "tokens"])
def test_a_layer_compiles_as_one_graph(dial, monkeypatch):
    """The modules run, not the decoder op, and each layer by its graph."""
    monkeypatch.setattr(flextron.nn.model, "try_forward", lambda *_: None)
    model, texts = routed(elastic(num_hidden_layers=2)), (tokens(), tokens(2, 15))
    if dial == "requests":
        model.set_widths(three(model.elastic)[:2])
    else:
        turned(model, 0.6)
    ran: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled = aot_eager(graph, inputs)
        return lambda *args: ran.append(graph) or compiled(*args)

    with torch.no_grad():
        plain = [model(ids, use_cache=False).logits for ids in texts]
        for layer in model.model.layers:
            layer.compile(backend=backend, fullgraph=True)
        for ids, logits in zip(texts, plain, strict=True):
            ran.clear()
            assert relative(model(ids, use_cache=False).logits, logits) < 1e-6
            assert len(ran) == 2
        torch._dynamo.reset()


@pytest.mark.parametrize("dial", ["full", "requests", "tokens"])
def test_a_model_compiles_as_one_graph(dial):
    model, ids = routed(elastic(num_hidden_layers=2)), tokens()
    if dial == "requests":
        model.set_widths(three(model.elastic)[:2])
    elif dial == "tokens":
        turned(model, 0.6)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits
        torch._dynamo.reset()
    assert relative(compiled, plain) < 1e-6


# ---- how routers learn ----


def learning(model: Any, logits: Logits, hard: bool, noise: int | None = None) -> Relaxed:
    """Every layer chooses by the same rows of logits, [N, C]."""
    c = model.elastic
    menus = Menus(torch.tensor(c.mlp_choices), torch.tensor(c.head_choices))
    sampler = None if noise is None else GumbelSampler(noise)
    policy = Relaxed(lambda x, layer: logits, menus, sampler, 1.0, 1.0, hard)
    model.set_policy(policy, c.full(), "all")
    return policy


def rows_of_logits(config: Any, N: int, seed: int = 3) -> Logits:
    generator = torch.Generator().manual_seed(seed)
    counts = len(config.mlp_choices), len(config.head_choices)
    return Logits(*(torch.randn(N, n, generator=generator).requires_grad_() for n in counts))


@pytest.mark.parametrize("unit", UNITS)
def test_soft_gates_mix_the_widths(unit):
    """Each half of a layer is the sum over its choices of the probability times the layer at that choice."""
    model = elastic(unit=unit)
    c, x = model.elastic, torch.randn(2, 6, 72)
    logits = rows_of_logits(c, 12)
    attention, mlp = model.layers_of()[0].attention, model.layers_of()[0].mlp
    embeddings = model.model.rotary_emb(x, torch.arange(6)[None])
    decision = learning(model, logits, hard=False)(x, 0)
    with torch.no_grad():
        mixed_heads = attention(x, embeddings, decision=decision.heads)[0]
        mixed_mlp = mlp(x, decision=decision.mlp)
        exact_heads, exact_mlp = 0, 0
        for p, heads in zip(logits.heads.softmax(-1).T, c.head_choices, strict=True):
            model.set_widths(Widths(c.full().mlp, (heads,) * 3), "all")
            exact_heads = exact_heads + p.view(2, 6, 1) * attention(x, embeddings)[0]
        for p, d in zip(logits.mlp.softmax(-1).T, c.mlp_choices, strict=True):
            model.set_widths(Widths((d,) * 3, c.full().heads))
            exact_mlp = exact_mlp + p.view(2, 6, 1) * mlp(x)
    assert relative(mixed_heads, exact_heads) < 1e-5 and relative(mixed_mlp, exact_mlp) < 1e-5


@pytest.mark.parametrize("unit", UNITS)
def test_straight_through_takes_the_choice_and_learns_from_what_it_computed(unit):
    """Values are those of the arg-max; a choice up to the token's own gets <dy, y at that choice>, and those above
    the same as the token's own."""
    model = elastic(unit=unit)
    c, x, N = model.elastic, torch.randn(2, 6, 72), 12
    logits = rows_of_logits(c, N)
    attention, mlp = model.layers_of()[0].attention, model.layers_of()[0].mlp
    embeddings = model.model.rotary_emb(x, torch.arange(6)[None])
    decision = learning(model, logits, hard=True)(x, 0)
    dy = torch.randn(2, 6, 72)
    outputs = attention(x, embeddings, decision=decision.heads)[0], mlp(x, decision=decision.mlp)
    for axis, out in zip(("heads", "mlp"), outputs, strict=True):
        rows = getattr(logits, axis)
        (found,) = torch.autograd.grad((out * dy).sum(), rows)
        menu = c.head_choices if axis == "heads" else c.mlp_choices
        at = []
        for width in menu:
            heads, neurons = (width, c.full().mlp[0]) if axis == "heads" else (c.max_heads, width)
            model.set_widths(Widths((neurons,) * 3, (heads,) * 3), "all")
            with torch.no_grad():
                at.append(attention(x, embeddings)[0] if axis == "heads" else mlp(x))
        choice = rows.argmax(-1)
        values = torch.stack(at).flatten(1, 2)  # [C, N, K]
        assert relative(out.flatten(0, 1), values[choice, torch.arange(N)]) < 1e-5
        dp = (values * dy.flatten(0, 1)).sum(-1).T  # [N, C]
        own = dp.gather(1, choice[:, None])
        dp = torch.where(torch.arange(len(menu)) > choice[:, None], own, dp)
        p = rows.softmax(-1)
        assert relative(found, p * (dp - (p * dp).sum(-1, keepdim=True))) < 1e-4


def test_straight_through_pays_for_the_choice_alone(monkeypatch):
    """Rows times neurons that the op is asked for: those of the choices, whichever tokens made them."""
    model = elastic()
    c, spent = model.elastic, []
    real = elastic_mlp.elastic_mlp

    def counted(x, *args, choices=None, **kwargs):
        spent.append(x.flatten(0, -2).shape[0] * (choices[-1] if choices else args[6]))
        return real(x, *args, choices=choices, **kwargs)

    monkeypatch.setattr(elastic_mlp, "elastic_mlp", counted)
    logits = rows_of_logits(c, 24)
    learning(model, logits, hard=True)
    model(tokens(), use_cache=False)
    widths = torch.tensor(c.mlp_choices)[logits.mlp.argmax(-1)]
    assert sum(spent) == 3 * int(widths.sum()) < 3 * 24 * c.intermediate_size


@pytest.mark.parametrize("hard", [False, True])
def test_the_weights_learn_through_the_gates(hard):
    """The gradients of both forms agree where they must: with logits that leave no doubt, with the static model's."""
    model, ids = elastic(), tokens()
    c = model.elastic
    rows = Logits(torch.zeros(24, len(c.mlp_choices)), torch.zeros(24, len(c.head_choices)))
    rows.mlp[:, 1] = rows.heads[:, 0] = 200.0
    twin = copy.deepcopy(model)
    twin.set_widths(Widths((c.mlp_choices[1],) * 3, (c.head_choices[0],) * 3), "all")
    learning(model, rows, hard)
    for m in (model, twin):
        m(ids, labels=ids, use_cache=False).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6), name


def test_relaxed_loss_is_the_models_at_certain_choices_and_has_the_gates_gradient():
    model, ids = elastic(), tokens(3)
    c = model.elastic
    widths = three(c)
    certain = one_hot(c, widths)
    loss, dial = relaxed_loss(model, ids), model.dial
    with torch.no_grad():
        found = loss(certain)
        assert model.dial == dial and model.settings.now().policy is None
        for i, w in enumerate(widths):
            model.set_widths(w, "all")
            row = ids[i : i + 1]
            assert float(found[i]) == pytest.approx(
                float(model(row, labels=row, use_cache=False).loss), rel=1e-4
            )
    p = Probabilities(*(axis.clone().requires_grad_() for axis in certain))
    loss(p).sum().backward()
    with torch.no_grad():
        moved = Probabilities(certain.mlp.clone(), certain.heads)
        moved.mlp[1, 2, 0] += 1e-2  # one row's one layer's one choice
        step = float((loss(moved) - found)[1])
    assert step == pytest.approx(1e-2 * float(p.mlp.grad[1, 2, 0]), rel=0.1, abs=1e-5)


def test_noise_and_temperature_change_what_is_drawn():
    model = elastic()
    logits, x = rows_of_logits(model.elastic, 24), torch.randn(2, 12, 72)
    drawn = [learning(model, logits, True, noise)(x, 0).mlp.choice for noise in (None, 0, 0, 1)]
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[3])


def test_a_policy_is_asked_once_per_layer(monkeypatch):
    model, ids = turned(routed(elastic()), 0.5), tokens()
    asked: list[int] = []
    real = PerToken.__call__
    monkeypatch.setattr(PerToken, "__call__", lambda p, x, layer: asked.append(layer) or real(p, x, layer))
    with torch.no_grad(), model.watched() as forwards:
        model.generate(ids, **GREEDY)
    assert asked == 6 * [0, 1, 2]
    assert len(forwards) == 6 and forwards[0].mlp.shape == (2, 12, 3) and forwards[1].mlp.shape == (2, 1, 3)


def test_a_layer_with_a_forward_of_its_own_keeps_to_widths_and_hands_on_no_decision():
    """Its parts would not know what was decided: they refuse, whatever was decided for another layer."""

    class Doubled(LlamaDecoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    stock, ids = small_model(), tokens()
    layer = Doubled(stock.config, 1)
    layer.load_state_dict(stock.model.layers[1].state_dict())
    stock.model.layers[1] = layer.eval()
    with torch.no_grad():
        exact = stock(ids).logits
        model = routed(make_elastic(stock))
        assert relative(model(ids).logits, exact) < 1e-5
        with pytest.raises(RuntimeError, match="ElasticAttention must be called with a decision"):
            turned(model, 0.6)(ids)


def test_hooks_of_accelerate_that_were_there_before_stay_with_the_layer():
    from accelerate import dispatch_model

    stock, ids = small_model(), tokens()
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "cpu" for i in range(3)}
    model = routed(make_elastic(dispatch_model(stock, places, main_device="cpu", force_hooks=True)))
    assert all("_hf_hook" in layer.__dict__ for layer in model.model.layers)
    with torch.no_grad():
        found = turned(model, 0.6)(ids, use_cache=False).logits
        exact = turned(routed(elastic()), 0.6)(ids, use_cache=False).logits
    assert relative(found, exact) < 1e-5
