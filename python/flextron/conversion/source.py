"""Checks the parent's directory before anything is read: one sentence says why a model cannot be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron.checkpoint import CONFIG_FILE, CheckpointError, Files, opened
from flextron.checkpoint.hf import read_config, read_generation_config
from flextron.checkpoint.hub import local
from flextron.checkpoint.room import room_for_model
from flextron.checkpoint.weights import weight_shapes
from flextron.conversion.likeness import as_like
from flextron.nn.anatomy import anatomy_of, liken

_ADAPTER_FILE = "adapter_config.json"


def room_beside(parent: Any, out_dir: str | Path, force: bool) -> list[str]:
    """`room_for_model` for a conversion, which must not replace the parent itself."""
    if isinstance(parent, str | Path) and Path(parent).resolve() == Path(out_dir).resolve():
        raise ValueError(f"convert: out_dir must be another directory than the parent's, got {out_dir}")
    return room_for_model(out_dir, "convert", force)


def source_of(parent: str | Path, like: str | None = None) -> Path:
    """The directory of a parent, checked; it is fetched from the hub if ``parent`` is an id.

    Raises:
        CheckpointError: the parent is an adapter, is quantised, or is incomplete.
    """
    directory = local(parent)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: must be the directory of a model, got a file")
    if (directory / _ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{directory}: must hold a whole model, got an adapter ({_ADAPTER_FILE}); merge it into its base first "
            "(peft's merge_and_unload and save_pretrained)"
        )
    with opened(directory) as files:
        _refuse_quantised(files)
        config, _ = read_config(files, weight_shapes(files))
        liken(config, like)
        with as_like(config):
            anatomy_of(config)
        read_generation_config(files)
    return directory


def _refuse_quantised(files: Files) -> None:
    quantised: Any = files.read_json(CONFIG_FILE).get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{files / CONFIG_FILE}: must describe weights that are not quantised, got quantization_config of "
            f"{str(method or 'an unknown method')[:40]}; dequantise the model first"
        )
