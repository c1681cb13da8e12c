"""Conversion proves that the full model is the parent; the checkpoint is one in stock transformers too."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.models import FAMILIES, GQA, small_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flextron.artefacts.directory import load_elastic
from flextron.artefacts.elastic_model import save_elastic
from flextron.checkpoint import CheckpointError, read_json
from flextron.conversion import ORDERS, ParityError, convert, elastify, score
from flextron.nn import elastic_config, make_elastic
from flextron_lab.demo import stories


def calibration(n: int = 8, L: int = 16) -> Tensor:
    return torch.randint(0, 61, (n, L), generator=torch.Generator().manual_seed(3))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def toy_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gqa", GQA)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_checkpoint_is_the_parent_everywhere(tmp_path: Path, family: str, gqa: str, tied: bool) -> None:
    """Stock transformers and the elastic model at full width both give the parent's logits."""
    parent = small_model(family, gqa, tie_word_embeddings=tied)
    before, x = copy.deepcopy(parent.state_dict()), calibration()[:2]
    unit = "query" if tied else "kv_group"
    report = convert(parent, tmp_path, calibration=calibration(), unit=unit)
    assert report["parity"]["max_rel"] <= 1e-5 and report["parity"]["tokens"] == 2 * 16

    expected = parent(x).logits
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(stock) is type(parent) and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert close(stock(x).logits, expected)
    elastic, meta = load_elastic(tmp_path)
    assert close(elastic(x).logits, expected)
    assert elastic.elastic.unit == unit and elastic.widths == elastic.elastic.full()
    assert meta["parity"] == report["parity"]
    assert all(torch.equal(v, before[k]) for k, v in parent.state_dict().items())  # left as it was


def test_layers_are_sorted_in_the_checkpoint(tmp_path: Path) -> None:
    tokens = calibration()
    convert(small_model(), tmp_path, calibration=tokens)
    found = score(AutoModelForCausalLM.from_pretrained(tmp_path), tokens[:-2])
    for scores in (*found.neurons, *found.groups(4)):
        assert (scores.diff() <= 1e-4 * scores.max()).all()


def test_every_option_changes_something(tmp_path: Path) -> None:
    def result(**options: Any) -> tuple[bytes, dict[str, Any]]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        convert(small_model(), out, calibration=calibration(), **options)
        return (out / "model.safetensors").read_bytes(), read_json(out / "flextron.json")["elastic"]

    plain = result()
    assert result() == plain  # deterministic
    weights = [plain[0]]
    for options in (
        {"order": "none"},
        {"order": "random"},
        {"order": "random", "seed": 1},
        {"aggregate": "mean_abs"},
        {"aggregate": "variance"},
    ):
        data, _ = result(**options)
        assert data not in weights
        weights.append(data)
    assert result(unit="query")[1]["head_choices"] == [1, 2]
    assert result(mlp_choices=(10, 40))[1]["mlp_choices"] == [10, 40]
    assert result(head_choices=(2, 4))[1]["head_choices"] == [2, 4]
    assert result(seed=1)[0] == plain[0]  # sorting draws nothing


def test_progress_is_told(tmp_path: Path) -> None:
    seen = []
    convert(
        small_model(),
        tmp_path,
        calibration=calibration(),
        batch_size=4,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(4, 6), (6, 6)]  # two of eight are held out


def break_heads(model: Any, orders: Any, config: Any) -> None:
    """The mistake that is easily made: query heads move flat, across their groups."""
    D = config.head_dim
    for layer in model.model.layers:
        order = torch.arange(config.num_heads).roll(1)
        rows = (order[:, None] * D + torch.arange(D)).flatten()
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data[rows]
        layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data[:, rows]


def break_neurons(model: Any, orders: Any, config: Any) -> None:
    """Gate and up move, down stays."""
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data = linear.weight.data.roll(1, 0)


