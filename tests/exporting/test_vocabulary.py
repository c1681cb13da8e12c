"""A tokenizer in a GGUF file: llama.cpp splits text as transformers does, and knows its template."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from nn.models import small_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flextron.exporting import export_gguf
from flextron.exporting.vocabulary import _ENDINGS, _SPLIT, _TEKKEN
from flextron.nn import elastic_config, make_elastic

sys.path.append(str(Path(__file__).resolve().parents[2] / "python" / "benchmarks"))
TEXT = (
    "The quick brown fox's 13 lazy dogs; they don't mind 2024 YEARS.\n\n"
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — naïve café, 東京 😀!\tEnd  \n"
)
SPLITS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(_ENDINGS + _SPLIT % r"\p{N}{1,3}"), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(_ENDINGS + _SPLIT % r"\p{N}"), "isolated")],
    "tekken": [pre_tokenizers.Split(Regex(_TEKKEN), "isolated")],
}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>"]


def bytes_tokenizer(name: str) -> Any:
    """Byte-level pairs, split as ``name`` says."""
    backend = Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.Sequence([*SPLITS[name], last]),
        decoders.ByteLevel(),
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=letters)
    )
    return finished(backend)


def pieces_tokenizer() -> Any:
    """Pairs of SentencePiece's kind: spaces are letters, and unknown letters are bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))]
    text = [
        line.strip().replace(" ", "▁") for line in Path(__file__).read_text(encoding="utf-8").splitlines()
    ]
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=640, special_tokens=special))
    described = json.loads(backend.to_str())
    described["added_tokens"] = described["added_tokens"][: len(SPECIAL)]  # the bytes are ordinary tokens
    return finished(Tokenizer.from_str(json.dumps(described)))


def finished(backend: Any) -> Any:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_prefix_space=None
    )
    found.chat_template = TEMPLATE
    return found


def exported(path: Path, tokenizer: Any) -> dict[str, Any]:
    model = small_model(vocab_size=650)
    make_elastic(model, elastic_config(model))
    export_gguf(model, path, model.elastic.smallest(), tokenizer=tokenizer)
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", [*SPLITS, "pieces"])
def test_the_same_tokens_in_llama_cpp(tmp_path: Path, name: str) -> None:
    tokenizer = pieces_tokenizer() if name == "pieces" else bytes_tokenizer(name)
    fields = exported(tmp_path / "x.gguf", tokenizer)
    assert fields["tokenizer.ggml.model"] == ("llama" if name == "pieces" else "gpt2")
    assert fields.get("tokenizer.ggml.pre", name) == name
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.add_bos_token"]
    assert not fields["tokenizer.ggml.add_eos_token"]
    assert (
        len(fields["tokenizer.ggml.tokens"]) == 650 and fields["tokenizer.ggml.token_type"][-1] == 5
    )  # unused
    assert fields["tokenizer.chat_template"] == TEMPLATE
    pytest.importorskip(
        "xllamacpp", reason="llama.cpp is not installed: `make hosts` installs it and runs this"
    )
    from llama_cpp_rival import LlamaCpp

    host = LlamaCpp(tmp_path / "x.gguf", 1, 64)
    for text in (TEXT, "the lazy fox", "a</s>b", "is no tokenizer's test", *TEXT.splitlines()):
        assert host.tokenize(text) == tokenizer(text)["input_ids"], text
    assert host.chat_template() == TEMPLATE
    host.close()


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    model = small_model(vocab_size=650)
    make_elastic(model, elastic_config(model))
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    other = bytes_tokenizer("gpt-2")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for tokenizer, message in (
        (words, "must merge pairs .BPE. .*, got WordLevel"),
        (other, "got Whitespace"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            export_gguf(model, tmp_path / "x.gguf", model.elastic.smallest(), tokenizer=tokenizer)
    assert not [*tmp_path.iterdir()]
