"""Promises of flextron.data: documents in, tokens out, nothing lost and nothing twice."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from flextron import ranks
from flextron.data import (
    Batches,
    Mixture,
    Text,
    encode,
    read_documents,
    shares,
    split_documents,
    stdlib_documents,
    windows,
)
from flextron.documents import reading, stdlib


def zst(text: str) -> bytes:
    return zstandard.ZstdCompressor().compress(text.encode())


class Letters:
    """A tokenizer of the letters a-z: 10..35. ``adds_bos``: puts BOS before a text, as Llama's does."""

    def __init__(self, bos: int | None = None, eos: int | None = None, adds_bos: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self.adds_bos = bos, eos, adds_bos
        self.seen = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if not isinstance(text, str):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        self.seen += 1
        begin = [self.bos_token_id] if self.adds_bos and add_special_tokens else []
        return {"input_ids": begin + [ord(c) - ord("a") + 10 for c in text if c.isalpha()]}


def test_every_kind_of_file_is_read(tmp_path):
    lines = "\n".join(json.dumps({"text": t, "source": "x"}) for t in ("one", "two\u2028lines")) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "c.TXT").write_text("three")
    (tmp_path / "d.md.gz").write_bytes(gzip.compress("vier: fünf".encode(), mtime=0))
    (tmp_path / "e.xz").write_bytes(lzma.compress(b"six"))
    (tmp_path / "g.json").write_text(json.dumps([{"text": "eight", "n": 1}, {"text": None}]))
    (tmp_path / "h.json").write_text(json.dumps(["nine", "ten"]))
    (tmp_path / "i.json").write_text('{"body": "eleven"}\n{"body": "twelve"}\n')  # lines, as many call .json
    (tmp_path / "j.csv").write_text('id,body\n1,"thirteen, in\n""quotes"""\n2,fourteen\n')
    (tmp_path / "k.jsonl.zst").write_bytes(zst('{"text": "fifteen"}\n') + zst('{"text": "sixteen"}\n'))
    table = pyarrow.table({"id": [1, 2, 3], "story": ["seventeen", None, "eighteen"]})
    pyarrow.parquet.write_table(table, tmp_path / "l.parquet")
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.txt").write_text("seven")
    (tmp_path / "sub" / ".git").mkdir()
    (tmp_path / "sub" / ".git" / "config.md").write_text("hidden")
    (tmp_path / ".draft.txt").write_text("hidden")
    (tmp_path / "sub" / "blank.txt").write_text(" \n ")
    expected = ["one", "two\u2028lines", "one", "two\u2028lines", "three", "vier: fünf", "six"]
    expected += ["eight", "nine", "ten", "eleven", "twelve", 'thirteen, in\n"quotes"', "fourteen"]
    expected += ["fifteen", "sixteen", "seventeen", "eighteen", "seven"]
    assert read_documents(tmp_path) == expected
    assert read_documents(str(tmp_path / "d.md.gz")) == ["vier: fünf"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pdf", b"%PDF", r"path must be a text file \(.txt, .md, .jsonl.*got .*a.pdf"),
        ("a.txt", b"\xff\xfe\x00", "must be UTF-8 text"),
        ("a.txt", b"  ", "must hold text"),
        ("a.txt.xz", b"not xz at all", "must be readable"),
        ("a.txt.xz", lzma.compress(b"text" * 100)[:-20], "must be readable"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], "must be readable"),
        ("a.txt.gz", b"not gzip", "must be readable"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"text": 3}',
            'line 2 of .* must be a JSON object with a "text" string',
        ),
        ("a.jsonl", b'{"text": "fine"}\n\n{"te', "line 3 of"),
        ("a.jsonl", b'["text"]', "line 1 of"),
        ("a.json", b'[{"text": "fine"}, 3]', "entry 2 of .* must be a JSON object"),
        (
            "a.json",
            b'{"a": "x", "b": "y", "n": 1}',
            'entry 1 of .* a field "text", or just one with strings, got a, b, n',
        ),
        ("a.json", b'{"text": ', "line 1 of"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"text": "half \\ud83d"}',
            "line 2 of .* half of a surrogate pair at 5",
        ),
        ("a.csv", b"a,b\nx,y\n", 'must have a field "text", or just one with strings, got a, b; .*--field'),
        ("a.csv", b'text\n"open', "must be readable, got unexpected end of data"),
        ("a.csv", b"", "must have a field .* got none"),
        ("a.parquet", b"PAR1 not parquet", "must be readable, got .*Parquet"),
        ("a.txt.zst", b"not zst", "must be readable, got zstd"),
        ("a.txt.zst", zst("text" * 100)[:-5], "must be readable, got a truncated file"),
    ],
)
def test_bad_file_gives_one_sentence(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_field_may_be_named(tmp_path):
    rows = [{"title": "A", "body": "one", "n": 1}, {"title": "B", "body": "two", "n": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("title,body,n\nA,one,1\nB,two,2\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        path = tmp_path / name
        assert read_documents(Text(path, "body")) == ["one", "two"]
        assert read_documents(Text(path, "title")) == ["A", "B"]
        with pytest.raises(
            ValueError, match=r'"text", or just one with strings, got title, body, n; Text\(path, field'
        ):
            read_documents(path)
        with pytest.raises(ValueError, match='"speech"'):
            read_documents(Text(path, "speech"))
    assert read_documents(Text(tmp_path, "body")) == ["one", "two"] * 4
    (tmp_path / "b.txt").write_text("plain")
    assert read_documents(Text(tmp_path, "body"))[-1] == "plain"
    with pytest.raises(ValueError, match="field must be given for files that have fields, got 'body' for"):
        read_documents(Text(tmp_path / "b.txt", "body"))
    with pytest.raises(
        ValueError, match="field must be given for files that have fields, got 'body' for python:"
    ):
        read_documents(Text("python:docs", "body"))


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ("one\n\ntwo: {3}\n", None, ["one\n\ntwo: {3}\n"]),
        ('{"text": "one"}\n{"text": "two"}\n', None, ["one", "two"]),
        ('{"a": "one", "b": "two"}\n', "b", ["two"]),
    ],
)
def test_standard_input_is_text_or_lines_of_json(monkeypatch, given, field, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    reading._piped.cache_clear()
    assert read_documents(Text("-", field)) == expected
    assert read_documents(Text("-", field)) == expected  # a second stage in the same run
    reading._piped.cache_clear()


def test_a_dataset_of_the_hub_is_read(tmp_path, monkeypatch):
    """The library reads folders of files as it reads the hub: no network is needed to see that it is asked rightly."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for split, rows in (("train", [f"document {i}" for i in range(9)]), ("test", ["one", "two"])):
        lines = "\n".join(json.dumps({"n": i, "story": text}) for i, text in enumerate(rows))
        (folder / f"{split}.jsonl").write_text(lines)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert read_documents(f"hf:{folder}[test]") == ["one", "two"]
    assert read_documents(f"hf:{folder}[train[:2]]") == ["document 0", "document 1"]
    assert len(read_documents(Text(f"hf:{folder}", "story"))) == 9
    for source, says in (
        (f"hf:{folder}[dev]", 'must be a dataset that can be read, got: Unknown split "dev"'),
        (f"hf:{folder}/nothing", "must be a dataset that can be read, got: "),
        ("hf:", "must be named as hf:owner/name.split., got hf:"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            read_documents(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match='must have a field "speech", with strings, got n, story'):
        read_documents(Text(f"hf:{folder}[test]", "speech"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or 1 / 0)
    for source, wanted in (
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:owner/name:en[test+validation]", ("owner/name", "en", "test+validation")),
    ):
        with pytest.raises(ValueError, match="got: division by zero"):
            read_documents(source)
        (name, config), options = asked.pop()
        assert (name, config, options["split"]) == wanted


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, name, library):
    (tmp_path / name).write_bytes(b"something")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs {library}; pip install 'flextron\[data\]'"):
        read_documents(tmp_path / name)


def test_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must exist, got .*nothing\.txt"):
        read_documents(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="must hold text"):
        read_documents(tmp_path)


def test_standard_library_is_prose_and_large_enough():
    documents = stdlib_documents()
    text = "".join(documents)
    assert len(text) > 1_000_000
    assert len(documents) > 300
    assert min(map(len, documents)) >= 200
    assert ">>>" not in text
    assert sum(c.isalpha() or c.isspace() for c in text) > 0.9 * len(text)
    paragraphs = [p for d in documents for p in d.split("\n\n")]
    assert len({" ".join(p.split()) for p in paragraphs}) == len(paragraphs)


def test_standard_library_is_not_imported_and_always_the_same():
    code = (
        "import hashlib, sys, flextron.data as d; before = set(sys.modules);"
        "print(hashlib.sha256(repr(d.stdlib_documents()).encode()).hexdigest(), *set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=True,
    )
    again = hashlib.sha256(repr(stdlib_documents()).encode()).hexdigest()
    digest, *imported = done.stdout.split()
    assert digest == again
    # what the parser needs for old files, and sysconfig for its own answer
    assert all(name.startswith(("encodings.", "_sysconfigdata")) for name in imported), imported


def test_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match="must come with its sources"):
        stdlib_documents()


def test_documents_part_by_their_text():
    documents = [f"document {i}" for i in range(400)] + ["document 7"]
    train, validation = split_documents(documents, 0.1)
    assert sorted(train + validation) == sorted(documents)
    assert not set(train) & set(validation)
    # 400 independent draws with p = 0.1: mean 40, standard deviation 6; five of them
    assert 10 <= len(validation) <= 70
    more = split_documents([f"document {i}" for i in range(800)], 0.1)[0]
    assert set(train) <= set(more)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("held_out", [0.001, 0.5, 0.999])
def test_both_sides_of_a_split_hold_something(count, held_out):
    documents = [f"text {i}" for i in range(count)]
    train, validation = split_documents(documents, held_out)
    assert train and validation
    assert sorted(train + validation) == documents


def test_single_document_is_cut_at_a_paragraph():
    document = "\n\n".join(f"Paragraph {i} has words." for i in range(20))
    train, validation = split_documents([document], 0.1)
    assert train[0] + validation[0] == document
    assert validation[0].startswith("\n\nParagraph")
    assert 0 < len(validation[0]) < 0.1 * len(document) + 1
    with pytest.raises(ValueError, match="must hold text to part, got 'word'"):
        split_documents(["word"])
    with pytest.raises(ValueError, match="must not be empty"):
        split_documents([])


def test_separators_are_those_of_the_tokenizer():
    texts = ["ab", "c"]
    assert encode(texts, Letters()).tolist() == [10, 11, 12]
    assert encode(texts, Letters(eos=2)).tolist() == [10, 11, 2, 12, 2]
    assert encode(texts, Letters(bos=1, eos=2)).tolist() == [10, 11, 2, 12, 2]
    assert encode(texts, Letters(bos=1, eos=2, adds_bos=True)).tolist() == [1, 10, 11, 2, 1, 12, 2]
    assert encode(texts, Letters(bos=1, adds_bos=True)).dtype == torch.int64


def test_encoding_stops_at_max_tokens():
    tokenizer = Letters(eos=2)
    stream = encode(("abcd" for _ in range(10_000)), tokenizer, max_tokens=102)
    assert len(stream) == 102
    assert tokenizer.seen < 100
    assert torch.equal(stream, encode(["abcd"] * 10_000, Letters(eos=2))[:102])
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        encode(["a"], tokenizer, max_tokens=0)


@pytest.mark.parametrize("held_out", [0.0, 1.0, float("nan")])
def test_the_share_held_out_must_leave_two_sides(held_out):
    with pytest.raises(ValueError, match="held_out must lie between 0 and 1"):
        split_documents(["one", "two"], held_out)


def test_windows_are_spread_and_do_not_overlap():
    stream = torch.arange(103)
    taken = windows(stream, 4, 10)
    assert taken.shape == (4, 10)
    assert taken[:, 0].tolist() == [0, 20, 50, 70]
    assert torch.equal(taken, taken[:, :1] + torch.arange(10))
    assert torch.equal(windows(stream, 10, 10).flatten(), stream[:100])
    with pytest.raises(ValueError, match="tokens must hold 11 windows of 10 tokens, got 103 tokens"):
        windows(stream, 11, 10)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 17])
def test_every_window_once_per_epoch(batch_size):
    batches = Batches(torch.arange(5 * 10 + 4), batch_size, 5, seed=3)
    assert batches.windows_per_epoch == 10
    drawn = torch.cat([next(batches) for _ in range(30)])
    assert drawn.shape == (30 * batch_size, 5)
    for epoch in drawn[: len(drawn) // 10 * 10].view(-1, 10, 5):
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 50, 5))
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(5))


def test_order_depends_on_seed_and_epoch():
    def orders(seed):
        batches = Batches(torch.arange(200), 100, 2, seed)
        return [tuple(next(batches)[:, 0].tolist()) for _ in range(3)]

    assert orders(0) == orders(0)
    assert len({*orders(0), *orders(1), *orders(2)}) == 9


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_position_is_resumed_exactly(before):
    tokens = torch.arange(70)
    one, other = Batches(tokens, 3, 10, seed=1), Batches(tokens, 3, 10, seed=1)
    for _ in range(before):
        next(one)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(6):
        assert torch.equal(next(one), next(other))


@pytest.mark.parametrize(("batch_size", "size"), [(4, 2), (5, 2), (5, 3), (3, 3), (7, 4)])
def test_processes_share_the_batches_of_one(batch_size, size, monkeypatch):
    def of(rank):
        monkeypatch.setattr(ranks.joining, "_now", ranks.ALONE._replace(rank=rank, size=size))
        return ranks.rows_of("train: batch_size", range(batch_size))

    tokens = torch.arange(70)
    whole = Batches(tokens, batch_size, 10, seed=1)
    parts = [Batches(tokens, batch_size, 10, seed=1, rows=of(rank)) for rank in range(size)]
    lengths = {len(part.rows) for part in parts}
    assert max(lengths) - min(lengths) <= 1 and min(lengths) >= 1
    for _ in range(5):
        assert torch.equal(torch.cat([next(part) for part in parts]), next(whole))
    assert {part.state_dict()["drawn"] for part in parts} == {whole.state_dict()["drawn"]}
    # at another number of processes the same windows follow
    again = Batches(tokens, batch_size, 10, seed=1)
    again.load_state_dict(parts[-1].state_dict())
    assert torch.equal(next(again), next(whole))


def test_a_batch_has_a_row_for_every_process(monkeypatch):
    monkeypatch.setattr(ranks.joining, "_now", ranks.ALONE._replace(size=3))
    with pytest.raises(ValueError, match=r"^train: batch_size must be at least 3 for 3 processes, got 2$"):
        ranks.rows_of("train: batch_size", range(2))


def test_a_mixture_has_its_proportions_exactly_and_repeats_what_is_short():
    long, short = torch.arange(40_000), torch.arange(-1, -101, -1)
    batches = Batches(Mixture([long, short], [0.7, 0.3]), 100, 2, seed=5)
    drawn = torch.cat([next(batches) for _ in range(200)])[:, 0]
    for block in drawn.view(2, 10_000):
        assert int((block < 0).sum()) == 3000
    mine = drawn[drawn < 0]
    for epoch in mine.view(-1, 50):
        assert len(set(epoch.tolist())) == 50
    assert len(set(drawn[drawn >= 0].tolist())) == 14_000  # of the long one, no window twice before its end
    # no two streams of one mixture have the same order, and no two seeds
    orders = {
        tuple(next(Batches(Mixture([torch.arange(200)] * 2), 400, 2, seed))[:, 0].tolist()) for seed in (0, 1)
    }
    assert len(orders) == 2


def test_a_mixture_goes_on_from_one_integer_and_is_shared():
    mixture = Mixture([torch.arange(300), torch.arange(1000, 1300), torch.arange(2000, 2300)])
    assert mixture.counts == [3334, 3333, 3333]
    one = Batches(mixture, 7, 10, seed=1)
    one.load_state_dict({"drawn": 9990})  # the third batch begins another block
    other = Batches(mixture, 7, 10, seed=1)
    while other.state_dict()["drawn"] < 9989:
        next(other)
    other.load_state_dict({"drawn": 9990})
    parts = [Batches(mixture, 7, 10, 1, rows) for rows in (range(3), range(3, 7))]
    for part in parts:
        part.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(4):
        batch = next(one)
        assert torch.equal(batch, next(other))
        assert torch.equal(batch, torch.cat([next(part) for part in parts]))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0], "weights must be one for each of the 2 streams, got 1"),
        ([1.0, 0.0], "weights must be positive numbers, got 1, 0"),
        ([1.0, float("nan")], "weights must be positive numbers, got 1, nan"),
        ([1.0, 1e-6], "weights must each be at least 1/10000 of their sum, got 1, 1e-06"),
    ],
)
def test_bad_weights_are_refused(weights, says):
    with pytest.raises(ValueError, match=says):
        Mixture([torch.arange(40)] * 2, weights)


def test_shares_are_whole_and_add_up():
    assert shares(10, [0.7, 0.3]) == [7, 3]
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert sum(shares(10_000, [0.1] * 7)) == 10_000


def test_batches_do_not_touch_the_global_generator():
    state = torch.get_rng_state()
    next(Batches(torch.arange(70), 3, 10))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("tokens", "length", "says"),
    [
        (torch.arange(5), 6, "tokens must hold at least 6 tokens, got 5"),
        (torch.arange(5), 1, "length must be at least 2, got 1"),
        (torch.zeros(2, 5, dtype=torch.int64), 2, r"tokens must be a stream \[tokens\] int64, got \[2, 5\]"),
        (torch.zeros(5), 2, "tokens must be a stream .* torch.float32"),
    ],
)
def test_bad_stream_is_refused(tokens, length, says):
    for use in (lambda: Batches(tokens, 1, length), lambda: windows(tokens, 1, length)):
        with pytest.raises(ValueError, match=says):
            use()