def break_one_value(model: Any, orders: Any, config: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 0.05


def break_with_nan(model: Any, orders: Any, config: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")


@pytest.mark.parametrize("broken", [break_heads, break_neurons, break_one_value, break_with_nan])
def test_a_broken_permutation_is_refused_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    monkeypatch.setattr(elastify, "reorder", broken)
    with pytest.raises(ParityError, match=r"within 0\.0001 of the parent's, got .*; nothing was written"):
        convert(small_model(), tmp_path / "out", calibration=calibration())
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_directory_is_converted_with_its_tokenizer(tmp_path: Path) -> None:
    parent = small_model()
    parent.save_pretrained(tmp_path / "parent")
    convert(tmp_path / "parent", tmp_path / "bare", calibration=calibration())
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    toy_tokenizer().save_pretrained(tmp_path / "parent")
    convert(str(tmp_path / "parent"), tmp_path / "out", calibration=calibration())
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w7")["input_ids"] == [5, 7]
    x = calibration()[:2]
    assert close(load_elastic(tmp_path / "out")[0](x).logits, parent(x).logits)
    with pytest.raises(ValueError, match="out_dir must be another directory"):
        convert(tmp_path / "parent", tmp_path / "parent", calibration=calibration())


def test_a_low_precision_parent_keeps_its_dtype_exactly(tmp_path: Path) -> None:
    """Conversion computes in float32, but only moves values: what is stored is the parent's, bit for bit."""
    parent = small_model().bfloat16()
    convert(parent, tmp_path / "a", calibration=calibration(), order="none")
    parent.save_pretrained(tmp_path / "parent")
    convert(tmp_path / "parent", tmp_path / "b", calibration=calibration(), order="none")
    for name in "ab":
        stored = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        assert stored.dtype == torch.bfloat16
        assert all(torch.equal(v, stored.state_dict()[k]) for k, v in parent.state_dict().items())
    assert parent.dtype == torch.bfloat16
    assert load_elastic(tmp_path / "a")[0].dtype == torch.float32
    assert load_elastic(tmp_path / "a", torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_parent_read_from_a_quantised_file_is_stored_as_plain(tmp_path: Path) -> None:
    """What transformers makes of a GGUF file: float weights, under a configuration that says quantised."""
    parent = small_model()
    parent.config.quantization_config = {"quant_method": "gguf"}
    convert(parent, tmp_path, calibration=calibration())
    assert "quantization_config" not in read_json(tmp_path / "config.json")
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert parent.config.quantization_config == {"quant_method": "gguf"}


def test_generation_settings_are_kept(tmp_path: Path) -> None:
    parent = small_model()
    parent.generation_config.eos_token_id = 7
    parent.generation_config.pad_token_id = 0
    convert(parent, tmp_path, calibration=calibration())
    assert load_elastic(tmp_path)[0].generation_config.eos_token_id == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "alphabet"}, f"order must be one of {', '.join(ORDERS)}, got 'alphabet'"),
        ({"unit": "head"}, "unit must be one of kv_group, query, got 'head'"),
        ({"aggregate": "max"}, "aggregate must be one of"),
        ({"mlp_choices": (8, 16)}, "mlp_choices must ascend from at least 0 to 40"),
        ({"calibration": calibration(1)}, "at least 2 sequences"),
        ({"calibration": calibration() + 60}, "ids below 61"),
        (
            {"calibration": calibration(2, 257)},
            "length must be at most the 256 positions of the parent, got 257",
        ),
    ],
)
def test_bad_options_are_refused_and_nothing_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(small_model(), tmp_path / "out", **{"calibration": calibration(), **options})
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_elastic_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastify, "score", lambda *_, **__: pytest.fail("scored in vain"))
    with pytest.raises(NotImplementedError, match="alibi of a falcon must be False"):
        convert(small_model("falcon", alibi=True), tmp_path / "out", calibration=calibration())
    model = small_model()
    with pytest.raises(ValueError, match="elastic already"):
        convert(make_elastic(model, elastic_config(model)), tmp_path / "out", calibration=calibration())
    from transformers import BloomConfig, BloomForCausalLM

    with pytest.raises(NotImplementedError, match="model_type must be one of llama"):
        convert(
            BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=61)),
            tmp_path / "out",
            calibration=calibration(),
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("elastic")
    convert(small_model(), out, calibration=calibration(), tokenizer=toy_tokenizer())
    return out


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_elastic(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_later_version_may_add_is_read_past_and_kept(
    elsewhere: bool, damaged: Path, tmp_path: Path
) -> None:
    """Beside the fields of ``flextron.json`` and of its description of the model, in the same folder and in another."""
    path = damaged / "flextron.json"
    described = read_json(path)["elastic"] | {"norm_of_the_future": [1, 2]}
    edit(path, elastic=described, provenance={"who": "later"}, requires=[])
    model, before = load_elastic(damaged)
    directory = tmp_path / "other" if elsewhere else damaged
    model.save_pretrained(directory)
    again, meta = load_elastic(directory)
    assert meta["provenance"] == before["provenance"] == {"who": "later"}
    assert meta["elastic"] == described and again.elastic == model.elastic
    assert "requires" not in meta and meta["parity"] == before["parity"]


@pytest.mark.parametrize(
    ("requires", "got"),
    [(["skipping", "hyperbolic"], "['hyperbolic']"), ("all", "'all'"), ([3], "[3]"), (None, "None")],
)
def test_what_a_file_requires_must_be_known(damaged: Path, requires: Any, got: str) -> None:
    edit(damaged / "flextron.json", requires=requires)
    said = refused(damaged)
    assert (
        "flextron.json: requires must be a list of features that this version knows (skipping), got " in said
    )
    assert f"got {got}; a later flextron may read it" in said


def test_a_checkpoint_of_skipping_layers_requires_a_reader_that_knows_them(tmp_path: Path) -> None:
    convert(small_model(), tmp_path, calibration=calibration(), mlp_choices=(0, 16, 40))
    assert read_json(tmp_path / "flextron.json")["requires"] == ["skipping"]
    assert load_elastic(tmp_path)[0].elastic.mlp_choices == (0, 16, 40)


def test_the_files_of_a_checkpoint(checkpoint: Path) -> None:
    names = {p.name for p in checkpoint.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "flextron.json",
        "tokenizer.json",
    } <= names
    meta = read_json(checkpoint / "flextron.json")
    assert set(meta) == {"format", "elastic", "parity", "importance", "dtypes", "checksums", "versions"}
    assert meta["format"] == 2 and set(meta["checksums"]) == {"model.safetensors", "config.json"}
    assert meta["importance"] == {"order": "importance", "aggregate": "l2", "tokens": 96}


def test_weights_that_changed_are_refused(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-40] + bytes([data[-40] ^ 16]) + data[-39:])
    assert "model.safetensors: sha256 must be" in refused(damaged)
    path.write_bytes(data[:-1000])
    assert "truncated" in refused(damaged)
    torch.save({}, path)
    assert "pickled" in refused(damaged)
    path.unlink()
    assert "must hold its weights as model.safetensors or in shards" in refused(damaged)
    path.write_bytes(data)
    load_elastic(damaged)


