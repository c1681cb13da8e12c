"""Reads the parent of a conversion: no tensor may be missing or drawn at random, and each one's dtype is kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flextron.checkpoint import opened, stored_dtypes
from flextron.checkpoint.weights import weight_names
from flextron.nn.placement import CPU
from flextron.nn.proof import logits_of, require_close
from flextron.nn.skeleton import fill, parameter_shapes, say_tied, skeleton
from flextron.nn.stock import load_stock
from flextron.nn.storage import common, storage
from flextron.sentences import listed

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_parent(
    source: str | Path, strip_prefix: str | None = None, device: torch.device = CPU
) -> PreTrainedModel:
    """Load the stock model in a directory to a device, in eval mode.

    Its weights have the narrowest dtype that holds all that is stored, as transformers maps them from the files. Its
    attribute ``stored`` maps names to the dtypes in the files. Its configuration says that embeddings are tied if the
    weights are.

    Args:
        source: the directory that `source_of` gives; its weights must be safetensors.
        strip_prefix: a prefix to remove from every tensor's name.

    Raises:
        CheckpointError: there are no weights.
        ValueError: a tensor is missing, has another shape, is not floating-point, or is unknown to the model.
    """
    found = _dtypes_in(source)
    if strip_prefix is not None:
        if other := [name for name in found if not name.startswith(strip_prefix)]:
            raise ValueError(
                f"convert: strip_prefix must begin every name of the parent, got {strip_prefix!r} and {listed(other)}"
            )
        found = {name.removeprefix(strip_prefix): dtype for name, dtype in found.items()}
    widest = _widest(found)
    model = load_stock("convert", "parent", source, widest, strip_prefix)
    # A parameter whose name is not in the files (a tied one, say) gets their widest dtype, so that nothing is lost.
    names = [name for name, _ in model.named_parameters()]
    said = {name: found.get(name, found.get(name.removeprefix("model."))) for name in names}
    if strange := [f"{dtype} in {name}" for name, dtype in said.items() if dtype and dtype not in _DTYPES]:
        raise ValueError(
            f"convert: parent must hold {', '.join(_DTYPES)} weights, got {listed(strange)}; dequantise it first"
        )
    model.stored = {name: _DTYPES[dtype] if dtype else widest for name, dtype in said.items()}
    say_tied(model, model.config)
    return model.eval().to(device)


def dtype_of(parent: PreTrainedModel | Path) -> torch.dtype:
    """The narrowest dtype that holds the weights of a parent in memory or in a directory: what they are read in."""
    if isinstance(parent, Path):
        return _widest(_dtypes_in(parent))
    return common(p.dtype for p in parent.parameters())


def copy_parent(
    parent: PreTrainedModel, proof: Tensor, device: torch.device, used_up: bool = False
) -> PreTrainedModel:
    """Copy a loaded model's parameters and configuration, and nothing else, into what `read_parent` would give.

    A parent that is ``used_up`` hands its memory over where it can, and has no values afterwards.

    Raises:
        ValueError: the parent has other parameters than its configuration says.
        ParityError: the copy computes something else on the tokens ``proof`` [n, L], because the parent has a hook, a
            forward, a module or a buffer of its own. A parent with several dtypes is not tested, since most cannot run.
    """
    stored, widest = storage("convert", parent), dtype_of(parent)
    config = copy.deepcopy(parent.config)
    say_tied(parent, config)
    model = skeleton(config)
    wanted, given = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, parent))
    if wrong := [name for name in wanted | given if _shape(wanted, name) != _shape(given, name)]:
        raise ValueError(
            f"convert: parent must have the parameters that its configuration says, got others: {listed(wrong)}"
        )
    given = {name: given[name].detach() for name in parameter_shapes(model)}
    if len({tensor.dtype for tensor in given.values()}) == 1:
        _require_stock(parent, fill(skeleton(config), given).to(parent.device), proof)
    copies = {name: given.pop(name).to(device, widest, copy=not used_up) for name in [*given]}
    fill(model, copies).to(device)
    if used_up:
        parent.to("meta")
    model.generation_config = copy.deepcopy(parent.generation_config)
    model.stored = stored
    return model


def _require_stock(parent: PreTrainedModel, plain: PreTrainedModel, proof: Tensor) -> None:
    """Raise unless a parent computes what transformers computes with the same configuration and parameters."""
    theirs = dict(parent.named_buffers())
    for name, buffer in plain.named_buffers():  # `half` rounds rotary frequencies, which loading does not
        buffer.data = buffer.to(theirs[name].dtype) if name in theirs else buffer
    whose = "the parent's own, with whatever hooks, modules and buffers it has beside its configuration and parameters"
    require_close("convert", whose, logits_of(parent, proof), logits_of(plain, proof))


def _shape(parameters: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return parameters[name].shape if name in parameters else None


def _widest(found: Mapping[str, str]) -> torch.dtype:
    """What holds the values of these dtypes, as the files name them; others are refused once the tensors are known."""
    return common([_DTYPES[dtype] for dtype in found.values() if dtype in _DTYPES] or [torch.float32])


def _dtypes_in(directory: str | Path) -> dict[str, str]:
    """The dtype of each tensor, from the headers of a model's safetensors files."""
    with opened(directory) as files:
        paths = [files / name for name in weight_names(files)]
    return {name: dtype for path in paths for name, dtype in stored_dtypes(path).items()}
