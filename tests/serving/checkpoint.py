"""A tiny elastic checkpoint that vLLM serves on a CPU (which takes heads of 32), with tables of whatever machine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nn.models import small_model
from routing.synthetic import make_table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flextron import from_pretrained, make_elastic
from flextron.artefacts.elastic_model import save_elastic
from flextron.artefacts.latency_files import save_tables
from flextron.artefacts.machine import machine_on


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and two more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *alphabet])}
    own = Tokenizer(models.BPE(vocabulary, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def build(
    directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """An elastic checkpoint of random weights, and tables in which a width costs what it is."""
    shape = dict(
        hidden_size=64, head_dim=32, intermediate_size=80, vocab_size=258, max_position_embeddings=512
    )
    model = make_elastic(small_model(family, "4:1", **(shape | overrides)))
    save_elastic(model, directory, tokenizer())
    here = machine_on(torch.device("cpu"), dtype)
    save_tables(
        [replace(make_table(model.elastic, phase), machine=here) for phase in ("prefill", "decode")],
        directory,
    )
    return directory


def tokens_of(directory: Path, requests: list[tuple[list[int], float, int]]) -> list[list[int]]:
    """What `generate` gives each request: its prompt, its budget and its number of new tokens."""
    model = from_pretrained(directory)
    found = []
    for ids, budget, new in requests:
        rules = dict(
            max_new_tokens=new, min_new_tokens=new, eos_token_id=None, pad_token_id=0, do_sample=False
        )
        out = model.generate(torch.tensor([ids]), budget=budget, **rules)
        found.append(out[0, len(ids) :].tolist())
    return found


if __name__ == "__main__":  # for tests in the environment of vLLM, whose transformers is older
    command, directory, *family = sys.argv[1:]
    if command == "build":
        build(Path(directory), *family)
    else:
        print(json.dumps(tokens_of(Path(directory), json.load(sys.stdin))))
