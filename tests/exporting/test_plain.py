"""An extracted sub-network computes what the elastic model does at its widths, and is a model of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.models import EVERY, FAMILIES, GQA, VARIANTS, row_model, small_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, dynamic_module_utils

from flextron.artefacts.directory import load_elastic
from flextron.checkpoint import CheckpointError, stored_dtypes
from flextron.cli.printing import rounding
from flextron.config import ElasticConfig, Widths
from flextron.conversion import ParityError, convert
from flextron.exporting import export, extract, load_plain, stock_problem
from flextron.exporting import plain as written
from flextron.exporting.remote_code import remote_code, remote_problem
from flextron.nn import ElasticCache, elastic_config, make_elastic
from flextron.nn.anatomy import anatomy_of, has_one_head_size
from flextron.nn.plain import build

EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
UNITS = ("kv_group", "query")
every_model = pytest.mark.parametrize("gqa", GQA)
every_unit = pytest.mark.parametrize("unit", UNITS)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers copies the code of models to, instead of the user's cache."""
    path = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(path))
    return path


def elastic(family: str = "llama", gqa: str = "2:1", unit: str = "kv_group", **overrides: Any) -> Any:
    """Elastic, with every bias that the family has."""
    if family in ("llama", "qwen3"):
        overrides = {"attention_bias": True} | overrides
    if family == "llama":
        overrides = {"mlp_bias": True} | overrides
    model = small_model(family, gqa, **overrides)
    return make_elastic(model, elastic_config(model, unit))


def tokens(B: int = 2, T: int = 12) -> Tensor:
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(1))


def mixed(config: ElasticConfig) -> Widths:
    """Widths that differ between layers on every axis with a choice."""
    layers = range(config.num_layers)
    mlp = [config.mlp_choices[(i + 1) % len(config.mlp_choices)] for i in layers]
    heads = [config.head_choices[(i + 1) % len(config.head_choices)] for i in layers]
    return Widths(tuple(mlp), tuple(heads))


def some_widths(config: ElasticConfig) -> list[Widths]:
    return [config.full(), config.smallest(), config.uniform(1, 0), mixed(config)]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


