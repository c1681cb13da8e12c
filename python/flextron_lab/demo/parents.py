"""The models that a demonstration can start from: a name becomes a loaded parent with its tokenizer."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextron.checkpoint.hf import read_tokenizer
from flextron.conversion.parent import read_parent
from flextron.conversion.source import source_of
from flextron.data import split_documents, stdlib_documents
from flextron.nn.protocol import Elastic
from flextron.nn.stock import load_stock
from flextron.nn.storage import common
from flextron_lab.demo import smollm2, stories, tiny

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


@dataclass(frozen=True)
class Parent:
    """A pretrained model as it was before anything elastic happened to it.

    Attributes:
        model: transformers causal LM in float32 and eval mode.
        tokenizer: the model's transformers tokenizer.
        name: the name that was asked for.
        description: one line for reports.
        notes: what a reader of the figures must know; may be empty.
    """

    model: Elastic
    tokenizer: Any
    name: str
    description: str
    notes: str = ""


def load_parent(
    name: str,
    out_dir: str | Path | None = None,
    progress: Progress | None = None,
    documents: Sequence[str] | None = None,
) -> Parent:
    """Load, fetch or train the parent called ``name``.

    Args:
        name: ``smollm2``, ``tiny``, ``stories260k``, ``stories15m``, a model directory, or a hub id.
        out_dir: directory in which to save the parent as an ordinary Hugging Face model; None saves nothing.
        progress: called with the name of the work, the steps done and the steps in all.
        documents: text that ``tiny`` is trained on; by default the standard library's documentation without the part
            that `flextron.data.split_documents` holds out. Other parents need no text.

    Raises:
        FileNotFoundError: the directory or model does not exist, or its data is not on this machine.
        CheckpointError: the checkpoint is incomplete, or the hub does not give it.
        NotImplementedError: the model's family cannot be made elastic.
        ConnectionError: a file must be downloaded and cannot be.
    """
    report = progress or (lambda what, done, total: None)
    match name:
        case "smollm2":
            parent = _smollm2(report)
        case "tiny":
            parent = _tiny(report, documents)
        case "stories260k":
            parent = _stories260k(report)
        case "stories15m":
            parent = _stories15m(report)
        case _:
            parent = _checkpoint(name)
    parent.model.float().eval().requires_grad_(True)
    if out_dir is not None:
        parent.model.save_pretrained(out_dir)
        parent.tokenizer.save_pretrained(out_dir)
    return parent


def tiny_parents() -> tuple[str, ...]:
    """The parents of ``--parent tiny``: the one trained on the spot, and stories260K where its files are."""
    return ("tiny", "stories260k") if stories.find() else ("tiny",)


def _smollm2(progress: Progress) -> Parent:
    folder = smollm2.fetch(progress)
    progress("reading SmolLM2-135M-Instruct", 0, 1)
    with redirect_stderr(io.StringIO()):  # transformers shows bars for the same work
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=smollm2.GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=smollm2.GGUF)
    # The weights are plain float32 by now; flags that still call them quantised would make save_pretrained refuse.
    model.is_quantized = False
    model.hf_quantizer = None
    del model.config.quantization_config
    progress("reading SmolLM2-135M-Instruct", 1, 1)
    return Parent(
        model,
        tokenizer,
        "smollm2",
        "SmolLM2-135M-Instruct (30 layers, width 576, 9 query heads in 3 groups)",
        f"Read from {smollm2.GGUF} of {smollm2.REQUIREMENT}: the baseline is the dequantised 4-bit model.",
    )


def _tiny(progress: Progress, documents: Sequence[str] | None) -> Parent:
    if documents is None:
        documents, _ = split_documents(stdlib_documents())
    tokenizer = tiny.train_tokenizer(documents)
    model, loss = tiny.train_model(tiny.token_stream(documents, tokenizer), tiny.STEPS, progress)
    size = sum(p.numel() for p in model.parameters())
    return Parent(
        model,
        tokenizer,
        "tiny",
        f"a Llama of {size:,} parameters trained on the spot",
        f"Trained from nothing for {tiny.STEPS} steps; its last training loss was {loss:.2f} nats a token.",
    )


def _stories_folder(name: str, files: tuple[str, ...]) -> Path:
    folder = stories.find(name, files)
    if folder is None:
        raise FileNotFoundError(
            f"load_parent: {name} must have its files {' and '.join(files)} in "
            f"$FLEXTRON_DATA/{name}, got no such folder"
        )
    return folder


def _stories15m(progress: Progress) -> Parent:
    folder = _stories_folder("stories15m", stories.FILES_15M)
    progress("reading stories15M", 0, 1)
    model = load_stock("load_parent", "stories15m", folder, torch.float32)
    tokenizer = stories.read_tokenizer(folder / stories.FILES_15M[2])
    progress("reading stories15M", 1, 1)
    return Parent(
        model,
        tokenizer,
        "stories15m",
        "stories15M, a Llama of 15,191,712 parameters trained on TinyStories",
        "Its published weights were rounded to float16.",
    )


def _stories260k(progress: Progress) -> Parent:
    folder = _stories_folder("stories260k", stories.FILES)
    progress("reading stories260K", 0, 1)
    model = stories.read_model(folder / stories.FILES[0])
    tokenizer = stories.read_tokenizer(folder / stories.FILES[1])
    progress("reading stories260K", 1, 1)
    return Parent(
        model, tokenizer, "stories260k", "stories260K, a Llama of 260,032 parameters trained on TinyStories"
    )


def _checkpoint(name: str) -> Parent:
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not name or not (is_id or Path(name).expanduser().exists()):
        raise FileNotFoundError(
            "load_parent: parent must be smollm2, tiny, stories260k, stories15m, a model directory or a hub id such "
            f"as HuggingFaceTB/SmolLM2-135M, got {name!r}"
        )
    folder = source_of(name)
    model = read_parent(folder)
    model.to(common([torch.float32, model.dtype]))  # it is judged in float32, as others are
    return Parent(model, read_tokenizer(folder), name, f"{type(model).__name__} from {name}")
