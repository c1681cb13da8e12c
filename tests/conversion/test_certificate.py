"""The certificate is about what lies on the disk; a parent that is not whole never gets one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.models import FAMILIES, small_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flextron.artefacts import elastic_model
from flextron.artefacts.directory import load_elastic
from flextron.checkpoint import read_json, stored_dtypes
from flextron.checkpoint.io import Pending
from flextron.conversion import ParityError, convert, elastify
from flextron.conversion.parent import copy_parent
from flextron.nn import ElasticMLP, elastic_config
from flextron.nn.forward import ElasticForward
from flextron.nn.proof import difference, require_close

Tensors = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


def calibration() -> Tensor:
    return torch.randint(0, 61, (8, 16), generator=torch.Generator().manual_seed(3))


def edited(
    directory: Path, edit: Callable[[Tensors], Tensors], config: dict[str, Any], **overrides: Any
) -> Path:
    """A parent's directory after an accident to its weights or its configuration."""
    small_model(**overrides).save_pretrained(directory)
    weights = directory / "model.safetensors"
    save_file({k: v.clone() for k, v in edit(load_file(weights)).items()}, weights, {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


def as_is(tensors: Tensors) -> Tensors:
    return tensors


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(k): v for k, v in tensors.items()}


def quantised(tensors: Tensors) -> Tensors:
    """A layout that transformers knows nothing of, under a configuration that says nothing of it."""
    return without(UP)(tensors) | {
        UP.replace("weight", "qweight"): torch.zeros(40, 9, dtype=torch.int32),
        UP.replace("weight", "scales"): torch.zeros(40, 1),
    }


def halves(tensors: Tensors) -> Tensors:
    """Matrices in bfloat16, vectors in float32: what a trainer that keeps its norms leaves."""
    return {k: v if v.dim() < 2 else v.bfloat16() for k, v in tensors.items()}


UNTIED = {"tie_word_embeddings": False}
REFUSED = {
    "no head": (without("lm_head.weight"), {}, UNTIED, r"got missing lm_head\.weight \(if .* must be true\)"),
    "says untied, no head": (as_is, UNTIED, {}, r"got missing lm_head\.weight \(if"),
    "compiled": (
        renamed(lambda k: f"_orig_mod.{k}"),
        {},
        {},
        r"missing lm_head.* and \d+ more; unexpected _orig_mod\..*; --strip-prefix _orig_mod\. \(strip_prefix='",
    ),
    "wrapped": (renamed(lambda k: f"module.{k}"), {}, UNTIED, r"unexpected module\..*; --strip-prefix module\. \("),
    "a hole": (without(UP), {}, {}, r"got missing model\.layers\.1\.mlp\.up_proj\.weight$"),
    "one misnamed": (renamed(lambda k: k.replace("1.mlp.up_proj", "1.mlp.w3")), {}, {}, r"w3\.weight$"),
    "quantised": (quantised, {}, {}, r"missing \S+1\.mlp\.up_proj\.weight; unexpected \S+qweight, \S+scales$"),
    "adapters": (lambda t: t | {f"{UP[:-7]}.lora_A.weight": torch.ones(4, 72)}, {}, {}, r"unexpected .*lora_A"),
    "resized": (
        lambda t: t | {"model.embed_tokens.weight": torch.randn(64, 72)},
        {},
        {},
        r"wrong shape model\.embed_tokens\.weight \[64, 72\] instead of \[61, 72\]$",
    ),
    "another head, tied": (lambda t: t | {"lm_head.weight": torch.randn(64, 72)}, {}, {}, r"an lm_head of one shape, "),
    "another depth": (lambda t: t | {UP.replace("1", "3"): t[UP]}, {}, {}, r"got unexpected model\.layers\.3\.\S+$"),
    "integers": (lambda t: t | {UP: t[UP].to(torch.int8)}, {}, {}, r"weights, got I8 in .*; dequantise it first"),
    "float8": (lambda t: t | {UP: t[UP].to(torch.float8_e4m3fn)}, {}, {}, r"weights, got F8_E4M3 in "),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", REFUSED)
def test_a_parent_that_is_not_whole_is_refused_by_name(
    tmp_path: Path, family: str, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    edit, config, overrides, message = REFUSED[fault]
    parent = edited(tmp_path / "parent", edit, config, family=family, **overrides)
    capfd.readouterr()
    with pytest.raises(ValueError, match=message) as error:
        convert(parent, tmp_path / "out", calibration=calibration())
    assert "\n" not in str(error.value) and str(error.value).startswith("convert: ")
    assert not (tmp_path / "out").exists()
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""  # transformers' own table says the same in thirty lines


def test_a_hole_in_the_index_of_shards_is_refused(tmp_path: Path) -> None:
    """The shard of some layers is in no entry: transformers draws them at random."""
    parent = tmp_path / "parent"
    small_model().save_pretrained(parent, max_shard_size="20KB")
    path = parent / "model.safetensors.index.json"
    index = read_json(path)
    convert(parent, tmp_path / "whole", calibration=calibration())
    shard = index["weight_map"][UP]
    whole, index["weight_map"] = (
        index["weight_map"],
        {k: v for k, v in index["weight_map"].items() if v != shard},
    )
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"parent must hold .*, got missing model\.layers\.1\.mlp"):
        convert(parent, tmp_path / "out", calibration=calibration())
    path.write_text(json.dumps({"weight_map": list(whole)}))
    with pytest.raises(ValueError, match="weight_map must name the file of each tensor"):
        convert(parent, tmp_path / "out", calibration=calibration())
    path.unlink()
    with pytest.raises(
        ValueError, match=r"must hold its weights as model\.safetensors or in shards, got neither"
    ):
        convert(parent, tmp_path / "out", calibration=calibration())
    assert not (tmp_path / "out").exists()


def test_a_loaded_parent_must_be_what_its_configuration_says(tmp_path: Path) -> None:
    for accident, message in (
        (lambda m: setattr(m.model.layers[1].mlp, "extra", torch.nn.Linear(2, 2)), r"others: .*mlp\.extra"),
        (lambda m: m.model.layers.append(m.model.layers[0]), "model.layers.3"),
        (lambda m: setattr(m.model, "embed_tokens", torch.nn.Embedding(64, 72)), "model.embed_tokens.weight"),
        (lambda m: setattr(m.lm_head, "weight", None), "lm_head"),
    ):
        parent = small_model(tie_word_embeddings=False)
        accident(parent)
        with pytest.raises(ValueError, match=message):
            convert(parent, tmp_path / "out", calibration=calibration())
    with pytest.raises(ValueError, match="strip_prefix must be None when parent is a loaded model"):
        convert(small_model(), tmp_path / "out", calibration=calibration(), strip_prefix="module.")
    assert not (tmp_path / "out").exists()


def negative(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(**given: Any) -> Any:
        found = forward(**given)
        found.logits = -found.logits
        return found

    return run


ODD: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda m: m.model.layers[1].mlp.register_forward_hook(lambda _, args, out: 1.5 * out),
    "a forward": lambda m: setattr(m, "forward", negative(m.forward)),
    "a module": lambda m: setattr(m.model.layers[1].mlp, "act_fn", torch.nn.ReLU()),
    "an attribute": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 1.0),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
    "a configuration changed": lambda m: setattr(m.config, "rms_norm_eps", 0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ODD)
def test_a_loaded_parent_that_computes_something_else_is_refused(
    tmp_path: Path, what: str, dtype: torch.dtype
) -> None:
    """What is stored is its configuration and parameters; a certificate of those would not be about the parent."""
    parent = small_model().to(dtype).train()
    ODD[what](parent)
    with pytest.raises(
        ParityError, match=r"logits must stay within 0\.0001 of the parent's own, with .* hooks"
    ):
        convert(parent, tmp_path / "out", calibration=calibration())
    assert not (tmp_path / "out").exists() and parent.training


@torch.no_grad()
def exact(model: Any) -> Tensor:
    """Logits of a model's very values, in float32 arithmetic."""
    return model.float()(calibration()).logits


def apart(parent: Tensor, directory: Path) -> float:
    """How far the model on the disk is from a parent: as stock transformers loads it, and as we do."""
    stock, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    elastic, _ = load_elastic(directory)
    return max(difference(parent, exact(model))["max_rel"] for model in (stock, elastic))


WHOLE = {
    "float32": (as_is, {}, {}, {"float32": 29}, "float32"),
    "configuration says bfloat16": (as_is, {"dtype": "bfloat16"}, {}, {"float32": 29}, "float32"),
    "configuration says nothing": (as_is, {"dtype": None}, {}, {"float32": 29}, "float32"),
    "bfloat16": (lambda t: {k: v.bfloat16() for k, v in t.items()}, {}, {}, {"bfloat16": 29}, "bfloat16"),
    "float16": (lambda t: {k: v.half() for k, v in t.items()}, {"dtype": "float16"}, {}, {"float16": 29}, "float16"),
    "float64": (lambda t: {k: v.double() for k, v in t.items()}, {}, {}, {"float64": 29}, "float64"),
    "float32 norms": (halves, {"dtype": "bfloat16"}, {}, {"bfloat16": 22, "float32": 7}, "float32"),
    "old rotary buffers": (
        lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)},
        {}, {}, {"float32": 29}, "float32",
    ),
    "only the head is stored": (
        renamed(lambda k: "lm_head.weight" if "embed" in k else k), {}, {}, {"float32": 29}, "float32",
    ),
    "says tied, stores another head": (
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].roll(1, 0)}, {}, {}, {"float32": 30}, "float32",
    ),
    "says tied, stores its head twice": (
        lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, {}, {}, {"float32": 29}, "float32",
    ),
    "names without model.": (renamed(lambda k: k.removeprefix("model.")), {}, {}, {"float32": 29}, "float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_what_is_on_the_disk_is_the_parent_in_its_own_dtypes(tmp_path: Path, what: str) -> None:
    edit, config, overrides, dtypes, loads_as = WHOLE[what]
    parent = edited(tmp_path / "parent", edit, config, **overrides)
    widest = torch.float64 if what == "float64" else torch.float32
    before = exact(AutoModelForCausalLM.from_pretrained(parent, dtype=widest))
    report = convert(parent, tmp_path / "out", calibration=calibration())
    assert report["dtypes"] == dtypes == read_json(tmp_path / "out" / "flextron.json")["dtypes"]
    assert report["parity"]["dtype"] == loads_as == read_json(tmp_path / "out" / "config.json")["dtype"]
    found = stored_dtypes(tmp_path / "out" / "model.safetensors").values()
    names = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}
    assert {name: [names[dtype] for dtype in found].count(name) for name in dtypes} == dtypes
    assert report["parity"]["max_rel"] <= 2e-6 and report["parity"]["rounding"] == {
        "max_abs": 0,
        "max_rel": 0,
    }
    assert apart(before, tmp_path / "out") <= 2e-6


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_prefix_is_taken_off(tmp_path: Path, prefix: str) -> None:
    parent = edited(tmp_path / "parent", lambda t: renamed(lambda k: prefix + k)(halves(t)), {}, seed=5)
    with pytest.raises(ValueError, match=f"--strip-prefix {prefix}"):
        convert(parent, tmp_path / "out", calibration=calibration())
    report = convert(parent, tmp_path / "out", calibration=calibration(), strip_prefix=prefix)
    assert report["dtypes"] == {"bfloat16": 22, "float32": 7}
    edited(tmp_path / "plain", halves, {}, seed=5)
    before = exact(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32))
    assert apart(before, tmp_path / "out") <= 2e-6
    with pytest.raises(
        ValueError, match=r"strip_prefix must begin every name of the parent, got 'model\.layers\.'"
    ):
        convert(
            tmp_path / "plain", tmp_path / "other", calibration=calibration(), strip_prefix="model.layers."
        )


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_rounding_that_was_asked_for_is_in_the_certificate(tmp_path: Path, dtype: Any) -> None:
    parent = small_model()
    before = exact(small_model())
    report = convert(parent, tmp_path, calibration=calibration(), dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    parity = report["parity"]
    assert report["dtypes"] == {name: 29} and parity["dtype"] == name
    judged = difference(before[-2:], exact(AutoModelForCausalLM.from_pretrained(tmp_path))[-2:])
    assert parity["max_rel"] == pytest.approx(judged["max_rel"], rel=1e-3)
    assert parity["rounding"]["max_rel"] == pytest.approx(parity["max_rel"], rel=1e-2)
    assert parity["max_rel"] > 1e-4 >= parity["elastic"]["max_rel"]  # rounding excuses nothing else


def test_a_weight_that_its_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    parent = small_model()
    with torch.no_grad():
        parent.get_parameter(UP)[3, 5] = 1e5
    with pytest.raises(
        ValueError, match=rf"dtype must hold every weight, got float16, .* 6\.55e\+04, for {UP} with 1e\+05"
    ):
        convert(parent, tmp_path / "out", calibration=calibration(), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_loaded_parent_in_sixteen_bits_is_taken(tmp_path: Path) -> None:
    """Also where `half` rounded its rotary frequencies, which are stored nowhere, or attention is another."""
    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        parent = small_model("qwen3", "3:1").to(dtype)
        parent.set_attn_implementation(("eager", "sdpa")[i])
        assert parent.model.rotary_emb.inv_freq.dtype == dtype
        convert(parent, tmp_path / str(i), calibration=calibration())


def test_a_parent_that_is_used_up_hands_over_its_memory() -> None:
    parent = small_model()
    places = {p.data_ptr() for p in parent.parameters()}
    copy = copy_parent(parent, calibration()[:1], torch.device("cpu"), used_up=True)
    assert {p.data_ptr() for p in copy.parameters()} == places
    assert all(p.is_meta for p in parent.parameters())


def test_a_wider_dtype_changes_nothing_but_the_file(tmp_path: Path) -> None:
    report = convert(small_model().bfloat16(), tmp_path, calibration=calibration(), dtype="float32")
    assert report["dtypes"] == {"float32": 29} and report["parity"]["rounding"]["max_abs"] == 0
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        convert(small_model(), tmp_path / "out", calibration=calibration(), dtype="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_sub_networks_are_certified(tmp_path: Path, family: str) -> None:
    parity = convert(small_model(family), tmp_path / "a", calibration=calibration())["parity"]
    first, second = parity["sub_networks"]
    for proven in (first, second):
        assert proven["max_rel"] <= 1e-5 and proven["tokens"] == 16 and proven["generated"] == 8
    drawn = [(s["mlp"], s["heads"]) for s in (first, second)]
    assert drawn[0] != drawn[1] and any(len(set(mlp)) > 1 for mlp, _ in drawn) and parity["seed"] == 0
    again = convert(small_model(family), tmp_path / "b", calibration=calibration(), seed=1)["parity"]
    assert [(s["mlp"], s["heads"]) for s in again["sub_networks"]] != drawn and again["seed"] == 1


def test_every_layer_is_proven_below_its_full_width() -> None:
    for unit, mlp, heads in (("query", (20, 40), (1, 2)), ("kv_group", (40,), (1, 2, 3, 4))):
        config = elastic_config(small_model(), unit, mlp, heads)
        for seed in range(40):
            first, second = elastify._drawn(config, seed)
            assert all(min(pair) < 40 for pair in zip(first.mlp, second.mlp, strict=True)) or mlp == (40,)
            assert all(min(pair) < heads[-1] for pair in zip(first.heads, second.heads, strict=True))


def test_a_prompt_of_any_token_is_certified(tmp_path: Path) -> None:
    """Also of the one whose number serves as padding, and by a parent whose own settings would stop at once."""
    parent = small_model()
    parent.generation_config.eos_token_id = list(range(61))
    parent.generation_config.repetition_penalty = 9.0
    report = convert(parent, tmp_path, calibration=torch.zeros(8, 16, dtype=torch.int64))
    assert [s["generated"] for s in report["parity"]["sub_networks"]] == [8, 8]
    short = convert(small_model(), tmp_path / "short", calibration=calibration()[:, :1])
    assert [s["tokens"] for s in short["parity"]["sub_networks"]] == [1, 1]


def wrong_below_full_width(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is right at full width alone."""
    forward, mlp = ElasticMLP.forward, model.model.layers[1].mlp

    def wrong(self: Any, x: Tensor, *of_layer: Any) -> Tensor:
        return forward(self, x, *of_layer) * (1.01 if self is mlp and self.width < 40 else 1)

    monkeypatch.setattr(ElasticMLP, "forward", wrong)


def wrong_with_a_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right logits of whole sequences, wrong ones of what comes after."""
    model.model.norm.register_forward_hook(lambda _, args, out: out if out.shape[1] > 1 else -out)


def wrong_in_the_op(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right modules, and an op of all layers that computes something else."""
    run = ElasticForward.__call__

    def wrong(self: ElasticForward, *args: Any) -> Any:
        logits, greatest = run(self, *args)
        return logits * (1.01 if self.modules[0][1].width < 40 else 1), greatest

    monkeypatch.setattr(ElasticForward, "__call__", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            wrong_in_the_op,
            "logits must stay within 0.0001 of those of the sub-network as a plain model",
        ),
        (
            wrong_below_full_width,
            "logits must stay within 0.0001 of those of the sub-network as a plain model",
        ),
        (
            wrong_with_a_cache,
            "tokens generated with a cache must be those of the sub-network as a plain model",
        ),
    ],
)
def test_a_wrong_layer_cannot_hide_behind_a_right_full_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None],
    message: str,
    dtype: torch.dtype,
) -> None:
    read = elastic_model.read_model

    def planted(*args: Any, **options: Any) -> Any:
        model = read(*args, **options)
        fault(model, monkeypatch)
        return model

    monkeypatch.setattr(elastify, "read_model", planted)
    with pytest.raises(ParityError, match=message):
        convert(small_model().to(dtype), tmp_path / "out", calibration=calibration())
    assert not (tmp_path / "out").exists()


def test_what_the_disk_made_of_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault between the model in memory and the bytes in the file."""
    save = elastic_model.save_weights

    def damaged(folder: Path, tensors: dict[str, Pending], shard_bytes: int | None) -> dict[str, str]:
        def make() -> Tensor:
            tensor = tensors[UP].make().clone()
            tensor[3, 5] += 1
            return tensor

        return save(folder, {**tensors, UP: tensors[UP]._replace(make=make)}, shard_bytes)

    monkeypatch.setattr(elastic_model, "save_weights", damaged)
    with pytest.raises(
        ValueError, match=rf"must read back the tensors that were written, got others: {UP}; nothing"
    ):
        convert(small_model(), tmp_path / "out", calibration=calibration())
    assert not (tmp_path / "out").exists()


def test_the_certificate_measures_what_it_says() -> None:
    before = torch.tensor([[[1.0, -4.0], [2.0, 0.0]]])
    found = {"max_abs": pytest.approx(1e-4, rel=1e-2), "max_rel": pytest.approx(2.5e-5, rel=1e-2)}
    assert require_close("a", "b", before, before + 1e-4) == found == difference(before, before + 1e-4)
    for a, b in ((before, before * 1.001), (torch.zeros(1, 1, 2), torch.ones(1, 1, 2)), (before, before / 0)):
        with pytest.raises(ParityError, match=r"a: logits must stay within 0\.0001 of b, got"):
            require_close("a", "b", a, b)
