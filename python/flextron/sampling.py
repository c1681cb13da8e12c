"""Text that a model writes by itself: what to train on where there is no corpus, and in distribution for any parent.

Documents are sampled from nothing but the token that stands between documents, as data-free distillation does it (Liu
et al. 2023, arXiv 2305.17888). One file of JSON lines, which every stage takes as its ``--data``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from flextron.checkpoint import CheckpointError
from flextron.checkpoint.io import read_lines, replacing
from flextron.data import seeded, separators
from flextron.nn.protocol import Elastic

Progress = Callable[[int, int], Any]  # (tokens written, tokens asked for)


class Drawn(LogitsProcessor):
    """Leaves one token of each row, drawn by what the logits say, so that a greedy step takes it.

    One uniform number a row, and the cumulative sum; torch's multinomial draws an exponential for every token of the
    vocabulary, which takes as long as the model itself.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = (scores.float() / self.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        uniform = 1 - torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)  # above 0
        token = torch.searchsorted(below, uniform * below[:, -1:])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def sample_documents(
    model: Elastic,
    tokenizer: Any,
    file: str | Path,
    *,
    tokens: int,
    length: int = 512,
    batch_size: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Let a model write documents, as it is set, until there are as many tokens as asked for.

    A batch is written when it is done, and has a seed of its own: a killed call that is repeated goes on, and one that
    asks for more tokens adds them, with the documents that a single call would have written.

    Args:
        model: whatever generates; its budget is that which it is set to.
        tokenizer: the model's, which must know a token that ends or begins documents.
        file: JSON lines, ``{"text": .., "tokens": .., ..}`` each.
        tokens: how many to write at least; documents are not cut short for it.
        length: tokens in a document at most.
        batch_size: documents that are written at once.
        temperature: that the logits are divided by, above 0; nothing else restricts what is drawn.
        seed: of what is drawn.
        facts: what else must be the same for a call to go on, such as a hash of the weights; they are in every line.
        restart: replace what is there.
        progress: called after every batch.

    Returns:
        ``documents``, ``tokens`` and how many of these were there already, ``resumed``.

    Raises:
        ValueError: an argument is out of range, the tokenizer has no such token, or a whole batch is empty.
        CheckpointError: the file was made in another way.
    """
    for name, value in (("tokens", tokens), ("batch_size", batch_size), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"sample: {name} must be above 0, got {value}")
    if length < 2:
        raise ValueError(f"sample: length must be at least 2, got {length}")
    before, after = separators(tokenizer)
    if not before + after:
        raise ValueError("sample: the tokenizer must have a token between documents, got neither BOS nor EOS")
    made = {"seed": seed, "temperature": temperature, "length": length, "batch": batch_size, **(facts or {})}
    file = Path(file)
    lines = [] if restart or not file.exists() else read_lines(file)
    for name, value in made.items():
        if lines and lines[0].get(name) != value:
            raise CheckpointError(
                f"sample: {file} must be new or made by the same call, got {name} {lines[0].get(name)!r}, not "
                f"{value!r}; --restart replaces it"
            )
    resumed = sum(line["tokens"] for line in lines)
    start = torch.tensor((before or after)[-1:], device=model.device).expand(batch_size, 1)
    ends = after[0] if after else -1
    written = resumed
    while written < tokens:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seeded(f"sample/{seed}/{len(lines) // batch_size}").initial_seed())
            found = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=length,
                do_sample=False,
                logits_processor=LogitsProcessorList([Drawn(temperature)]),
                repetition_penalty=1.0,
                eos_token_id=after or None,
                pad_token_id=ends if after else None,
            )
        drawn = [row[: row.index(ends)] if ends in row else row for row in found[:, 1:].tolist()]
        if not any(drawn):
            raise ValueError(
                f"sample: the model must write something, got {batch_size} documents of no token"
            )
        for own in drawn:
            lines.append({"text": tokenizer.decode(own), "tokens": len(own), **made})
            written += len(own)
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if progress:
            progress(min(written, tokens), tokens)
    return {"documents": len(lines), "tokens": written, "resumed": resumed}
