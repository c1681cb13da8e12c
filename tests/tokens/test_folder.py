"""Promises of flextron.tokens: the same bytes whoever does the work, nothing lost to a kill, windows read in place."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import tracemalloc
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from flextron.data import Batches, Mixture, encode, windows
from flextron.documents import Text, read_documents, split_documents
from flextron.documents.datasets import pinned
from flextron.documents.reading import Part, read_part
from flextron.tokens import plan, work
from flextron.tokens.folder import PROGRESS, TOKENS_FILE, ShardStream, TokenFolder, is_token_folder
from flextron.tokens.writing import tokenize
from flextron_lab.demo.tiny import train_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tokenizer, and a folder of text in several files of several kinds."""
    path = tmp_path_factory.mktemp("tokens")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijkö", k=draw.randint(2, 8))) for _ in range(300)]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 120))) for _ in range(400)]
    train_tokenizer(texts[:40]).save_pretrained(path / "model")
    (path / "text" / "more").mkdir(parents=True)
    (path / "text" / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[:200]))
    (path / "text" / "b.csv").write_text("text\n" + "\n".join(texts[200:240]))
    for number, document in enumerate(texts[240:300]):
        (path / "text" / "more" / f"{number:03d}.txt").write_text(document)
    table = pyarrow.table({"text": texts[300:]})
    pyarrow.parquet.write_table(table, path / "text" / "z.parquet", row_group_size=30)
    return path


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(plan, "_SMALLEST", 4096)


def tokenizer_of(home):
    from flextron.checkpoint.hf import read_tokenizer

    return read_tokenizer(home / "model")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(home, out, sources=None, **options):
    options = {"workers": 1, "shard_tokens": 2000} | options
    return tokenize(home / "text" if sources is None else sources, out, home / "model", **options)


def every(stream):
    return stream.window(0, len(stream))


class Killed(BaseException):
    pass


def killed_after(records):
    """A progress callback that ends a run, as a kill would, when so many units are done."""

    def progress(what, done, total, note):
        if done >= records:
            raise Killed

    return progress


def test_a_folder_holds_what_a_stage_would_encode(home, tmp_path):
    report = written(home, tmp_path / "out")
    folder, tokenizer = TokenFolder(tmp_path / "out"), tokenizer_of(home)
    sides = [encode(part, tokenizer) for part in split_documents(read_documents(home / "text"))]
    assert torch.equal(every(folder.train), sides[0]) and torch.equal(every(folder.held_out), sides[1])
    assert report.tokens == sum(map(len, sides)) and report.held_out == len(sides[1])
    assert report.documents == 400 and report.files > 20
    folder.check(tokenizer)
    shard = folder.train.shards[0]
    assert np.memmap(tmp_path / "out" / shard.file, "<u2").tolist() == sides[0][: shard.tokens].tolist()


def test_neither_processes_nor_kills_change_a_byte(home, tmp_path):
    written(home, tmp_path / "one")
    expected = contents(tmp_path / "one")

    def kill_a_process(what, done, total, note):
        if done == 3 and (children := multiprocessing.active_children()):
            os.kill(children[0].pid, signal.SIGKILL)

    out = tmp_path / "several"
    with pytest.raises(
        ChildProcessError, match=r"its processes must live to the end, got one that ended with -9"
    ):
        written(home, out, workers=2, progress=kill_a_process)
    assert not multiprocessing.active_children() and not (out / TOKENS_FILE).exists()
    (out / ".train-00000-0000.bin.1.tmp").write_bytes(b"what a killed process left")
    assert written(home, out, workers=2).resumed > 0
    assert contents(out) == expected
    out = tmp_path / "often"
    for records in (1, 4, 9, 10):
        with pytest.raises(Killed):
            written(home, out, progress=killed_after(records))
    damaged = next(out.glob("train-00002-*.bin"))
    damaged.write_bytes(
        bytes(len(damaged.read_bytes()))
    )  # whole by its size: what a crash of the machine leaves
    written(home, out)
    assert contents(out) == expected


