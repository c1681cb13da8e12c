"""Write a sub-network as a Hugging Face directory, and read it back; `flextron.nn.plain` has the layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig

from flextron.checkpoint import (
    ELASTIC_FILE,
    FORMAT,
    WEIGHTS_FILE,
    CheckpointError,
    check_format,
    checksum_of,
    commit,
    load_tensors,
    read_json,
    recover,
    save_tensors,
    verify_checksums,
    write_json,
)
from flextron.checkpoint.hub import local
from flextron.config import ElasticConfig, Widths
from flextron.nn.placement import memory_dtype, one_device
from flextron.nn.plain import LAYOUT_KEY, SIZES, build, layout_of, resize, stock_problem, widths_of
from flextron.nn.skeleton import fill, parameter_shapes, skeleton
from flextron.nn.storage import Dtype

EXPORT_FILE = "export.json"
_CONFIG_FILE = "config.json"


def export(
    model: Any,
    directory: str | Path,
    budget: Widths | float | None = None,
    *,
    layout: str = "auto",
    tokenizer: Any = None,
    **units: Any,
) -> dict[str, Any]:
    """Write a sub-network as a Hugging Face directory, all of it or nothing.

    Args:
        model, budget, units: as for `extract`.
        directory: created when it is not there.
        layout: as for `extract`, but ``"auto"`` is padded where it cannot be uniform: what it writes always
            loads in stock transformers.
        tokenizer: stored too when given.

    Returns:
        What ``export.json`` says: ``layout``, ``widths``, ``params``, ``loads_in`` and, where the layout is
        not uniform, ``note``: one sentence on why and what it costs.

    Raises:
        ValueError: the layout cannot hold these widths, or ``directory`` is an elastic checkpoint.
    """
    directory = Path(directory)
    if (directory / ELASTIC_FILE).is_file():
        raise ValueError(f"export: directory must not be an elastic checkpoint, got {directory}")
    widths = widths_of(model, budget, units)
    chosen = layout_of(layout, model.elastic, widths, "padded")
    plain = build(model, widths, chosen)
    report: dict[str, Any] = {
        "format": FORMAT,
        "layout": chosen,
        "widths": {"mlp": list(widths.mlp), "heads": list(widths.heads), "unit": model.elastic.unit},
        "params": sum(p.numel() for p in plain.parameters()),
        "loads_in": ["flextron.load_plain"]
        if chosen == "ragged"
        else ["transformers", "flextron.load_plain"],
    }
    if note := _note(model.elastic, widths, chosen, report["params"]):
        report["note"] = note
    with commit(directory) as stage:
        plain.config.save_pretrained(stage)
        if plain.generation_config is not None:
            plain.generation_config.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        weights = save_tensors(stage / WEIGHTS_FILE, dict(plain.named_parameters()))
        report["checksums"] = {WEIGHTS_FILE: weights, _CONFIG_FILE: checksum_of(stage / _CONFIG_FILE)}
        write_json(stage / EXPORT_FILE, report)
    return report


def load_plain(
    directory: str | Path, dtype: Dtype = torch.float32, *, device_map: Any = None, **hub: Any
) -> Any:
    """Read an exported sub-network of any layout, or what ``save_pretrained`` of an extracted one wrote.

    Args:
        directory: of the export, or a hub id.
        dtype: of the weights in memory; ``"auto"``: as stored.
        device_map: the one device to load to, or ``"auto"``; None: the CPU.
        hub: ``revision``, ``cache_dir`` and ``token`` of a hub id.

    Raises:
        CheckpointError: one sentence that says what is wrong with which file.
    """
    device = one_device("load_plain", device_map)
    directory = local(directory, **hub)
    recover(directory)
    checksums: dict[str, str] = {}
    if (directory / EXPORT_FILE).is_file():
        report = read_json(directory / EXPORT_FILE)
        check_format(report, directory / EXPORT_FILE)
        checksums = dict(report.get("checksums", {}))
    weights = checksums.pop(WEIGHTS_FILE, None)
    verify_checksums(directory, checksums)

    path = directory / _CONFIG_FILE
    values = read_json(path)
    if values.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: model_type must be known to transformers, got {values.get('model_type')!r}"
        )
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    config.dtype = dtype = memory_dtype("load_plain", dtype, config.dtype)
    model = skeleton(config)
    layers = _layers_in(values, path)
    if layers is not None:
        if len(layers) != config.num_hidden_layers:
            raise CheckpointError(
                f"{path}: {LAYOUT_KEY} must size {config.num_hidden_layers} layers, got {len(layers)}"
            )
        resize(model, layers)
    tensors = load_tensors(directory / WEIGHTS_FILE, parameter_shapes(model), weights)
    fill(model, {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()})
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model if device is None else model.to(device)


def _note(config: ElasticConfig, widths: Widths, layout: str, params: int) -> str | None:
    if layout == "uniform":
        return None
    why = stock_problem(config, widths) or "asked for"
    if layout == "ragged":
        return f"Stock transformers, vLLM and llama.cpp refuse this directory: {why}."
    return f"Padded from {config.params(widths)} to {params} parameters for stock transformers: {why}."


def _layers_in(values: dict[str, Any], path: Path) -> list[dict[str, int]] | None:
    own = values.get(LAYOUT_KEY)
    if own is None:
        return None
    layers = own.get("layers") if isinstance(own, dict) else None
    if not isinstance(layers, list) or not all(
        isinstance(x, dict) and x.keys() == set(SIZES) for x in layers
    ):
        raise CheckpointError(
            f"{path}: {LAYOUT_KEY}.layers must give {', '.join(SIZES)} of each layer, got something else"
        )
    return layers
