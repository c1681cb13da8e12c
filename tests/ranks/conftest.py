"""A tiny parent, a text, and a checkpoint made of both, profiled; what a command may not change is hashed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from nn.models import small_model
from routing.synthetic import make_table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flextron import pipeline
from flextron.artefacts.latency_files import save_tables
from flextron.artefacts.machine import machine_of
from flextron.inference import from_pretrained

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away"),
    *("from", "old", "red", "house", "by", "sea", "while", "it", "rained"),
)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with ``parent``, ``text.jsonl`` and ``elastic``."""
    root = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=60))}) for _ in range(60)]
    (root / "text.jsonl").write_text("\n".join(lines))
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", *WORDS])}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = small_model(vocab_size=64)
    model.save_pretrained(root / "parent")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(root / "parent")
    pipeline.convert(
        root / "parent", root / "elastic", data=root / "text.jsonl", samples=14, length=16, device="cpu"
    )
    model = from_pretrained(root / "elastic", device="cpu")
    machine = machine_of(model) | {"threads": 1}
    table = replace(make_table(model.elastic, base=0.1), machine=machine, adaptive=(0.1, 1.1))
    save_tables([table], root / "elastic")
    return root
