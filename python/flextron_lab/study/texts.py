"""The texts that studies train on and judge by, as streams of tokens."""

from __future__ import annotations

import copy
import json
import lzma
import re
from typing import Any

from torch import Tensor

from flextron.data import encode, split_documents, stdlib_documents
from flextron_lab.demo import stories

_OPENING = re.compile(r"\n\n(?=Once upon a time|One day|One sunny|There once|Once there|Long ago)")
JUDGES = ("openstax", "wikitext2", "python")
STORIES = "tinystories_sample.txt.xz"


def _read(name: str) -> str:
    path = stories.data_folder() / "text" / name
    if not path.is_file():
        raise FileNotFoundError(f"texts: the text must be in $FLEXTRON_DATA/text/{name}, got no such file")
    return lzma.open(path, "rt", encoding="utf-8").read()


def _rows(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in _read(name).splitlines()]


def tiny_stories() -> list[str]:
    """The stories of the sample, one by one, with the single newlines between paragraphs that TinyStories has."""
    return [story.strip().replace("\n\n", "\n") for story in _OPENING.split(_read(STORIES))]


def story_tokens(documents: list[str], tokenizer: Any) -> Tensor:
    """Stories as llama2.c trains on them: one after another, BOS before each and nothing after it."""
    without = copy.deepcopy(tokenizer)  # a copy shares its special tokens
    without.eos_token = None
    return encode(documents, without)


def textbooks(tokenizer: Any, max_tokens: int) -> Tensor:
    """The first tokens of OpenStax's training part."""
    return encode(_rows("openstax_train.jsonl.xz"), tokenizer, max_tokens)


def judge(name: str, tokenizer: Any, max_tokens: int) -> Tensor:
    """The first tokens of a text that nothing is trained on, one of `JUDGES`."""
    if name == "openstax":
        return encode(_rows("openstax_val.jsonl.xz"), tokenizer, max_tokens)
    if name == "wikitext2":
        return encode([_read("wikitext2_raw_test.txt.xz")], tokenizer, max_tokens)
    if name == "python":
        return encode(split_documents(stdlib_documents())[1], tokenizer, max_tokens)
    raise ValueError(f"texts: name must be one of {', '.join(JUDGES)}, got {name}")
