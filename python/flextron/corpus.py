"""The text that stages learn from and are judged by, as streams and windows of tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextron import data as text
from flextron import ranks
from flextron.config import count
from flextron.data import Mixture, Tokens
from flextron.tokens.folder import TokenFolder, is_token_folder


@dataclass(frozen=True)
class Corpus:
    """Two token streams of different documents: one to calibrate, train and route on, and one to judge by."""

    train: Tokens
    held_out: Tokens


@dataclass(frozen=True)
class Mix:
    """Several texts, of which tokens are drawn in given proportions: ``Mix(["web/", "code/"], [0.7, 0.3])``.

    Attributes:
        texts: each as a stage takes it alone.
        weights: shares of the tokens; by default the lengths of the texts.
    """

    texts: Sequence[Any]
    weights: Sequence[float] | None = None


PARENT = "parent:"  # with a number behind it: so many tokens that the parent of a checkpoint writes, see own_text.py

# As `read_documents` takes it, a folder that `tokenize` has written, a mix of them, a corpus that is encoded already,
# ``"parent:TOKENS"`` where a stage has a checkpoint's parent at hand, or None: the documentation that comes with
# Python; to a stage that changes weights, what the parent writes.
Data = str | Path | text.Text | Mix | Corpus | None


def may_name_a_field(source: str | Path) -> bool:
    """Whether a `Text` of this source may say which field holds its documents."""
    return not str(source).startswith(PARENT) and not is_token_folder(source) and text.has_fields(source)


def documents(data: str | Path | text.Text | None = None) -> tuple[list[str], list[str]]:
    """Read ``data``, by default the documentation that comes with Python: (to train on, to judge by)."""
    if isinstance(data, Mix) or is_token_folder(data):
        got = "several" if isinstance(data, Mix) else f"the tokens in {data}"
        raise ValueError(f"text: data must be one text that is not tokenised yet, got {got}")
    return text.split_documents(text.stdlib_documents() if data is None else text.read_documents(data))


def encode(parts: tuple[list[str], list[str]], tokenizer: Any) -> Corpus:
    """The two parts of `documents` as token streams."""
    return Corpus(*(text.encode(part, tokenizer) for part in parts))


def corpus(tokenizer: Any, data: Data = None) -> Corpus:
    """Open ``data`` where it is tokenised already; else read and encode it, on one of the processes that share it."""
    if isinstance(data, Corpus):
        return data
    if isinstance(data, Mix):
        found = [corpus(tokenizer, one) for one in data.texts]
        weights = data.weights
        sides = ([c.train for c in found], [c.held_out for c in found])
        if weights is None:
            weights = [float(len(stream)) for stream in sides[0]]  # type: ignore[arg-type]
        return Corpus(*(Mixture(side, weights) for side in sides))  # type: ignore[arg-type]
    path = data.path if isinstance(data, text.Text) else data
    if str(path).startswith(PARENT):
        raise ValueError(
            f"text: the parent's own is for stages that change weights, got {path}; elsewhere name its file"
        )
    if path is not None and is_token_folder(path):
        if isinstance(data, text.Text) and data.field is not None:
            raise ValueError(
                f"text: field must be given for text, got {data.field!r} for the tokens in {path}"
            )
        folder = TokenFolder(path)
        folder.check(tokenizer)
        return Corpus(folder.train, folder.held_out)
    return _encoded_once(tokenizer, data)


def _encoded_once(tokenizer: Any, data: Any) -> Corpus:
    """Let rank 0 read and encode, and give the others its tokens, or its error."""
    if ranks.now().size == 1:
        return encode(documents(data), tokenizer)
    found, problem = None, None
    if ranks.is_first():
        try:
            found = encode(documents(data), tokenizer)
        except (ValueError, OSError, ImportError) as error:
            problem = error
    sides = [len(found.train), len(found.held_out)] if found is not None else None  # type: ignore[arg-type]
    facts: dict[str, Any] = ranks.shared({"problem": problem and str(problem), "sides": sides})
    if facts["problem"] is not None:
        raise problem or ValueError(facts["problem"])
    own = (
        [found.train, found.held_out]
        if found
        else [torch.empty(n, dtype=torch.int64) for n in facts["sides"]]
    )
    return Corpus(*map(ranks.shared, own))


def held_out_windows(tokenizer: Any, data: Data, samples: int, length: int) -> Tensor:
    """[n, length] windows of the text that no stage trains on."""
    return windows(corpus(tokenizer, data).held_out, samples, length, "held out")


def windows(stream: Tokens, samples: int, length: int, who: str | None = None) -> Tensor:
    """[n, length] windows of a stream, as far as it reaches; of a mixture, each stream's share of them.

    Where it does not reach for ``samples`` of ``length``, a warning says so, unless ``who`` is None.
    """
    samples, length = count("text: samples", samples), count("text: length", length)
    if isinstance(stream, Mixture):
        shares = text.shares(samples, stream.weights)
        parts = [(part, n) for part, n in zip(stream.streams, shares, strict=True) if n]
    else:
        parts = [(text.held(stream), samples)]
    there = min(length, *(len(part) for part, _ in parts))
    found = torch.cat([text.windows(part, min(n, len(part) // there), there) for part, n in parts])
    if who is not None and found.shape != (samples, length):
        warnings.warn(
            f"{who}: the text has {len(found)} sequences of {there} tokens where {samples} of {length} were asked for",
            stacklevel=3,
        )
    return found
