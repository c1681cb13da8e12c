"""Checks the parent's directory before anything is read: one sentence says why a model cannot be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron.checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, CheckpointError, Files, opened
from flextron.checkpoint.hf import read_config, read_generation_config
from flextron.checkpoint.hub import local
from flextron.checkpoint.room import room_for_model
from flextron.checkpoint.weights import weight_shapes
from flextron.conversion.adapters import refuse_adapter
from flextron.conversion.likeness import as_like
from flextron.conversion.remedies import as_safetensors, text_alone
from flextron.nn.anatomy import FAMILIES, anatomy_of, liken
from flextron.sentences import listed


def room_beside(parent: Any, out_dir: str | Path, force: bool) -> list[str]:
    """`room_for_model` for a conversion, which must not replace the parent itself."""
    if isinstance(parent, str | Path) and Path(parent).resolve() == Path(out_dir).resolve():
        raise ValueError(f"convert: out_dir must be another directory than the parent's, got {out_dir}")
    return room_for_model(out_dir, "convert", force)


def source_of(parent: str | Path, like: str | None = None) -> Path:
    """The directory of a parent, checked; it is fetched from the hub if ``parent`` is an id.

    Raises:
        CheckpointError: the parent is an adapter, quantised, multimodal, pickled or incomplete.
    """
    directory = local(parent)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: must be the directory of a model, got a file")
    refuse_adapter(directory)
    with opened(directory) as files:
        _refuse_quantised(files)
        _refuse_multimodal(files, parent)
        _refuse_pickled(files, parent)
        config, _ = read_config(files, weight_shapes(files))
        liken(config, like)
        with as_like(config):
            anatomy_of(config)
        read_generation_config(files)
    return directory


def _refuse_multimodal(files: Files, parent: str | Path) -> None:
    values = files.read_json(CONFIG_FILE)
    if values.get("model_type") not in FAMILIES and (inner := text_alone(parent, values)):
        raise CheckpointError(
            f"{files / CONFIG_FILE}: must describe a language model alone, got a {values.get('model_type')!r:.40} "
            f"with {inner}"
        )


def _refuse_pickled(files: Files, parent: str | Path) -> None:
    if WEIGHTS_FILE in files or INDEX_FILE in files:
        return
    pickled = sorted(path.name for path in files.directory.glob("*.bin"))
    if pickled or not Path(parent).exists():  # of the hub's files safetensors alone are fetched
        raise CheckpointError(
            f"{parent}: must hold its weights as {WEIGHTS_FILE} or in shards, got {listed(pickled) or 'neither'}; "
            f"this reads pickled weights without running their code, and writes safetensors: {as_safetensors(parent)}"
        )


def _refuse_quantised(files: Files) -> None:
    quantised: Any = files.read_json(CONFIG_FILE).get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{files / CONFIG_FILE}: must describe weights that are not quantised, got quantization_config of "
            f"{str(method or 'an unknown method')[:40]}; dequantise the model first"
        )
