"""Commands that make something convertible of what is not: a message ends in one, to be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from flextron.nn.anatomy import FAMILIES

_AS_SAFETENSORS = """\
import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; a, b = sys.argv[1:]; \
M.from_pretrained(a, dtype="auto").save_pretrained(b); T.from_pretrained(a).save_pretrained(b)"""
# The text model has the memory of the whole one's parts: its own are never made.
_TEXT_ALONE = """\
import sys, torch; from transformers import AutoModelForCausalLM as M, AutoModelForImageTextToText as V, \
AutoTokenizer as T; a, b = sys.argv[1:]; v = V.from_pretrained(a, dtype="auto"); c = v.config.get_text_config(); \
c.tie_word_embeddings = v.lm_head.weight is v.get_input_embeddings().weight; torch.set_default_device("meta"); \
m = M.from_config(c); torch.set_default_device(None); m.model = v.model.language_model; m.lm_head = v.lm_head; \
m.generation_config = v.generation_config; m.save_pretrained(b); T.from_pretrained(a).save_pretrained(b)"""


def _command(program: str, source: str | Path, ending: str) -> str:
    return f"python -c {shlex.quote(program)} {shlex.quote(str(source))} {shlex.quote(Path(source).name + ending)}"


def as_safetensors(source: str | Path) -> str:
    """The command that writes a model whose weights are pickled as safetensors, with its tokenizer.

    transformers unpickles tensors only (``weights_only``), so that a file cannot run code.
    """
    return _command(_AS_SAFETENSORS, source, "-safetensors")


def text_alone(source: str | Path, values: dict[str, Any]) -> str | None:
    """What the language model in a multimodal configuration is, and how to get it; None where there is none inside."""
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        return None
    family = inner.get("model_type")
    if family in FAMILIES:
        return f"a {family} inside; this writes it alone: {_command(_TEXT_ALONE, source, '-text')}"
    said = f"{family!r:.40} inside, which is not in the table of families"
    if family in {config.model_type for config in AutoModelForCausalLM._model_mapping}:
        return f"{said}; this writes it alone, for convert --like: {_command(_TEXT_ALONE, source, '-text')}"
    return f"{said} and which transformers has no causal LM of"
