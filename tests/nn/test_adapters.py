"""Low-rank adapters act on an elastic model at every width; what else replaces a projection is refused, not ignored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn.models import small_model
from nn.test_elastic_model import UNITS, elastic, mask_, mixed, relative, tokens
from nn.test_forward import counted
from nn.test_policy import learning, routed, three, turned
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import flextron
from flextron.artefacts.elastic_model import save_elastic
from flextron.nn.router import Logits

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model: Any, seed: int = 5, targets: Any = EVERY, **settings: Any) -> Any:
    """The model with LoRA of random A and B, the same for the same modules."""
    settings = dict(r=3, lora_alpha=12, target_modules=list(targets)) | settings
    model = get_peft_model(model, LoraConfig(**settings)).eval()
    return randomised(model, seed)


def randomised(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5 * p.shape[-1] ** -0.5)
    return model


def gradients(model: Any, ids: Any) -> dict[str, Any]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | found


def assert_same(ours: dict[str, Any], exact: dict[str, Any]) -> None:
    assert ours.keys() == exact.keys() and len(exact) > 2
    for name, value in exact.items():
        assert ours[name] is not None and relative(ours[name], value) < 1e-4, name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_at_full_width_values_and_gradients_are_those_of_the_stock_model_with_the_same_adapter(family):
    biases = dict(attention_bias=True, mlp_bias=True) if family == "llama" else {}
    ids = tokens()
    stock, model = adapted(small_model(family, **biases)), adapted(elastic(family, **biases))
    assert relative(model(ids).logits, stock(ids).logits) < 1e-5
    assert_same(gradients(model, ids), gradients(stock, ids))


@pytest.mark.parametrize("unit", UNITS)
def test_at_any_width_values_and_gradients_are_those_of_the_masked_merged_model(unit):
    ids, model = tokens(), adapted(elastic("llama", "3:1", unit))
    inner = model.base_model.model
    widths = mixed(inner.elastic)
    merged = adapted(small_model("llama", "3:1")).merge_and_unload()
    exact = mask_(merged, inner.elastic, widths)
    inner.set_widths(widths)
    assert relative(model(ids).logits, exact(ids).logits) < 1e-5
    # in steps of a cache, too
    with torch.no_grad():
        cache = flextron.nn.ElasticCache()
        parts = [model(input_ids=part, cache=cache).logits for part in ids.split([7, 1, 4], 1)]
    assert relative(torch.cat(parts, 1), exact(ids).logits) < 1e-5
    # dL/dA and dL/dB by the chain rule, from the gradient of the merged weight
    exact.zero_grad()
    exact.requires_grad_(True)
    mask_grads = gradients(exact, ids)
    ours = gradients(model, ids)
    kept = _kept_gradients(mask_grads, inner, widths)
    for name, grad in kept.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        module = model.get_submodule(stem)
        a, b = (getattr(module, f"lora_{x}")["default"].weight for x in "AB")
        scaling = module.scaling["default"]
        assert relative(ours[f"{stem}.lora_B.default.weight"], scaling * grad @ a.T) < 1e-4, name
        assert relative(ours[f"{stem}.lora_A.default.weight"], scaling * b.T @ grad) < 1e-4, name


def _kept_gradients(grads: dict[str, Any], model: Any, widths: Any) -> dict[str, Any]:
    """Gradients of projections' weights in a masked model, as an elastic one has them: nothing of what is dropped."""
    c, found = model.elastic, {}
    M, G, D = c.heads_per_group, c.num_kv_heads, c.head_dim
    for i, (d, n) in enumerate(zip(widths.mlp, widths.heads, strict=True)):
        for name in EVERY:
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            key = f"model.layers.{i}.{part}.{name}.weight"
            grad = grads[key].clone()
            if name == "down_proj":
                grad[:, d:] = 0
            elif name == "o_proj":
                o = grad.view(-1, G, M, D)
                (o[:, n:] if c.unit == "kv_group" else o[:, :, n:]).zero_()
            found[key] = grad
    return found


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dial", ["requests", "tokens", "soft", "hard"])
def test_requests_tokens_and_gates_have_their_widths_with_adapters_as_without(dial, unit):
    """Against the model whose weights hold the adapter already."""
    ids = tokens(3, 10)
    model = adapted(elastic("llama", "3:1", unit))
    merged = adapted(elastic("llama", "3:1", unit)).merge_and_unload()
    for inner in (model.base_model.model, merged):
        if dial == "requests":
            inner.set_widths(three(inner.elastic))
        elif dial == "tokens":
            turned(routed(inner), 0.4, 0.6, 0.8)
        else:
            generator = torch.Generator().manual_seed(2)
            c = inner.elastic
            rows = (
                torch.randn(ids.numel(), len(m), generator=generator) for m in (c.mlp_choices, c.head_choices)
            )
            learning(inner, Logits(*rows), dial == "hard")
    with torch.no_grad():
        assert relative(model(ids).logits, merged(ids).logits) < 1e-5
    assert all(value.isfinite().all() for value in gradients(model, ids).values())