def test_a_long_unit_goes_on_after_its_last_file(home, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_SMALLEST", 1 << 20)  # one unit
    written(home, tmp_path / "one")
    assert len(contents(tmp_path / "one")) > 10

    def progress(what, done, total, note):
        if len(list((tmp_path / "two" / PROGRESS).glob("00000-*.json"))) == 3:
            raise Killed

    with pytest.raises(Killed):
        written(home, tmp_path / "two", progress=progress)
    assert written(home, tmp_path / "two").resumed > 3 * 2000
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_finished_folder_is_verified(home, tmp_path):
    report = written(home, tmp_path / "out")
    before = contents(tmp_path / "out")
    again = written(home, tmp_path / "out")
    assert again.resumed == again.tokens == report.tokens and contents(tmp_path / "out") == before
    path = next((tmp_path / "out").glob("train-*.bin"))
    path.write_bytes(bytes(len(before[path.name])))
    with pytest.raises(
        ValueError, match=rf"{path.name}: must be as it was written, got other content; .* --restart"
    ):
        written(home, tmp_path / "out")
    written(home, tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_are_divided_as_a_stage_would(home, tmp_path, count):
    path = tmp_path / "few.jsonl"
    texts = [f"abc def\n\nghi {i} jab\n\n" + "kic eda " * 40 for i in range(count)]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    written(home, tmp_path / "out", path)
    folder, tokenizer = TokenFolder(tmp_path / "out"), tokenizer_of(home)
    for stream, side in zip((folder.train, folder.held_out), split_documents(texts), strict=True):
        assert torch.equal(every(stream), encode(side, tokenizer))


def test_windows_are_read_over_the_borders_of_files(home, tmp_path):
    written(home, tmp_path / "out")
    stream = TokenFolder(tmp_path / "out").train
    held = every(stream)
    assert len(stream.shards) > 5 and torch.equal(windows(stream, 9, 700), windows(held, 9, 700))
    one, other = Batches(stream, 4, 37, seed=2), Batches(held, 4, 37, seed=2)
    assert one.windows_per_epoch == len(held) // 37
    for _ in range(2 * one.windows_per_epoch // 4):
        assert torch.equal(next(one), next(other))
    mixtures = [Mixture([s, torch.arange(100)], [0.5, 0.5]) for s in (stream, held)]
    one, other = (Batches(mixture, 4, 37) for mixture in mixtures)
    assert torch.equal(next(one), next(other))


def test_the_identity_of_a_stream_is_recorded_and_not_computed(home, tmp_path):
    written(home, tmp_path / "a")
    written(home, tmp_path / "b", shard_tokens=1500)
    a, b = (TokenFolder(tmp_path / name) for name in "ab")
    assert len({a.train.checksum, a.held_out.checksum, b.train.checksum}) == 3
    for path in (tmp_path / "a").glob("*.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    assert TokenFolder(tmp_path / "a").train.checksum == a.train.checksum


def test_a_large_vocabulary_takes_wider_numbers(tmp_path):
    ids = np.array([1, 70_000, 2], "<u4")
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    shard = {"file": "x.bin", "tokens": 3, "sha256": ""}
    from flextron.tokens.folder import Shard

    assert every(ShardStream(tmp_path, [Shard(**shard)], "uint32")).tolist() == [1, 70_000, 2]


def test_a_folder_that_is_not_whole_is_one_sentence(home, tmp_path):
    written(home, tmp_path / "out")
    shard = next((tmp_path / "out").glob("train-*.bin"))
    size = shard.stat().st_size
    stream = TokenFolder(tmp_path / "out").train
    TokenFolder(tmp_path / "out").verify()
    shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(ValueError, match=rf"{shard.name}: must be as it was written, .* --restart"):
        TokenFolder(tmp_path / "out").verify()
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"{shard.name}: must be a file of {size} bytes, got {size - 2}"):
        TokenFolder(tmp_path / "out")
    with pytest.raises(ValueError, match="got a file that was cut short"):
        every(stream)
    shard.unlink()
    with pytest.raises(ValueError, match=f"must be a file of {size} bytes, got none"):
        TokenFolder(tmp_path / "out")
    path = tmp_path / "out" / TOKENS_FILE
    good = json.loads(path.read_text())
    for change, says in (
        ({"format": 9}, "format must be 1, got 9"),
        ({"dtype": "float32"}, "dtype must be one of uint16, uint32, got float32"),
        ({"train": [{"file": "../x", "tokens": 1, "sha256": ""}]}, r"files must lie in the folder"),
        ({"border": "x"}, "border must be a finite number"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=f"{says}.*; `flextron tokenize` with --restart"):
            TokenFolder(tmp_path / "out")


def test_another_tokenizer_is_refused_and_a_copy_is_not(home, tmp_path):
    written(home, tmp_path / "out")
    folder, tokenizer = TokenFolder(tmp_path / "out"), tokenizer_of(home)
    tokenizer(
        "a text", truncation=True, max_length=3, padding="max_length"
    )  # leaves its settings in the backend
    tokenizer.save_pretrained(tmp_path / "copy")
    from flextron.checkpoint.hf import read_tokenizer

    folder.check(tokenizer)
    folder.check(read_tokenizer(tmp_path / "copy"))
    with pytest.raises(ValueError, match="got another one with as many tokens; run `flextron tokenize`"):
        folder.check(train_tokenizer([d[::-1] for d in read_documents(home / "text")]))
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match=r"got one of \d+ tokens instead of \d+"):
        folder.check(tokenizer)


def test_what_cannot_be_done_changes_nothing(home, tmp_path):
    out = tmp_path / "out"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}')
    (tmp_path / "word.txt").write_text("word")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for sources, target, options, says in (
        (tmp_path / "nothing", out, {}, "path must exist"),
        (tmp_path / "a.pdf", out, {}, "path must exist"),
        ([], out, {}, "sources must be given"),
        ("-", out, {}, "sources must be files, folders or datasets, got -"),
        (home / "text", out, {"held_out": 1.0}, "held_out must lie between 0 and 1"),
        (home / "text", out, {"workers": 0}, "workers must be at least 1"),
        (home / "text", tmp_path / "full", {}, "must be new or empty, got mine.txt"),
        (Text(home / "text", "speech"), out, {}, '"speech"'),
        (tmp_path / "word.txt", out, {}, "must hold text to part, got 'word'"),
        (tmp_path / "empty.txt", out, {}, "sources must hold text, got none"),
        (bad, out, {}, "line 2 of .* must be a JSON object"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
            written(home, target, sources, **options)
        assert "\n" not in str(caught.value)
        assert not out.exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_run_is_gone_on_with_only_as_it_began(home, tmp_path):
    with pytest.raises(Killed):
        written(home, tmp_path / "out", progress=killed_after(2))
    assert is_token_folder(tmp_path / "out")  # and not one of text, whose .json files are documents
    with pytest.raises(ValueError, match="got a folder of tokens that is not finished"):
        TokenFolder(tmp_path / "out")
    with pytest.raises(ValueError, match="got other values of share; --restart"):
        written(home, tmp_path / "out", held_out=0.2)
    shutil.copytree(home / "text", tmp_path / "text")
    with pytest.raises(ValueError, match="got other values of sources"):
        written(home, tmp_path / "out", tmp_path / "text")
    assert written(home, tmp_path / "out", tmp_path / "text", restart=True).resumed == 0


def test_a_full_disk_is_one_sentence_and_what_is_finished_stays(home, tmp_path, monkeypatch):
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(work.os, "fsync", full)
        with pytest.raises(
            ValueError, match=r"tokenize: .* must be written whole, got no space left on device"
        ):
            written(home, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert written(home, tmp_path / "out").resumed > 0
    written(home, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_dataset_streams_in_parts(home, tmp_path, monkeypatch):
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, count in (("train-0", 30), ("train-1", 20), ("test-0", 10)):
        rows = "\n".join(json.dumps({"n": i, "story": f"{split} story {i}"}) for i in range(count))
        (folder / f"{split}.jsonl").write_text(rows)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = f"hf:{folder}"
    units = plan.plan_of([source]).units
    assert [len(unit) for unit in units] == [1, 1]
    found = [d for unit in units for part in unit for d in read_part(part, 100)]
    assert found == [f"train-0 story {i}" for i in range(30)] + [f"train-1 story {i}" for i in range(20)]
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.arrow"))
    (unit,) = plan.plan_of([f"{source}[test]"]).units
    assert len(list(read_part(unit[0], 100))) == 10
    units = plan.plan_of([f"{source}[train[:3]]"]).units  # a slice cannot stream
    assert [d for unit in units for part in unit for d in read_part(part, 100)] == found[:3]
    with pytest.raises(ValueError, match='must have a field "speech"'):
        plan.plan_of([Text(source, "speech")])

    class Hub:
        def dataset_info(self, name):
            return type("Info", (), {"sha": f"of-{name}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert pinned("hf:owner/name:en[test]") == "hf:owner/name@of-owner/name:en[test]"
    assert pinned("hf:owner/name@v1") == "hf:owner/name@v1"
    assert pinned(source) == source


def test_reading_takes_memory_for_a_block_and_not_for_a_file(tmp_path):
    megabytes = int(os.environ.get("FLEXTRON_TOKENS_MEGABYTES", "12"))
    line = "word " * 400 + "\n"
    with (tmp_path / "a.txt").open("w") as file:
        file.writelines(line for _ in range(megabytes * 2**20 // len(line)))
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for _ in range(megabytes * 2**20 // len(line)))
    for name in ("a.txt", "a.jsonl"):
        tracemalloc.start()
        for document in read_part(Part(str(Path(tmp_path, name))), 1 << 20):
            assert len(document) <= 1 << 20
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * 2**20, name
