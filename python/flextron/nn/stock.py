"""Load a directory as stock transformers does, but refuse tensors that it would fill in, leave out or reshape."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from flextron.sentences import listed

_NAMES_SHOWN = 3
_PIECE = 1 << 22  # values that are looked at at once


def load_stock(
    who: str,
    what: str,
    source: str | Path,
    dtype: torch.dtype | str = "auto",
    strip_prefix: str | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """The causal LM that stock transformers makes of a directory or hub id; safetensors, or one GGUF file.

    transformers draws random weights for missing tensors and goes on. Here missing tensors are refused by name, and so
    are tensors that the model does not use; buffers of old rotary embeddings pass.

    Args:
        who, what: begin the message: ``convert: parent``.
        source: the directory or id.
        dtype: what the weights have in memory; ``"auto"`` takes what the configuration says, as transformers does.
        strip_prefix: taken off the beginning of every name in the files.
        gguf_file: the name of a GGUF file in ``source``, to read instead.

    Raises:
        ValueError: names or shapes in the files are not those of the model.
    """
    mapping = None if strip_prefix is None else {f"^{re.escape(strip_prefix)}": ""}
    with _quiet():
        # safetensors only: a pickled checkpoint runs whatever code its author put there.
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                key_mapping=mapping,
                gguf_file=gguf_file,
                ignore_mismatched_sizes=True,  # so that they are told, below
                output_loading_info=True,
            )
        except NotImplementedError as error:
            if "aten::equal" not in str(error):
                raise
            # it compares what it is to tie, and one of wrong shape has no values
            raise ValueError(
                f"{who}: {what} must hold embeddings and an lm_head of one shape, which its configuration ties, got two"
            ) from error
    if faults := _faults(info):
        raise ValueError(f"{who}: {what} must hold the tensors of a {type(model).__name__}, got {faults}")
    return model


class Fingerprint(NamedTuple):
    """What a tensor was, without its memory: its shape, its dtype and the sha256 of its values, any NaN being one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sha256: str


def fingerprint(tensor: Tensor) -> Fingerprint:
    """The fingerprint of a tensor, on any device."""
    digest = hashlib.sha256()
    for values in tensor.detach().reshape(-1).split(_PIECE):
        if (unknown := values.isnan()).any():
            values = values.masked_fill(unknown, math.nan)
        digest.update(memoryview(values.cpu().view(torch.uint8).numpy()))
    return Fingerprint(tuple(tensor.shape), tensor.dtype, digest.hexdigest())


def read_back(who: str, directory: Path, written: Mapping[str, Fingerprint]) -> PreTrainedModel:
    """The model that stock transformers makes of files just written.

    Args:
        who: begins the message.
        directory: where the files are.
        written: the fingerprints of the tensors that are meant to be in them, by the parameters' names.

    Raises:
        ValueError: a parameter differs, if only in one bit, or cannot be held in the dtype transformers loads.
    """
    model = load_stock(who, "what was written", directory)
    found = dict(model.named_parameters())
    wrong = [name for name in written.keys() | found.keys() if not _same(written.get(name), found.get(name))]
    if wrong:
        raise ValueError(
            f"{who}: stock transformers must read back the tensors that were written, got others: "
            f"{listed(sorted(wrong), _NAMES_SHOWN)}; nothing was written"
        )
    return model


def _same(written: Fingerprint | None, read: Tensor | None) -> bool:
    """Whether a tensor holds the values that were written."""
    if written is None or read is None:
        return False
    own = read.to(written.dtype)
    if own.dtype != read.dtype and not torch.isclose(own.to(read), read, 0, 0, equal_nan=True).all():
        return False
    return fingerprint(own) == written


def _faults(info: dict[str, Any]) -> str:
    """What transformers found wrong, in one phrase; empty where nothing was."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [
        f"{name} {list(found)} instead of {list(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    faults = [
        f"{fault} {listed(names, _NAMES_SHOWN)}"
        for fault, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    faults += [str(message).splitlines()[0] for message in info["error_msgs"]]
    return "; ".join(faults) + _mend(missing, unexpected)


def _mend(missing: list[str], unexpected: list[str]) -> str:
    """A remedy, where one is obvious."""
    if missing == ["lm_head.weight"] and not unexpected:
        return " (if its embeddings serve as lm_head, tie_word_embeddings in its config.json must be true)"
    wanted = set(missing)
    prefixes = {
        name.removesuffix(end)
        for name in unexpected
        for end in (name[i:] for i in (0, *(j + 1 for j, c in enumerate(name) if c == ".")))
        if end in wanted
    }
    if (
        len(prefixes) == 1
        and (prefix := prefixes.pop())
        and all(name.startswith(prefix) for name in unexpected)
    ):
        return f"; --strip-prefix {prefix} (strip_prefix={prefix!r}) reads them without it"
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its own report of missing tensors."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