def test_what_is_merged_is_an_ordinary_elastic_model(monkeypatch, tmp_path):
    ids, before = tokens(), elastic()
    model = adapted(elastic())
    inner = model.base_model.model
    widths = mixed(inner.elastic)
    inner.set_widths(widths)
    with counted(monkeypatch) as steps, torch.no_grad():
        with_adapter = model(ids).logits
        assert steps == []
        model.merge_adapter()
        assert relative(model(ids).logits, with_adapter) < 1e-5
        model.unmerge_adapter()
        assert relative(model(ids).logits, with_adapter) < 1e-5
        merged = model.merge_and_unload()
        assert merged is inner and steps == []
        assert relative(merged(ids).logits, with_adapter) < 1e-5
        assert steps == [12]
    assert merged.state_dict().keys() == before.state_dict().keys()
    assert relative(flextron.extract(merged)(ids).logits, with_adapter) < 1e-5
    flextron.pack(merged)
    with torch.no_grad():
        assert relative(merged(ids).logits, with_adapter) < 1e-5


def test_an_adapter_that_comes_or_goes_after_a_forward_is_seen(monkeypatch):
    ids, model = tokens(), elastic()
    with counted(monkeypatch) as steps, torch.no_grad():
        before = model(ids).logits
        wrapped = adapted(model)
        assert relative(wrapped(ids).logits, before) > 0.1
        assert steps == [12]
        with wrapped.disable_adapter():
            assert relative(wrapped(ids).logits, before) < 1e-5
        plain = wrapped.unload()
        assert torch.equal(plain(ids).logits, before) and steps == [12, 12]


def test_adapters_are_chosen_added_and_left_out_as_in_the_stock_model():
    ids, found = tokens(), []
    for model in (small_model(), elastic()):
        model = adapted(model, rank_pattern={"q_proj": 5}, alpha_pattern={"up_proj": 30}, use_rslora=True)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj", "down_proj"], lora_alpha=9))
        randomised(model, 8)
        rows = [model(ids).logits]
        model.set_adapter("second")
        rows.append(model(ids).logits)
        model.base_model.set_adapter(["default", "second"])
        rows.append(model(ids).logits)
        with model.disable_adapter():
            rows.append(model(ids).logits)
        model.merge_adapter(["second"])
        rows.append(model(ids).logits)
        with model.disable_adapter():  # a call undoes the merge
            rows.append(model(ids).logits)
        found.append(rows)
    for ours, exact in zip(*reversed(found), strict=True):
        assert relative(ours, exact) < 1e-5
    assert all(relative(a, b) > 1e-2 for a, b in zip(found[1][:3], found[1][1:4], strict=True))


def test_dropout_falls_on_what_goes_into_the_adapter_alone():
    ids, model = tokens(), adapted(elastic(), lora_dropout=0.5)
    exact = model(ids).logits
    assert torch.equal(model(ids).logits, exact)
    model.train()
    draws = torch.stack([model(ids).logits for _ in range(2)])
    assert relative(draws[0], draws[1]) > 1e-2
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
    with model.disable_adapter():
        bare = model(ids).logits
    assert relative(model(ids).logits, bare) < 1e-6


def test_heads_and_embeddings_may_be_adapted_and_saved(monkeypatch):
    ids = tokens()
    settings = dict(targets=["lm_head", "q_proj"], modules_to_save=["embed_tokens", "norm"])
    found = []
    for model in (small_model(tie_word_embeddings=False), elastic(tie_word_embeddings=False)):
        model = adapted(model, **settings)
        with torch.no_grad():
            model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(1.5)
            model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(0.5)
        with counted(monkeypatch) as steps, torch.no_grad():
            logits = model(ids).logits
        assert steps == []
        found.append((logits, gradients(model, ids)))
    (exact, theirs), (ours, mine) = found
    assert relative(ours, exact) < 1e-5
    assert_same(mine, theirs)


def test_generation_and_the_stored_adapter_are_those_of_the_stock_model(tmp_path):
    ids, settings = tokens(), dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    model = adapted(elastic())
    stock = adapted(small_model()).generate(input_ids=ids, **settings)
    assert torch.equal(model.generate(input_ids=ids, **settings), stock)
    model.save_pretrained(tmp_path)
    for base in (elastic(), small_model()):
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(again.generate(input_ids=ids, **settings), stock)


