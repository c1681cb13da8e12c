"""Weights in one file or in shards: read by us and by stock transformers, never mixed up, and never twice in memory."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from nn.models import small_model
from peak import measured, needs_proc, random_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import flextron
from flextron import pipeline
from flextron.artefacts import elastic_model
from flextron.artefacts.directory import load_elastic
from flextron.artefacts.elastic_model import make_elastic, save_elastic
from flextron.checkpoint import CheckpointError, checksum_of, read_json, transaction, weights, write_json
from flextron.conversion.parent import read_parent
from flextron.corpus import Corpus
from flextron.nn.storage import rounded
from flextron.recipes import TrainConfig

LIMIT = 24_000  # bytes of a shard: an eighth of the model


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", LIMIT)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded") / "elastic"
    save_elastic(make_elastic(small_model()), root, shard_bytes=LIMIT)
    return root


@pytest.fixture
def sharded(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "elastic")


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if "safetensors" in p.name)


def test_shards_have_hugging_faces_names_and_are_read_by_both(sharded):
    found = names(sharded)
    count = len(found) - 1
    shards = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert count > 3 and found == [*shards, "model.safetensors.index.json"]
    index, meta = read_json(sharded / "model.safetensors.index.json"), read_json(sharded / "flextron.json")
    for shard in shards:
        held = load_file(sharded / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == held.keys()
        assert sum(t.nbytes for t in held.values()) <= LIMIT or len(held) == 1
    assert meta["checksums"] == {name: checksum_of(sharded / name) for name in (*found, "config.json")}
    model, stock = flextron.from_pretrained(sharded), AutoModelForCausalLM.from_pretrained(sharded)
    expected = dict(small_model().named_parameters())
    for read in (model, stock):
        assert {n: torch.equal(p, expected[n]) for n, p in read.named_parameters()} == dict.fromkeys(
            expected, True
        )


def test_save_pretrained_keeps_to_the_size_that_it_is_given(pristine, tmp_path, monkeypatch):
    monkeypatch.undo()
    model = flextron.from_pretrained(pristine)
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == ["model.safetensors"]
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    few = names(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size=LIMIT)
    assert 2 < len(few) < len(names(tmp_path)) == len(names(pristine))


def test_a_checkpoint_changes_its_layout_without_a_stale_file(sharded, monkeypatch):
    model, meta = load_elastic(sharded)
    (sharded / "model-notes.safetensors").write_bytes(b"mine")  # no name of ours
    monkeypatch.setattr(weights, "SHARD_BYTES", 10**9)
    save_elastic(model, sharded)
    assert names(sharded) == ["model-notes.safetensors", "model.safetensors"]
    whole = load_elastic(sharded)[0]
    monkeypatch.setattr(weights, "SHARD_BYTES", LIMIT)
    # killed between the moment that this save counts and its end
    with monkeypatch.context() as killed:
        killed.setattr(transaction, "_place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_elastic(model, sharded)
    monkeypatch.setattr(weights, "SHARD_BYTES", 2 * LIMIT)
    save_elastic(model, sharded)
    assert len(names(sharded)) < len(meta["checksums"]) and not [
        n for n in names(sharded) if n == "model.safetensors"
    ]
    recorded = {*read_json(sharded / "flextron.json")["checksums"]}
    assert {*names(sharded)} - {"model-notes.safetensors"} == recorded - {"config.json"}
    again = load_elastic(sharded)[0]
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def again(directory: Path) -> None:
    """Record the checksums as they are now: what is wrong must be seen without them."""
    meta = read_json(directory / "flextron.json")
    there = {name: checksum_of(directory / name) for name in meta["checksums"] if (directory / name).exists()}
    write_json(directory / "flextron.json", meta | {"checksums": there})


def swap(directory: Path) -> None:
    a, b = (directory / name for name in names(directory)[:2])
    a.rename(directory / "x"), b.rename(a), (directory / "x").rename(b)


def lie(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    path.write_text(json.dumps(index))


def forget(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))


def lose_a_tensor(directory: Path) -> None:
    path = (
        directory / read_json(directory / "model.safetensors.index.json")["weight_map"]["model.norm.weight"]
    )
    held = load_file(path)
    save_file({k: v for k, v in held.items() if k != "model.norm.weight"} or {"x": torch.ones(1)}, path)


def point_outside(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "../model-00001"))


FAULTS = {
    "a missing shard": (lambda d: (d / names(d)[1]).unlink(), "every shard must be there, got no model-00002-of"),
    "a swapped shard": (swap, "model-00001-of-.* sha256 must be"),
    "a lying index": (lie, "index.json: sha256 must be"),
    "no index": (lambda d: (d / "model.safetensors.index.json").unlink(), "index.json: must be a file, got nothing"),
    "one file beside shards": (
        lambda d: shutil.copy(d / names(d)[0], d / "model.safetensors"),
        "weights must be in the files whose sha256 were recorded, got a difference in model-00001",
    ),
}  # fmt: skip
SEEN = {
    "a missing shard": FAULTS["a missing shard"],
    "a swapped shard": (
        swap,
        "weight_map must name the file of each tensor, got model-.* for .*, which is in model-",
    ),
    "a lying index": (lie, "got model-00001-of-.* for model.norm.weight, which is in model-"),
    "an index without a tensor": (forget, "got none for model.norm.weight, which is in model-"),
    "a shard without its tensor": (lose_a_tensor, "for model.norm.weight, which is in none"),
    "an index that leads away": (point_outside, "every shard must be there, got no ../model-00001"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_checksums_cover_is_told(sharded, name):
    FAULTS[name][0](sharded)
    with pytest.raises(CheckpointError, match=FAULTS[name][1]) as caught:
        flextron.from_pretrained(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SEEN)
def test_what_shards_and_index_say_of_each_other_is_told_too(sharded, name):
    SEEN[name][0](sharded)
    again(sharded)
    with pytest.raises(CheckpointError, match=SEEN[name][1]) as caught:
        flextron.from_pretrained(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_an_export_in_shards_is_read_back(pristine, tmp_path, layout):
    model = flextron.from_pretrained(pristine)
    report = flextron.export(model, tmp_path / "small", model.elastic.smallest(), layout=layout)
    assert len(names(tmp_path / "small")) > 2 and {*names(tmp_path / "small")} < {*report["checksums"]}
    plain = flextron.load_plain(tmp_path / "small")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), model.budget(widths=model.elastic.smallest()):
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    (tmp_path / "small" / names(tmp_path / "small")[0]).unlink()
    with pytest.raises(CheckpointError, match="every shard must be there"):
        flextron.load_plain(tmp_path / "small")


def test_a_stage_keeps_shards_and_the_teacher_that_they_were(sharded, monkeypatch):
    """A run that goes on distils from what the shards held when it began, not from what it has made of them."""
    stream = torch.randint(61, (600,), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(pipeline, "read_tokenizer", lambda _: None)
    before = {n: p.clone() for n, p in load_elastic(sharded)[0].named_parameters()}
    options = dict(
        batch_size=2,
        length=16,
        eval_every=0,
        distillation=1.0,
        cross_entropy=0.0,
        learning_rate=0.01,
        bf16=False,  # else a CPU that is fast at bfloat16 holds the teacher in it
    )
    files = names(sharded)
    pipeline.train(sharded, TrainConfig(steps=2, **options), data=Corpus(stream, stream), device="cpu")
    assert names(sharded) == files
    kept = sorted(p.name for p in (sharded / "training").glob("teacher*"))
    assert kept == [n.replace("model", "teacher") for n in files if n.endswith(".safetensors")]
    assert not torch.equal(load_elastic(sharded)[0].model.norm.weight, before["model.norm.weight"])
    seen = {}
    monkeypatch.setattr(
        pipeline, "train_model", lambda *_, teacher, **__: seen.update(teacher.named_parameters()) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        pipeline.train(sharded, TrainConfig(steps=3, **options), data=Corpus(stream, stream), device="cpu")
    assert all(torch.equal(seen[name], p) for name, p in before.items())


@needs_proc
def test_loading_costs_little_more_than_the_weights(sharded, tmp_path, monkeypatch):
    """150 million parameters in bfloat16; a peak above 1.15 of them would be a second copy of some."""
    monkeypatch.undo()
    random_llama(
        tmp_path / "parent", "1GB", vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=11,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    save_elastic(make_elastic(read_parent(tmp_path / "parent")), tmp_path / "big")
    found = measured("loading", sharded, tmp_path / "big")
    print(found)
    assert found["stored"][1] > 250e6 and all(ratio < 1.15 for ratio, _ in found.values()), found


def test_a_save_rounds_one_tensor_at_a_time(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []

    def watched(*args):
        assert all(ref() is None for ref in alive)
        found = rounded(*args)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(elastic_model, "rounded", watched)
    model = make_elastic(small_model())
    save_elastic(model, tmp_path / "elastic", dtype="bfloat16")
    assert len(alive) == len([*model.parameters()]) and len(names(tmp_path / "elastic")) > 2
    monkeypatch.undo()
    for p in load_elastic(tmp_path / "elastic")[0].parameters():
        assert torch.equal(p, p.bfloat16().float())
