"""Promises of flextron.corpus: texts and folders of tokens mix, and processes share what one of them has read."""

from __future__ import annotations

import json

import pytest
import torch
from training.tiny_run import CONFIG, VOCAB, elastic, tokens

from flextron import corpus as corpora
from flextron.corpus import Corpus, Mix, corpus, documents, held_out_windows, windows
from flextron.data import Mixture
from flextron.documents import Text
from flextron.ranks import ALONE
from flextron.tokens.folder import Shard, ShardStream
from flextron.tokens.writing import tokenize
from flextron.training import train
from flextron_lab.demo.tiny import train_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    texts = [f"abc def {i} ghi jab kic " * 20 for i in range(60)]
    (path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (path / "b.txt").write_text("\n\n".join(t[::-1] for t in texts))
    train_tokenizer(texts).save_pretrained(path / "model")
    tokenize(path / "a.jsonl", path / "tokens", path / "model", workers=1)
    return path


@pytest.fixture
def tokenizer(home):
    from flextron.checkpoint.hf import read_tokenizer

    return read_tokenizer(home / "model")


def test_tokenised_text_is_what_the_text_is(home, tokenizer):
    folder, text = corpus(tokenizer, home / "tokens"), corpus(tokenizer, home / "a.jsonl")
    assert isinstance(folder.train, ShardStream)
    for samples, length in ((8, 32), (1, 200)):
        for one, other in ((folder.train, text.train), (folder.held_out, text.held_out)):
            assert torch.equal(windows(one, samples, length), windows(other, samples, length))
    with pytest.raises(ValueError, match="text: field must be given for text, got 'x' for the tokens in"):
        corpus(tokenizer, Text(home / "tokens", "x"))
    for data in (home / "tokens", Mix([home / "a.jsonl"])):
        with pytest.raises(ValueError, match="text: data must be one text that is not tokenised yet, got"):
            documents(data)


def test_a_mix_draws_from_each_text_its_share(home, tokenizer):
    mix = corpus(tokenizer, Mix([home / "tokens", home / "b.txt"], [3, 1]))
    assert isinstance(mix.train, Mixture) and mix.train.counts == mix.held_out.counts == [7500, 2500]
    found = windows(mix.train, 8, 16)
    assert torch.equal(found[:6], windows(corpus(tokenizer, home / "a.jsonl").train, 6, 16))
    assert torch.equal(found[6:], windows(corpus(tokenizer, home / "b.txt").train, 2, 16))
    lengths = [len(corpus(tokenizer, home / name).train) for name in ("a.jsonl", "b.txt")]
    assert corpus(tokenizer, Mix([home / "tokens", home / "b.txt"])).train.weights == lengths
    assert held_out_windows(tokenizer, Mix([home / "tokens", home / "b.txt"], [1, 1]), 4, 8).shape == (4, 8)


def test_training_from_the_disk_is_training_from_memory(tmp_path):
    held = tokens()
    halves = []
    for number, part in enumerate(held.split(400)):
        (tmp_path / f"{number}.bin").write_bytes(part.numpy().astype("<u2").tobytes())
        halves.append(Shard(f"{number}.bin", len(part), str(number)))
    losses = {}
    for name, stream in (("disk", ShardStream(tmp_path, halves, "uint16")), ("memory", held)):
        report = train(elastic(), stream, CONFIG, tmp_path / name, teacher=elastic(seed=1))
        losses[name] = report.losses
    assert losses["disk"] == losses["memory"]
    # the same shards go on with the run; others, or a mixture of them, are another run
    stream = ShardStream(tmp_path, halves, "uint16")
    assert (
        train(elastic(), stream, CONFIG, tmp_path / "disk", teacher=elastic(seed=1)).resumed_from
        == CONFIG.steps
    )
    for other in (ShardStream(tmp_path, halves[:1], "uint16"), Mixture([stream, held])):
        with pytest.raises(ValueError, match="got other tokens"):
            train(elastic(), other, CONFIG, tmp_path / "disk", teacher=elastic(seed=1))
    assert int(held.max()) < VOCAB


class Processes:
    """Stands for two ranks that run one after the other: what rank 0 shares, rank 1 gets."""

    def __init__(self, monkeypatch):
        self.sent, self.rank = [], 0
        monkeypatch.setattr(corpora.ranks, "now", lambda: ALONE._replace(rank=self.rank, size=2))
        monkeypatch.setattr(corpora.ranks, "is_first", lambda: self.rank == 0)
        monkeypatch.setattr(corpora.ranks, "shared", self.shared)

    def shared(self, value):
        if self.rank == 0:
            self.sent.append(value if isinstance(value, torch.Tensor) else json.loads(json.dumps(value)))
            return value
        found = self.sent.pop(0)
        assert type(found) is type(value)
        assert not isinstance(value, torch.Tensor) or (value.shape, value.dtype) == (found.shape, found.dtype)
        return found


def test_one_process_reads_and_the_others_are_given_its_tokens(home, tokenizer, monkeypatch):
    alone = corpus(tokenizer, home / "a.jsonl")
    both = Processes(monkeypatch)
    first = corpus(tokenizer, home / "a.jsonl")
    both.rank = 1
    monkeypatch.setattr(corpora, "documents", lambda data: pytest.fail("a second process reads"))
    second = corpus(tokenizer, home / "a.jsonl")
    for side in ("train", "held_out"):
        assert torch.equal(getattr(first, side), getattr(alone, side))
        assert torch.equal(getattr(second, side), getattr(alone, side))
    assert isinstance(corpus(tokenizer, home / "tokens"), Corpus) and not both.sent  # opened by each


def test_what_one_process_cannot_read_is_the_sentence_of_all(home, tokenizer, monkeypatch):
    both = Processes(monkeypatch)
    for rank, kind in ((0, FileNotFoundError), (1, ValueError)):
        both.rank = rank
        with pytest.raises(kind, match=r"read_documents: path must exist, got .*nothing"):
            corpus(tokenizer, home / "nothing")