def test_adapters_of_another_dtype_than_the_models():
    ids, model = tokens(), adapted(elastic().bfloat16())
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    exact = adapted(small_model().bfloat16())(ids).logits
    assert model(ids).logits.dtype == torch.bfloat16
    assert relative(model(ids).logits.float(), exact.float()) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids).logits.isfinite().all()


def test_an_adapted_model_is_not_packed_stored_or_extracted(tmp_path):
    model = adapted(elastic(), targets=["up_proj"]).base_model.model
    for needs in (
        lambda: flextron.pack(model),
        lambda: flextron.extract(model),
        lambda: flextron.export(model, tmp_path / "exported"),
        lambda: save_elastic(model, tmp_path / "saved"),
    ):
        with pytest.raises(NotImplementedError, match=r"mlp.up_proj, peft.*merge_and_unload"):
            needs()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert relative(model(tokens()).logits, elastic()(tokens()).logits) > 1e-2


# ---- what is not understood ----


class Twice(nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


def replaced(model: Any) -> None:
    layer = model.model.layers[1].mlp
    twice = Twice(72, 40, bias=False)
    twice.weight = layer.up_proj.weight
    layer.up_proj = twice


def quantised(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def offloaded(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")


def own_forward(model: Any) -> None:
    proj = model.model.layers[1].self_attn.v_proj
    proj.forward = lambda x: x


class Odd(torch.Tensor):
    """As torchao's quantised weights are: a tensor of another class in an ordinary linear layer."""


def odd_weight(model: Any) -> None:
    proj = model.model.layers[1].self_attn.k_proj
    proj.weight = nn.Parameter(proj.weight.detach().as_subclass(Odd), requires_grad=False)


def adapted_by(**settings: Any) -> Any:
    return lambda model: adapted(model, **settings)


FOREIGN = {
    "another class": (replaced, r"model.layers.1.mlp.up_proj must be .* got .*Twice"),
    "quantised": (quantised, r"layers.0.self_attn.q_proj .* got torch.ao.nn.quantized.dynamic.*Linear"),
    "offloaded": (offloaded, r"q_proj .* a forward of its own \(accelerate.hooks.AlignDevicesHook\)"),
    "a forward": (own_forward, r"layers.1.self_attn.v_proj .* a forward of its own"),
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m.model.layers[2].mlp.down_proj),
        r"layers.2.mlp.down_proj .* got torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "weight norm": (
        lambda m: nn.utils.weight_norm(m.model.layers[2].mlp.down_proj),
        r"layers.2.mlp.down_proj .* hook in _forward_pre_hooks",
    ),
    "a forward hook": (
        lambda m: m.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None),
        r"layers.0.mlp.gate_proj .* hook in _forward_hooks",
    ),
    "a module too many": (
        lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.Tanh()),
        r"layers.0.mlp must have no modules but its own, .* got model.layers.0.mlp.act_fn, torch.*Tanh",
    ),
    "another attention": (
        lambda m: setattr(m.model.layers[0], "self_attn", nn.Identity()),
        r"layers.0.self_attn must be an ElasticAttention, .* got torch.*Identity",
    ),
    "a kept attention": (
        adapted_by(targets=["up_proj"], modules_to_save=["self_attn"]),
        r"layers.0.self_attn must be an ElasticAttention, .* got peft.*ModulesToSaveWrapper",
    ),
    "DoRA": (
        adapted_by(use_dora=True),
        r"q_proj .* got peft.*DoraLinearVariant of adapter 'default'; merge it first, by merge_and_unload\(\)",
    ),
    "another forward": (
        lambda m: setattr(m.model.layers[1].mlp, "forward", lambda x: x),
        r"layers.1.mlp must run the forward of its class, flextron.*ElasticMLP, which .* got .*<lambda>",
    ),
    "a quantised weight": (odd_weight, r"layers.1.self_attn.k_proj .* with a weight that is a .*Odd"),
    "mixed adapters": (
        lambda m: (
            adapted(m)
            .base_model.model.model.layers[0]
            .self_attn.q_proj.register_forward_pre_hook(lambda *_: None)
        ),
        r"q_proj .* hook in _forward_pre_hooks",
    ),
    "LoRA with a hook": (
        lambda m: (
            adapted(m)
            .base_model.model.model.layers[0]
            .self_attn.q_proj.lora_A["default"]
            .register_forward_hook(lambda *_: None)
        ),
        r"q_proj .* hook in _forward_hooks",
    ),
    "another tuner": (
        lambda m: get_peft_model(
            m, __import__("peft").IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        ),
        r"k_proj .* got peft.tuners.ia3",
    ),
}


