"""The text that stages learn from and are judged by, as streams and windows of tokens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flextron import data as text
from flextron.config import count


@dataclass(frozen=True)
class Corpus:
    """Two token streams of different documents: one to calibrate, train and route on, and one to judge by."""

    train: Tensor
    held_out: Tensor


# As `read_documents` takes it, a corpus that is encoded already, or None: the documentation that comes with Python.
Data = str | Path | text.Text | Corpus | None


def documents(data: str | Path | text.Text | None = None) -> tuple[list[str], list[str]]:
    """Read ``data``, by default the documentation that comes with Python: (to train on, to judge by)."""
    return text.split_documents(text.stdlib_documents() if data is None else text.read_documents(data))


def encode(parts: tuple[list[str], list[str]], tokenizer: Any) -> Corpus:
    """The two parts of `documents` as token streams."""
    return Corpus(*(text.encode(part, tokenizer) for part in parts))


def corpus(tokenizer: Any, data: Data = None) -> Corpus:
    """Read and encode ``data``."""
    return data if isinstance(data, Corpus) else encode(documents(data), tokenizer)


def held_out_windows(tokenizer: Any, data: Data, samples: int, length: int) -> Tensor:
    """[n, length] windows of the text that no stage trains on."""
    return windows(corpus(tokenizer, data).held_out, samples, length, "held out")


def windows(stream: Tensor, samples: int, length: int, who: str | None = None) -> Tensor:
    """[n, length] windows of a stream, as far as it reaches.

    Where it does not reach for ``samples`` of ``length``, a warning says so, unless ``who`` is None.
    """
    samples, length = count("text: samples", samples), count("text: length", length)
    there = min(length, stream.numel())
    found = text.windows(stream, min(samples, stream.numel() // there), there)
    if who is not None and found.shape != (samples, length):
        warnings.warn(
            f"{who}: the text has {len(found)} sequences of {there} tokens where {samples} of {length} were asked for",
            stacklevel=3,
        )
    return found