def test_another_models_weights_are_refused_by_name(damaged: Path, tmp_path: Path) -> None:
    """Also when the checksums were forged to agree: names and shapes are checked for themselves."""
    from flextron.checkpoint import checksum_of

    other = small_model("llama", "4:1", num_hidden_layers=2)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", damaged)
    sums = {name: checksum_of(damaged / name) for name in ("model.safetensors", "config.json")}
    edit(damaged / "flextron.json", checksums=sums)
    message = refused(damaged)
    assert "missing model.layers.2." in message and "k_proj.weight [32, 72] instead of [64, 72]" in message


def test_a_changed_configuration_is_refused(damaged: Path) -> None:
    edit(damaged / "config.json", rms_norm_eps=0.1)
    assert "config.json: sha256 must be" in refused(damaged)
    (damaged / "config.json").unlink()
    assert "config.json: must be a file" in refused(damaged)


def test_a_configuration_that_contradicts_the_sidecar_is_refused(damaged: Path) -> None:
    from flextron.checkpoint import checksum_of

    def forge(**values: Any) -> str:
        edit(damaged / "config.json", **values)
        sums = {name: checksum_of(damaged / name) for name in ("model.safetensors", "config.json")}
        edit(damaged / "flextron.json", checksums=sums)
        return refused(damaged)

    assert "got num_layers 4" in forge(num_hidden_layers=4)
    assert "model_type must be 'llama' as in flextron.json, got 'gpt2'" in forge(model_type="gpt2")


def test_a_sidecar_that_is_none_is_refused(damaged: Path) -> None:
    path = damaged / "flextron.json"
    good = json.loads(path.read_text())
    for broken, words in (
        (good | {"format": 99}, "format must be 1 or 2, got 99"),
        ({k: v for k, v in good.items() if k != "elastic"}, "elastic must be an object, got None"),
        (good | {"elastic": good["elastic"] | {"unit": "head"}}, "unit must be one of"),
        (good | {"elastic": {"family": "llama"}}, "must be there, got nothing"),
        (good | {"checksums": {}}, "checksums must name model.safetensors and config.json"),
        (good | {"checksums": 3}, "checksums must be an object, got 3"),
        (
            good | {"checksums": good["checksums"] | {"config.json": 3}},
            "checksums.config.json must be a string",
        ),
        (
            good | {"checksums": good["checksums"] | {"model.safetensors": ""}},
            "must be 64 hexadecimal digits",
        ),
        (good | {"parity": None}, "parity must be an object, got None"),
    ):
        path.write_text(json.dumps(broken))
        assert words in refused(damaged)
    path.write_text("{")
    assert "must be a JSON file" in refused(damaged)
    path.unlink()
    assert "must be an elastic checkpoint" in refused(damaged)
    assert "must be a directory, got nothing there" in refused(damaged / "nowhere")


@torch.no_grad()
def test_a_trained_model_is_saved_over_the_old_one(damaged: Path) -> None:
    """Weights change, what conversion found stays, and so do files of other stages."""
    model, meta = load_elastic(damaged)
    (damaged / "latency.json").write_text("{}")
    model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.set_widths(model.elastic.smallest())
    save_elastic(model, damaged)
    again, new = load_elastic(damaged)
    assert again.widths == model.elastic.full()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert new["parity"] == meta["parity"] and new["importance"] == meta["importance"]
    assert new["checksums"] != meta["checksums"] and (damaged / "latency.json").exists()
    assert (damaged / "tokenizer.json").exists()