def test_a_backward_hook_is_refused_where_there_is_a_backward_pass(monkeypatch):
    model, ids = elastic(), tokens()
    model.model.layers[0].self_attn.o_proj.register_full_backward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"layers.0.self_attn.o_proj .* hook in _backward_hooks"):
        model(ids)
    with counted(monkeypatch) as steps, torch.no_grad():
        model(ids)
    assert steps == [12]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", FOREIGN)
def test_what_replaces_a_projection_is_refused_whether_or_not_a_forward_came_before(what):
    change, message = FOREIGN[what]
    ids = tokens()
    for before in (False, True):
        model = elastic()
        if before:
            with torch.no_grad():
                model(ids)
        change(model)
        with pytest.raises(NotImplementedError, match=f"^flextron: .*{message}") as refusal, torch.no_grad():
            model(ids)
        assert "\n" not in str(refusal.value)
        with pytest.raises(NotImplementedError, match=message):
            model(ids)
        with pytest.raises(NotImplementedError, match=message):
            model.generate(ids, max_new_tokens=2, pad_token_id=0)


def test_what_is_not_understood_and_is_called_runs(monkeypatch):
    """Norms, embeddings, heads and whole layers are called: whatever they are, the modules run, and not the one op."""
    ids = tokens()

    class Norm(type(elastic().model.norm)):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    class Embedding(nn.Embedding):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    def replace(model: Any, path: str, new: Any) -> None:
        parent, _, name = path.rpartition(".")
        new.weight = model.get_submodule(path).weight
        setattr(model.get_submodule(parent), name, new)

    for path, new in (
        ("model.layers.1.input_layernorm", Norm(72)),
        ("model.norm", Norm(72)),
        ("model.layers.0.self_attn.q_norm", Norm(16)),
        ("lm_head", Twice(72, 61, bias=False)),
        ("model.embed_tokens", Embedding(61, 72)),
    ):
        model, stock = elastic("qwen3"), small_model("qwen3")
        with torch.no_grad():
            model(ids)
            for each in (model, stock):
                replace(each, path, copy.deepcopy(new))
            with counted(monkeypatch) as steps:
                assert relative(model(ids).logits, stock(ids).logits) < 1e-5, path
            assert steps == []


def test_hooks_of_accelerate_that_only_move_inputs_are_let_be():
    from accelerate import dispatch_model

    model, ids = elastic(), tokens()
    exact = model(ids).logits
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "cpu" for i in range(3)}
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    with torch.no_grad():
        assert relative(model(ids).logits, exact) < 1e-5


def test_a_disabled_adapter_is_unmerged_before_a_layer_reads_its_weight():
    model, x = adapted(elastic()), torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(1))
    mlp = model.base_model.model.model.layers[0].mlp
    exact = elastic().model.layers[0].mlp(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert relative(mlp(x), exact) < 1e-5


def test_an_activation_that_the_configuration_does_not_name_is_refused():
    model = small_model()
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    with pytest.raises(NotImplementedError, match=r"model.layers.1.mlp.act_fn must be .*silu.*, got .*Tanh"):
        flextron.make_elastic(model)


def scaled(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def subclassed(module: Any) -> None:
    module.__class__ = type("Own", (type(module),), {"__module__": "own"})


@pytest.mark.parametrize("place", ["self_attn", "mlp", "mlp.act_fn"])
@pytest.mark.parametrize(
    ("accident", "message"),
    [
        (lambda m: m.register_forward_hook(lambda _, args, out: 2 * out), "a hook in _forward_hooks"),
        (lambda m: m.register_forward_pre_hook(lambda _, args: None), "a hook in _forward_pre_hooks"),
        (scaled, "a forward of its own"),
        (subclassed, "own.Own"),
    ],
)
def test_a_part_that_does_more_than_what_takes_its_place_is_refused(place, accident, message):
    model = small_model()
    accident(model.model.layers[1].get_submodule(place))
    with pytest.raises(NotImplementedError, match=rf"make_elastic: .*model\.layers\.1.* got .*{message}"):
        flextron.make_elastic(model)
    assert not hasattr(model, "elastic") and type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_what_only_writes_hidden_states_and_attention_down_stays_and_is_no_hindrance():
    model, ids = small_model(), tokens()
    model.set_attn_implementation("eager")
    exact = model(ids, output_attentions=True, output_hidden_states=True).logits
    assert any(module._forward_hooks for module in model.modules())
    assert relative(flextron.make_elastic(model)(ids).logits, exact) < 1e-5