@every_unit
@every_model
@every_family
@torch.no_grad()
def test_logits_and_parameters(family: str, gqa: str, unit: str) -> None:
    model = elastic(family, gqa, unit)
    for widths in some_widths(model.elastic):
        model.set_widths(widths)
        plain = extract(model)
        assert close(plain(tokens()).logits, model(tokens()).logits)
        assert sum(p.numel() for p in plain.parameters()) == model.elastic.params(widths)
        assert type(plain) is type(small_model(family))
    assert not close(extract(model, model.elastic.smallest())(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("tied", [True, False])
@every_unit
@every_model
def test_gradients_are_those_of_the_kept_part(gqa: str, unit: str, tied: bool) -> None:
    """Also with a padding mask; and what was not kept gets exactly nothing."""
    model = elastic("qwen3", gqa, unit, tie_word_embeddings=tied)
    widths = mixed(model.elastic)
    plain = extract(model, widths)
    model.set_widths(widths)
    x, mask = tokens(), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    for m in (model, plain):
        logits = m(x, attention_mask=mask).logits
        torch.nn.functional.cross_entropy(logits[mask.bool()], x[mask.bool()]).backward()
    # the gradient seen as a model of its own, and cut as the weights were
    with torch.no_grad():
        seen = sum(p.grad.abs().sum().item() for p in model.parameters())
        for p in model.parameters():
            p.copy_(p.grad)
        cut = dict(extract(model, widths).named_parameters())
    for name, p in plain.named_parameters():
        assert close(cut[name], p.grad), name
    kept = sum(p.abs().sum().item() for p in cut.values())
    assert kept == pytest.approx(seen, rel=1e-5)


@every_unit
@every_model
@every_family
@torch.no_grad()
def test_cached_decoding(family: str, gqa: str, unit: str) -> None:
    """Prefill, one token, several at once: the logits are those of the full pass and of the elastic model."""
    model = elastic(family, gqa, unit)
    x = tokens(2, 10)
    for widths in (mixed(model.elastic), model.elastic.smallest()):
        model.set_widths(widths)
        plain = extract(model)
        ours, theirs, whole = ElasticCache(), DynamicCache(), plain(x).logits
        for start, end in ((0, 6), (6, 7), (7, 10)):
            a = model(x[:, start:end], cache=ours).logits
            b = plain(x[:, start:end], cache=theirs).logits
            assert close(b, whole[:, start:end]) and close(a, b)


@every_unit
def test_generation(unit: str) -> None:
    model = elastic("llama", "3:1", unit)
    for widths in some_widths(model.elastic):
        model.set_widths(widths)
        plain = extract(model)
        texts = [
            m.generate(tokens(2, 4), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
            for m in (model, plain)
        ]
        assert texts[0].shape == (2, 12) and torch.equal(*texts)


@torch.no_grad()
def test_what_is_extracted_has_memory_of_its_own() -> None:
    model = elastic(tie_word_embeddings=True)
    plain = extract(model, model.elastic.full())
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert ours.isdisjoint(p.untyped_storage().data_ptr() for p in plain.parameters())
    before = plain(tokens()).logits
    for p in model.parameters():
        p.zero_()
    assert torch.equal(plain(tokens()).logits, before)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    small = extract(model, model.elastic.smallest())
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in small.parameters())


def test_extracting_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = elastic()
    model.set_widths(mixed(model.elastic))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    extract(model, model.elastic.smallest())
    extract(model, 1.0)
    assert model.widths == mixed(model.elastic) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == "flextron"


def test_budgets_are_those_of_the_dial() -> None:
    model = elastic()
    model.set_widths(model.elastic.smallest())
    assert sum(p.numel() for p in extract(model, 1.0).parameters()) == model.elastic.params(
        model.elastic.full()
    )

    class Planner:
        def at(self, *_: Any) -> Any:
            return self

        def resolve(self, **budget: Any) -> Widths:
            assert budget["phase"] in ("prefill", "decode")
            assert len(budget.keys() & {"fraction", "params", "latency_ms"}) == 1
            return model.elastic.uniform(0, 1)

    model.planner = Planner()
    for given in (((0.5,), {}), ((), {"params": 9000}), ((), {"latency_ms": 3.0, "phase": "decode"})):
        plain = extract(model, *given[0], **given[1])
        assert sum(p.numel() for p in plain.parameters()) == model.elastic.params(model.elastic.uniform(0, 1))
    assert model.widths == model.elastic.smallest()
    with pytest.raises(ValueError, match="exactly one budget"):
        extract(model, 0.5, params=9000)
    with pytest.raises(ValueError, match=r"widths: mlp\[0\] must be one of"):
        extract(model, Widths((7, 10, 10), (1, 1, 1)))
    with pytest.raises(TypeError, match="extract: model must be elastic, got LlamaForCausalLM"):
        extract(small_model(), 1.0)


def test_widths_of_several_requests_are_no_network() -> None:
    model = elastic()
    model.set_widths([model.elastic.smallest(), model.elastic.full()])
    with pytest.raises(
        ValueError, match="budget must be given where requests or tokens have widths of their own"
    ):
        extract(model)
    with pytest.raises(
        ValueError, match="budget must be one static network, got one for each request or token"
    ):
        extract(model, [1.0, 1.0])
    assert extract(model, 1.0).num_parameters() == model.elastic.params(model.elastic.full())


def test_low_precision_stays() -> None:
    model = small_model().bfloat16()
    make_elastic(model)
    plain = extract(model, model.elastic.smallest())
    assert all(p.dtype == torch.bfloat16 for p in plain.parameters())
    # the rotary table is computed in float32, whatever the weights are
    assert plain.model.rotary_emb.inv_freq.dtype == torch.float32


@every_unit
@every_model
@every_family
@torch.no_grad()
def test_uniform_widths_load_in_stock_transformers(tmp_path: Path, family: str, gqa: str, unit: str) -> None:
    model = elastic(family, gqa, unit)
    widths = model.elastic.uniform(0, 0)
    report = export(model, tmp_path, widths)
    assert report["layout"] == "uniform" and "note" not in report and "transformers" in report["loads_in"]
    model.set_widths(widths)
    for plain in (AutoModelForCausalLM.from_pretrained(tmp_path), load_plain(tmp_path)):
        assert close(plain(tokens()).logits, model(tokens()).logits)
        assert sum(p.numel() for p in plain.parameters()) == model.elastic.params(widths) == report["params"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["intermediate_size"] == widths.mlp[0] and config["head_dim"] == 16
    H, G = GQA[gqa]
    heads = (H // G, 1) if unit == "kv_group" else (G, G)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == heads
    assert "flextron" not in config


@every_unit
@every_model
@every_family
@torch.no_grad()
def test_padded_widths_load_in_stock_transformers(tmp_path: Path, family: str, gqa: str, unit: str) -> None:
    """The same logits, cached decoding too, in the size of the widest layer; zeros are what was added."""
    model = elastic(family, gqa, unit)
    c = model.elastic
    small = c.head_choices[0]
    widths = Widths(
        (c.mlp_choices[0], c.mlp_choices[1], c.mlp_choices[0]), (small, c.head_choices[-1], small)
    )
    report = export(model, tmp_path, widths)
    assert report["layout"] == "padded" and "layers differ in mlp" in report["note"]
    model.set_widths(widths)
    widest = Widths((max(widths.mlp),) * 3, (max(widths.heads),) * 3)
    for plain in (AutoModelForCausalLM.from_pretrained(tmp_path), load_plain(tmp_path)):
        assert close(plain(tokens()).logits, model(tokens()).logits)
        assert sum(p.numel() for p in plain.parameters()) == c.params(widest) == report["params"]
    assert (plain.model.layers[0].mlp.up_proj.weight[widths.mlp[0] :] == 0).all()
    cache = DynamicCache()
    steps = [plain(part, cache=cache).logits for part in tokens().split(4, dim=1)]
    assert close(torch.cat(steps, 1), model(tokens()).logits)


@every_unit
@every_model
@every_family
@torch.no_grad()
def test_ragged_widths_load_with_their_code_and_fail_loudly_without(
    tmp_path: Path, modules: Path, family: str, gqa: str, unit: str
) -> None:
    model = elastic(family, gqa, unit)
    c = model.elastic
    widths = Widths((c.mlp_choices[0], c.mlp_choices[1], c.mlp_choices[0]), mixed(c).heads)
    report = export(model, tmp_path, widths, layout="ragged")
    assert report["loads_in"] == ["transformers, trust_remote_code=True", "flextron.load_plain"]
    assert "needs trust_remote_code=True" in report["note"]
    model.set_widths(widths)
    plain, stock = (
        load_plain(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
    )
    assert close(plain(tokens()).logits, model(tokens()).logits)
    assert torch.equal(stock(tokens()).logits, plain(tokens()).logits)
    assert type(stock).__module__.startswith("transformers_modules.")
    for one in (plain, stock):
        assert sum(p.numel() for p in one.parameters()) == c.params(widths) == report["params"]
    cache = DynamicCache(config=stock.config)
    steps = [stock(part, cache=cache).logits for part in tokens().split(4, dim=1)]
    assert close(torch.cat(steps, 1), model(tokens()).logits)
    with pytest.raises(RuntimeError, match=r"per-layer|mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_skipped_parts_are_left_out_by_the_code_of_a_ragged_export(tmp_path: Path, modules: Path) -> None:
    model = small_model("qwen3", attention_bias=True)
    make_elastic(model, elastic_config(model, "kv_group", (0, 20, 40), (0, 2, 4)))
    model.set_widths(Widths((20, 0, 40), (0, 2, 0)))
    export(model, tmp_path, layout="ragged")
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(stock(tokens()).logits, load_plain(tmp_path)(tokens()).logits)
    assert not [*stock.model.layers[0].self_attn.parameters()] and not [
        *stock.model.layers[1].mlp.parameters()
    ]
    texts = [
        m.generate(tokens(2, 4), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        for m in (model, stock)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("row", [*EVERY, *VARIANTS])
@torch.no_grad()
def test_layers_of_every_family_are_built_from_a_configuration_each(row: str) -> None:
    """Of all families but OPT, whose layers lie deeper; where the head size is a quotient, at all heads or none."""
    model = row_model(row)
    c = elastic_config(model)
    skips = not (model.config.model_type in EXPERTS or anatomy_of(model.config).stream_norms)
    mlp, heads = ((0,) * skips + menu for menu in ((20, 40), (c.max_heads,)))
    if not has_one_head_size(c):
        heads = (*heads[:-1], 1, heads[-1])
    make_elastic(model, elastic_config(model, "kv_group", mlp, heads))
    widths = Widths((mlp[-1], mlp[0], mlp[-2]), (heads[0], heads[-1], heads[-2:][0] or heads[-1]))
    if row.startswith("opt"):
        assert "lie deeper than its base model" in remote_problem(model, widths)
        return
    assert remote_problem(model, widths) is None
    plain = extract(model, widths, layout="ragged")
    code, own = remote_code(model, plain, widths)
    names: dict[str, Any] = {"__name__": "modeling"}
    exec(code, names)
    config, causal = (own["auto_map"][name].split(".")[1] for name in ("AutoConfig", "AutoModelForCausalLM"))
    values = {k: v for k, v in plain.config.to_dict().items() if k != "flextron"}
    described = names[config].from_dict(values | own)
    described._experts_implementation = (
        "eager"  # as the extracted one's: transformers' others add up in another order
    )
    built = names[causal](described).eval()
    result = built.load_state_dict(plain.state_dict(), strict=False)
    assert not result.missing_keys
    torch.testing.assert_close(built(tokens()).logits, plain(tokens()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("uniform", [True, False])
@torch.no_grad()
def test_save_pretrained_of_an_extracted_model(tmp_path: Path, uniform: bool) -> None:
    """transformers' own way of saving it works too."""
    model = elastic()
    model.set_widths(model.elastic.uniform(0, 1) if uniform else mixed(model.elastic))
    extract(model).save_pretrained(tmp_path)
    assert close(load_plain(tmp_path)(tokens()).logits, model(tokens()).logits)
    if uniform:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert close(stock(tokens()).logits, model(tokens()).logits)
    else:
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_llama_whose_heads_do_not_divide_its_size(tmp_path: Path) -> None:
    """Llama's configuration refuses 6 heads at hidden size 64, though the model could be; padding finds 8."""
    model = elastic("llama", "2:1", hidden_size=64)
    widths = model.elastic.uniform(0, 2)
    assert "query heads of a llama must divide hidden_size 64, got 6" in stock_problem(model.elastic, widths)
    assert stock_problem(model.elastic, model.elastic.uniform(0, 1)) is None
    with pytest.raises(ValueError, match=r"must be padded .* or ragged, got uniform: the query heads"):
        export(model, tmp_path, widths, layout="uniform")
    model.set_widths(widths)
    assert export(model, tmp_path / "padded")["layout"] == "padded"
    export(model, tmp_path / "ragged", layout="ragged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert stock.config.num_attention_heads == 8
    for plain in (stock, load_plain(tmp_path / "padded"), load_plain(tmp_path / "ragged"), extract(model)):
        assert close(plain(tokens()).logits, model(tokens()).logits)
    assert sum(p.numel() for p in extract(model).parameters()) == model.elastic.params(widths)
    other = elastic("mistral", "2:1", hidden_size=64)
    assert stock_problem(other.elastic, other.elastic.uniform(0, 2)) is None


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("zip", "layout must be one of auto, uniform, padded, ragged, got 'zip'"),
        (
            "uniform",
            r"must be padded \(for stock transformers\) or ragged, got uniform: layers differ in mlp",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused(tmp_path: Path, layout: str, message: str) -> None:
    model = elastic()
    model.set_widths(mixed(model.elastic))
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", layout=layout)
    with pytest.raises(ValueError, match=message):
        extract(model, layout=layout)
    assert not (tmp_path / "out").exists()


def test_layouts_can_be_asked_for() -> None:
    model = elastic()
    smallest = model.elastic.smallest()
    for layout in ("uniform", "ragged", "padded", "auto"):
        plain = extract(model, smallest, layout=layout)
        assert close(plain(tokens()).logits, extract(model, smallest)(tokens()).logits)
        assert hasattr(plain.config, "flextron") == (layout == "ragged")


def test_an_elastic_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "flextron.json").write_text("{}")
    with pytest.raises(ValueError, match="directory must not be an elastic checkpoint"):
        export(elastic(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["flextron.json"]


def test_generation_settings_and_tokenizer_go_along(tmp_path: Path) -> None:
    model = elastic()
    model.generation_config.eos_token_id = 7

    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("{}")

    export(model, tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").exists()
    assert load_plain(tmp_path).generation_config.eos_token_id == 7


def loaded(directory: Path, dtype: torch.dtype) -> Any:
    """An elastic model of a checkpoint whose matrices are bfloat16, whose norms float32."""
    parent = small_model()
    for p in parent.parameters():
        p.data = p.data if p.dim() < 2 else p.data.bfloat16()
    calibration = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(3))
    convert(parent, directory, calibration=calibration)
    return load_elastic(directory, dtype)[0]


@pytest.mark.parametrize("layout", ["uniform", "padded", "ragged"])
@torch.no_grad()
def test_an_export_is_in_the_dtypes_of_its_checkpoint(tmp_path: Path, layout: str) -> None:
    model = loaded(tmp_path / "elastic", torch.float32)
    widths = model.elastic.uniform(0, 1) if layout == "uniform" else mixed(model.elastic)
    report = export(model, tmp_path / "small", widths, layout=layout)
    assert report["dtypes"] == {"bfloat16": 22, "float32": 7}
    whole, small = (tmp_path / d / "model.safetensors" for d in ("elastic", "small"))
    assert small.stat().st_size <= whole.stat().st_size  # a padded one has the widest layers' size
    kinds = stored_dtypes(small)
    assert all(kinds[name] == kind for name, kind in stored_dtypes(whole).items())
    parity = report["parity"]
    assert parity["dtype"] == "float32" and parity["max_rel"] <= 2e-5 and parity["rounding"]["max_rel"] == 0
    assert parity["tokens"] == 128 and json.loads((tmp_path / "small" / "export.json").read_text()) == report
    with model.budget(widths=widths):
        expected = model(tokens()).logits
    assert close(load_plain(tmp_path / "small")(tokens()).logits, expected)
    if layout != "ragged":
        assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "small")(tokens()).logits, expected)


@torch.no_grad()
def test_rounding_that_was_asked_for_is_in_the_certificate(tmp_path: Path) -> None:
    model = elastic()
    widths = mixed(model.elastic)
    exact = export(model, tmp_path / "exact", widths)
    assert exact["dtypes"] == {"float32": 29 + 21} and exact["parity"]["max_rel"] <= 2e-5  # 7 biases a layer
    report = export(model, tmp_path / "rounded", widths, dtype="bfloat16")
    assert set(report["dtypes"]) == {"bfloat16"} and report["parity"]["dtype"] == "bfloat16"
    assert report["parity"]["max_rel"] > 1e-4
    assert report["parity"]["rounding"]["max_rel"] == pytest.approx(report["parity"]["max_rel"], rel=1e-2)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded")
    assert stock.dtype == torch.bfloat16
    x = torch.randint(61, (2, 64), generator=torch.Generator().manual_seed(0))
    with model.budget(widths=widths):
        apart = (stock.float()(x).logits - model(x).logits).abs().max()
    assert apart.item() == pytest.approx(report["parity"]["max_abs"], rel=1e-3)
    with pytest.raises(
        ValueError, match="export: dtype must be one of auto, float32, bfloat16, float16, got 'int4'"
    ):
        export(model, tmp_path / "out", widths, dtype="int4")
    assert not (tmp_path / "out").exists()


def test_memory_that_holds_less_than_the_file_did_is_not_stored_as_more(tmp_path: Path) -> None:
    model = loaded(tmp_path / "elastic", torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = export(model, tmp_path / "small", model.elastic.smallest())
    assert report["dtypes"] == {"bfloat16": 29} and report["parity"]["max_rel"] <= 2e-5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def wrong_weights(plain: Any) -> None:
    plain.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1


def wrong_settings(plain: Any) -> None:
    plain.config.rms_norm_eps = 0.5


@pytest.mark.parametrize("layout", ["uniform", "padded", "ragged"])
@pytest.mark.parametrize("fault", [wrong_weights, wrong_settings])
def test_an_export_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, layout: str
) -> None:
    def planted(*args: Any) -> Any:
        model = build(*args)
        fault(model)
        return model

    model = elastic()
    monkeypatch.setattr(written, "build", planted)
    with pytest.raises(
        ParityError, match=r"export: logits must stay within 0\.0001 of the elastic model's at the budget"
    ):
        export(model, tmp_path / "out", model.elastic.smallest(), layout=layout)
    assert not (tmp_path / "out").exists()


def badly_conditioned() -> Any:
    """Attention so sharp that float32's rounding alone takes logits 1.7e-4 of the largest apart."""
    model = elastic()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 30
    return model


def test_rounding_that_the_network_amplifies_is_told_from_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = badly_conditioned()
    widths = mixed(model.elastic)
    report = export(model, tmp_path / "out", widths)["parity"]
    assert report["max_rel"] > 1e-4 and report["float64"] <= 1e-9
    assert rounding(report).endswith(" in float64: the network amplifies rounding")

    def planted(*args: Any) -> Any:
        plain = build(*args)
        plain.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-4
        return plain

    with monkeypatch.context() as patch, pytest.raises(ParityError, match="got"):
        patch.setattr(written, "build", planted)
        export(model, tmp_path / "wrong", widths)

    def wrong_in_float32(_: Any, __: Any, out: Any) -> None:
        if out.logits.dtype == torch.float32:
            out.logits = out.logits + 1e-3 * torch.ones(61).index_fill(0, torch.arange(0, 61, 2), -1)

    model.register_forward_hook(wrong_in_float32)
    with pytest.raises(ParityError, match="got"):
        export(model, tmp_path / "wrong", widths)
    assert not (tmp_path / "wrong").exists()


def test_damaged_exports_are_refused(tmp_path: Path) -> None:
    model = elastic()
    model.set_widths(mixed(model.elastic))
    export(model, tmp_path, layout="ragged")
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, values = weights.read_bytes(), json.loads(config.read_text())

    def refused() -> str:
        with pytest.raises(CheckpointError) as error:
            load_plain(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "model.safetensors: sha256" in refused()
    torch.save({}, weights)
    assert "pickled" in refused()
    weights.write_bytes(good)
    load_plain(tmp_path)
    config.write_text(json.dumps(values | {"rope_theta": 5.0}))
    assert "config.json: sha256" in refused()

    (tmp_path / "export.json").unlink()  # without checksums, sizes and names are still checked
    layers = values["flextron"]["layers"]
    smaller = [layer | {"intermediate_size": 10} for layer in layers]
    for own, words in (
        ({"layers": smaller}, "wrong shape model.layers."),
        ({"layers": layers[:2]}, "must size 3 layers, got 2"),
        ({"layers": [{}] * 3}, "flextron.layers[0] must give intermediate_size"),
        ([], "flextron must be an object, got []"),
        ({"layers": 3}, "flextron.layers must be a list, got 3"),
        (
            {"layers": [layers[0] | {"num_key_value_heads": "2"}, *layers[1:]]},
            "must be a whole number, got '2'",
        ),
        ({"layers": [layers[0] | {"num_key_value_heads": 10**12}, *layers[1:]]}, "that fit the weights"),
    ):
        config.write_text(json.dumps(values | {"flextron": own}))
        assert words in refused()
    config.write_text(json.dumps(values | {"model_type": "flextron"}))
    assert "model_type must be known to transformers, got 'flextron'" in refused()
    config.unlink()
    assert "config.json: must be a file" in refused()
