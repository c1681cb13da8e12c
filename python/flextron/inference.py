"""Load an elastic checkpoint and let it write: what the user of a finished model needs, and no trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flextron.artefacts.directory import ElasticDirectory
from flextron.checkpoint.hub import local
from flextron.config import count
from flextron.nn.placement import Device, device_of_call
from flextron.nn.protocol import Elastic
from flextron.nn.storage import Dtype


def from_pretrained(
    directory: str | Path,
    dtype: Dtype | None = None,
    *,
    device: Device = "auto",
    device_map: Any = None,
    **hub: Any,
) -> Elastic:
    """Load an elastic checkpoint: a transformers causal LM whose layers are elastic, with its budget dial.

    Args:
        directory: written by `convert` (and `train`, `profile`, `route`), or the id of one on the hub.
        dtype: the weights' dtype in memory: ``"bfloat16"``, a torch dtype, or ``"auto"``, the one they are stored in;
            None: ``"auto"`` on a GPU, float32 on a CPU.
        device: where to load to: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"``: the first GPU, else the CPU.
        device_map: the same under transformers' name, also ``{"": device}``.
        hub: ``revision``, ``cache_dir`` and ``token`` of a hub id.

    Raises:
        CheckpointError: one sentence that says what is wrong with which file.
        ValueError: what is wrong with ``dtype`` or ``device``, in one sentence.
    """
    chosen = device_of_call("from_pretrained", device, device_map)
    with ElasticDirectory.open(local(directory, **hub)) as checkpoint:
        return checkpoint.equipped(dtype, chosen)


def generate(
    model: Elastic, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 48, **budget: Any
) -> str:
    """Greedy continuation of a prompt at the model's present budget, or at that of `ElasticModel.generate`."""
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not encoded["input_ids"].numel():
        raise ValueError(f"generate: prompt must have at least one token, got {prompt!r}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    wanted = count("generate: max_new_tokens", max_new_tokens)
    out = model.generate(**encoded, max_new_tokens=wanted, do_sample=False, pad_token_id=pad, **budget)
    return tokenizer.decode(out[0], skip_special_tokens=True)
