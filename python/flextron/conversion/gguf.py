"""Reads a parent from a GGUF file: transformers makes plain float32 weights of what is quantised in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from flextron.artefacts.ladder import Ladder
from flextron.checkpoint import CheckpointError
from flextron.checkpoint.hf import foreign
from flextron.checkpoint.schema import build, checking
from flextron.config import ElasticConfig
from flextron.conversion.likeness import as_like
from flextron.nn.anatomy import anatomy_of, liken
from flextron.nn.stock import load_stock

ELASTIC_KEY, LADDER_KEY = "flextron.elastic", "flextron.ladder"  # JSON, where a file is an elastic model's
_MAGIC = b"GGUF"


def is_gguf(parent: Any) -> bool:
    """Whether a parent is named by the path of a GGUF file."""
    return isinstance(parent, str | Path) and Path(parent).suffix == ".gguf"


def read_gguf(path: str | Path, like: str | None = None) -> tuple[PreTrainedModel, Any]:
    """The model, float32 on the CPU, and the tokenizer that transformers makes of a GGUF file.

    Raises:
        CheckpointError: there is no such file, or transformers does not read it.
        ModuleNotFoundError: the package gguf is not installed.
        NotImplementedError: the family is not in the table; nothing was dequantised yet.
    """
    import gguf  # noqa: F401  # the command line says how to install it

    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{path}: must be a GGUF file, got nothing there")
    with path.open("rb") as file:
        if (begin := file.read(len(_MAGIC))) != _MAGIC:
            raise CheckpointError(f"{path}: must be a GGUF file, got one that begins with {begin!r}")
    folder, name = path.resolve().parent, path.name
    with foreign(path, "a GGUF file that transformers reads", (NotImplementedError, CheckpointError)):
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        liken(config, like)
        with as_like(config):
            anatomy_of(config)
        _refuse_factors(path)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = load_stock("convert", "parent", folder, torch.float32, gguf_file=name)
    del model.config.quantization_config
    return model.eval(), tokenizer


def _refuse_factors(path: Path) -> None:
    """Refuse a file whose rotations are scaled by factors, which transformers drops without a word."""
    import gguf

    if any(t.name == "rope_freqs.weight" for t in gguf.GGUFReader(path).tensors):
        raise CheckpointError(
            f"{path}: must be a GGUF file that transformers reads, got factors of rotations (rope_freqs.weight), which "
            "it would drop; convert the safetensors of the same model"
        )


def elastic_in(path: str | Path) -> tuple[ElasticConfig, Ladder] | None:
    """The description and the ladder of the elastic model that a GGUF file holds; None where it holds another.

    Raises:
        CheckpointError: they are damaged, or the file is.
    """
    import gguf

    path = Path(path).expanduser()
    with foreign(path, "a GGUF file"):
        fields = gguf.GGUFReader(path).fields
        found = {key: fields[key].contents() for key in (ELASTIC_KEY, LADDER_KEY) if key in fields}
    if not found:
        return None
    with foreign(path, f"a GGUF file with {ELASTIC_KEY} and {LADDER_KEY} in JSON"):
        values, chain = (json.loads(found[key]) for key in (ELASTIC_KEY, LADDER_KEY))
    ladder = build(Ladder, chain, path, LADDER_KEY)
    with checking(path):
        config = ElasticConfig.from_dict(values)
        ladder.check(config)
    return config, ladder
