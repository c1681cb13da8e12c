"""Where a model is loaded from, in which dtype and to which device: what is asked for, or one sentence."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from nn.models import small_model
from transformers import AutoModelForCausalLM

import flextron
from flextron.artefacts.elastic_model import save_elastic
from flextron.checkpoint import CheckpointError, hub
from flextron.cli import main
from flextron.nn import elastic_config, make_elastic

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An elastic checkpoint in bfloat16, and a plain sub-network of it."""
    root = tmp_path_factory.mktemp("stored")
    model = small_model().to(torch.bfloat16)
    make_elastic(model, elastic_config(model))
    save_elastic(model, root / "elastic")
    flextron.export(model, root / "small", model.elastic.smallest())
    return root


LOADERS = ((flextron.from_pretrained, "elastic"), (flextron.load_plain, "small"))


@pytest.mark.parametrize(("load", "name"), LOADERS)
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "float64"}, torch.float64),
    ],
)
def test_every_weight_has_the_dtype_asked_for(stored, load, name, given, found):
    model = load(stored / name, **given)
    assert {p.dtype for p in model.parameters()} == {found} and model.dtype == model.config.dtype == found
    stock = AutoModelForCausalLM.from_pretrained(stored / name, dtype=found)
    with torch.no_grad():
        ours, theirs = (m(IDS, use_cache=False).logits.double() for m in (model, stock))
    assert (ours - theirs).abs().max() <= 8 * torch.finfo(found).eps * theirs.abs().max()


@pytest.mark.parametrize(("load", "name"), LOADERS)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, float64, got 'int8'"),
        ({"dtype": torch.int64}, "dtype must be one of .*, got 'int64'"),
        ({"device_map": "balanced"}, "device_map must be auto or one device, .*, got 'balanced'"),
        ({"device_map": "disk"}, "device_map must be auto or one device"),
        ({"device_map": "meta"}, "device_map must be auto or one device"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "device_map must be auto or one device"),
        ({"device_map": "cuda:99"}, "device_map must be one that can be used here, got cuda:99"),
        ({"revision": "main"}, "revision must be given of a hub id only, got 'main' of a path"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(stored, load, name, given, says):
    with pytest.raises(ValueError, match=says) as caught:
        load(stored / name, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
@pytest.mark.parametrize(("load", "name"), LOADERS)
def test_one_device_is_taken(stored, load, name, device_map):
    wanted = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert load(stored / name, device_map=device_map).device.type == wanted


@pytest.mark.parametrize(
    "name", ["nothing", "nothing/", "./owner/name", "../owner/name", "/owner/name", "a/b/c", "here/nothing"]
)
def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the network"))
    for load, _ in LOADERS:
        with pytest.raises(CheckpointError, match="must be a directory"):
            load(name)
    assert main(["info", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_number_names_no_checkpoint():
    for load, _ in LOADERS:
        with pytest.raises(TypeError, match="directory must be a path or a hub id, got 3"):
            load(3)


def test_an_id_is_fetched_from_the_hub(stored, tmp_path, monkeypatch, capsys):
    """A snapshot of the hub's cache is a folder of links to files of other names."""
    asked = []

    def fetched(name, **options):
        asked.append((name, options))
        snapshot, blobs = tmp_path / "snapshots" / name, tmp_path / "blobs"
        blobs.mkdir(exist_ok=True)
        snapshot.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate((stored / name.split("/")[1]).iterdir()):
            blob = blobs / f"{number}-{path.name.encode().hex()}"
            shutil.copy(path, blob)
            (snapshot / path.name).unlink(missing_ok=True)
            (snapshot / path.name).symlink_to(blob)
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    for load, name in LOADERS:
        model = load(f"owner/{name}", dtype="auto", revision="v1", cache_dir="cache", token=False)
        name, options = asked.pop()
        assert name == f"owner/{name.split('/')[1]}" and model.dtype == torch.bfloat16
        assert [options[key] for key in ("revision", "cache_dir", "token")] == ["v1", "cache", False]
        assert "*.safetensors" in options["allow_patterns"] and "training/*" in options["ignore_patterns"]
    assert main(["info", "owner/elastic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 3 and asked.pop()[0] == "owner/elastic"


def test_what_the_hub_does_not_give_is_one_sentence(tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise ConnectionError("Got: no route\nto the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(CheckpointError) as caught:
        hub.local("owner/name")
    said = "owner/name: must be a directory, or the id of a checkpoint that the hub gives, got: no route"
    assert str(caught.value) == said
    assert main(["generate", "owner/name", "--prompt", "x"]) == 2
    assert capsys.readouterr().err == f"flextron: {said}\n"