def test_a_save_after_an_interrupted_one_builds_on_it(damaged: Path, tmp_path: Path) -> None:
    """The interrupted set counts already: its report is the one that is kept."""
    model, _ = load_elastic(damaged)
    save_elastic(model, tmp_path / "newer", report={"parity": {"max_rel": 0.0}})
    (tmp_path / "newer").rename(damaged / ".committed")
    save_elastic(model, damaged)
    assert load_elastic(damaged)[1]["parity"] == {"max_rel": 0.0}


def test_a_save_that_fails_leaves_the_old_checkpoint(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, meta = load_elastic(damaged)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        save_elastic(model, damaged)
    monkeypatch.undo()
    again, same = load_elastic(damaged)
    assert same == meta and again.lm_head.weight.abs().sum() > 0


def test_loading_initialises_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn: neither for weights that are then overwritten, nor from the user's generator."""
    state = torch.get_rng_state()
    for name in ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"):
        if hasattr(torch.nn.init, name):
            monkeypatch.setattr(
                torch.nn.init,
                name,
                lambda t, *_, **__: t if t.is_meta else pytest.fail("initialised for nothing"),
            )
    model, _ = load_elastic(checkpoint)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and all(p.requires_grad and not p.is_meta for p in model.parameters())


needs_stories = pytest.mark.skipif(stories.find() is None, reason="FLEXTRON_DATA has no stories260k")


@needs_stories
@torch.no_grad()
def test_sorting_helps_a_trained_parent(tmp_path: Path) -> None:
    """Half of the MLP costs a trained model less when its neurons are sorted than when they are shuffled."""
    folder = stories.find()
    parent = stories.read_model(folder / stories.FILES[0]).float().eval()
    torch.manual_seed(0)
    begin = torch.ones(24, 1, dtype=torch.int64)  # BOS
    text = parent.generate(begin, max_new_tokens=95, do_sample=True, temperature=1.0)
    scored, judged = text[:16], text[16:]
    full = parent(input_ids=judged, labels=judged).loss.item()
    losses = {}
    for order in ("importance", "random"):
        report = convert(parent, tmp_path / order, calibration=scored, order=order)
        assert report["parity"]["max_rel"] <= 1e-4
        model, _ = load_elastic(tmp_path / order)
        assert model(input_ids=judged, labels=judged).loss.item() == pytest.approx(full, rel=1e-4)
        config = model.elastic
        model.set_widths(config.uniform(len(config.mlp_choices) // 2 - 1, -1))
        losses[order] = model(input_ids=judged, labels=judged).loss.item()
    assert full < losses["importance"] < losses["random"]


def test_a_model_is_replaced_whole_and_only_when_asked(tmp_path: Path) -> None:
    """Nothing of the old one is left: a stale shard would be loaded by what looks for shards first."""
    parent, out = tmp_path / "parent", tmp_path / "out"
    small_model().save_pretrained(parent)
    (parent / "LICENSE").write_text("MIT")
    (parent / "README.md").write_text("---\nlicense: mit\n---\n# Parent\n")
    out.mkdir()
    names = ("config.json", "flextron.json", "model-00001-of-00002.safetensors", "routers.json", "mine.txt")
    for name in names:
        (out / name).write_text("old")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="must be new or empty"):
        convert(parent, out, calibration=calibration())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    convert(parent, out, calibration=calibration(), force=True)
    assert (out / "mine.txt").read_text() == "old" and load_elastic(out)
    left = {path.name for path in out.iterdir()}
    assert left == {
        *("config.json", "flextron.json", "generation_config.json", "model.safetensors", "mine.txt"),
        *("README.md", "parent_README.md", "LICENSE"),
    }
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "within" in card and "flextron.from_pretrained" in card


def test_a_checkpoint_loads_while_another_process_saves_it(tmp_path: Path) -> None:
    """The old one or the new one: every layer's first weight is the number of its save."""
    convert(small_model(), tmp_path, calibration=calibration())
    script = f"""
import torch
from pathlib import Path
from flextron.artefacts.directory import load_elastic
from flextron.artefacts.elastic_model import save_elastic
torch.set_num_threads(1)
model, _ = load_elastic({str(tmp_path)!r})
number = 0
while True:
    number += 1
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = number
    save_elastic(model, {str(tmp_path)!r})
    if number == 1:
        print("saving", flush=True)
"""
    seen = []
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as saver:
        try:
            assert saver.stdout.readline()
            end = time.monotonic() + 4
            while time.monotonic() < end or len(set(seen)) < 3:
                model, _ = load_elastic(tmp_path)
                numbers = {float(p.flatten()[0]) for p in model.parameters()}
                assert len(numbers) == 1
                seen += numbers
        finally:
            saver.kill()
    assert seen == sorted(seen)
