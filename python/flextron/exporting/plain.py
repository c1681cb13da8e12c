"""Write a sub-network as a Hugging Face directory, and read it back; `flextron.nn.plain` has the layouts."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flextron.artefacts.elastic_model import pending, to_write
from flextron.checkpoint import (
    CONFIG_FILE,
    ELASTIC_FILE,
    FORMAT,
    CheckpointError,
    Files,
    check_format,
    checksum_of,
    commit,
    opened,
    read_json,
    write_json,
)
from flextron.checkpoint.card import write_card
from flextron.checkpoint.hf import foreign, read_config, read_generation_config, write_tokenizer
from flextron.checkpoint.hub import local
from flextron.checkpoint.room import room_for_model
from flextron.checkpoint.schema import build as build_from
from flextron.checkpoint.schema import checksums_of
from flextron.checkpoint.weights import load_weights, save_weights, verify_beside, weight_shapes
from flextron.config import ElasticConfig, Widths
from flextron.exporting.remote_code import MODELING_FILE, PER_LAYER_KEY, remote_code, remote_problem
from flextron.nn.placement import Device, device_of_call, memory_dtype
from flextron.nn.plain import LAYOUT_KEY, SIZES, build, layout_of, resize, stock_problem, widths_of
from flextron.nn.proof import difference, in_dtype, logits_of, require_close, require_same
from flextron.nn.protocol import Elastic
from flextron.nn.skeleton import fill, parameter_shapes, skeleton
from flextron.nn.stock import Fingerprint, read_back
from flextron.nn.storage import Dtype, common, counted, name_of, round_in_place, storage

EXPORT_FILE = "export.json"
# what reads a layout, beside load_plain
_LOADS_IN = {
    "uniform": "transformers",
    "padded": "transformers",
    "ragged": "transformers, trust_remote_code=True",
}
_PROOF_SHAPE = (2, 64)  # sequences, tokens
_WHOSE = "the elastic model's at the budget"


def export(
    model: Elastic,
    directory: str | Path,
    budget: Widths | float | None = None,
    *,
    layout: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "auto",
    force: bool = False,
    **units: Any,
) -> dict[str, Any]:
    """Write a sub-network as a Hugging Face directory, all of it or nothing.

    The new files are read back before they replace anything, by stock transformers if it can load the layout. Every
    tensor must be what was meant, and the logits must be those of the elastic model at the budget.

    Args:
        model, budget, units: what `extract` takes.
        directory: where to write; it is created if it does not exist.
        layout: what `extract` takes, except that ``"auto"`` pads what cannot be uniform, so that stock transformers
            loads whatever ``"auto"`` writes.
        tokenizer: is stored too, if there is one.
        dtype: what weights are stored in: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``, which keeps each
            tensor's dtype in the checkpoint that the model was loaded from.
        force: replace the model that is in ``directory``, which must be new or empty otherwise.

    Returns:
        The contents of ``export.json``: ``layout``, ``widths``, ``params``, ``dtypes``, ``loads_in``, ``parity`` and,
        if the layout is not uniform, ``note``, a sentence on why and what it costs. ``parity`` compares the elastic
        model with what was read back: ``max_abs``, ``max_rel`` (relative to the largest logit), ``tokens``, the
        ``dtype`` that was read, and ``rounding``, the part of the difference that a narrower dtype causes. Where the
        network amplifies float32's rounding beyond what is allowed, the proof is in float64, and ``float64`` is the
        ``max_rel`` there.

    Raises:
        ParityError: the model that was read back computes something else.
        ValueError: the layout cannot hold these widths, or ``directory`` is an elastic checkpoint.
    """
    directory = Path(directory)
    if (directory / ELASTIC_FILE).is_file():
        raise ValueError(f"export: directory must not be an elastic checkpoint, got {directory}")
    drop = room_for_model(directory, "export", force)
    widths = widths_of(model, budget, units)
    chosen = layout_of(layout, model.elastic, widths, "padded")
    plain = build(model, widths, chosen)
    proof = _Proof(model, widths, plain, storage("export", model, dtype))
    refused = remote_problem(model, widths) if chosen == "ragged" else None
    report: dict[str, Any] = {
        "format": FORMAT,
        "layout": chosen,
        "widths": {**widths.to_dict(), "unit": model.elastic.unit},
        "params": sum(p.numel() for p in plain.parameters()),
        "dtypes": counted(proof.dtypes),
        "loads_in": ["flextron.load_plain"] if refused else [_LOADS_IN[chosen], "flextron.load_plain"],
    }
    if note := _note(model.elastic, widths, chosen, report["params"], refused):
        report["note"] = note
    meant: dict[str, Fingerprint] = {}
    tensors = to_write(pending("export", dict(plain.named_parameters()), proof.dtypes), meant)
    plain.config.dtype = common(proof.dtypes.values())
    with commit(directory, drop) as stage:
        plain.config.save_pretrained(stage)
        if chosen == "ragged" and not refused:
            code, own = remote_code(model, plain, widths)
            (stage / MODELING_FILE).write_text(code, encoding="utf-8")
            write_json(stage / CONFIG_FILE, read_json(stage / CONFIG_FILE) | own)
        if plain.generation_config is not None:
            plain.generation_config.save_pretrained(stage)
        if tokenizer is not None:
            write_tokenizer(tokenizer, stage)
        report["checksums"] = save_weights(stage, tensors)
        report["checksums"][CONFIG_FILE] = checksum_of(stage / CONFIG_FILE)
        ragged = chosen == "ragged"
        read = (
            load_plain(stage, plain.config.dtype, device=model.device)
            if ragged
            else read_back("export", stage, meant)
        )
        report["parity"] = proof.of(read)
        write_json(stage / EXPORT_FILE, report)
        write_card(stage, model.name_or_path or None, directory.resolve().name, _card(report))
    return report


class _Proof:
    """Proves that the model read back computes what the elastic model computes at the budget, in float32 at least.

    Attributes:
        dtypes: the dtype that each parameter is stored in. ``plain`` is rounded to them, in float32 or wider.
    """

    def __init__(
        self, model: Elastic, widths: Widths, plain: PreTrainedModel, dtypes: dict[str, torch.dtype]
    ) -> None:
        self.dtypes = dtypes
        self.work = common([torch.float32, *(p.dtype for p in model.parameters())])
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(model.elastic.vocab_size, _PROOF_SHAPE, generator=draw)
        self.elastic_on = model.device
        full = in_dtype(model, self.work)
        plain.to(self.work)
        with full.budget(widths=widths):
            self.elastic, exact, self.more = require_same("export", _WHOSE, full, plain, self.tokens)
        self.expected = exact
        if round_in_place("export", plain, dtypes):
            self.expected = logits_of(plain, self.tokens)
        self.rounding = difference(exact, self.expected)

    def of(self, read: PreTrainedModel) -> dict[str, Any]:
        """The certificate for a model that was read back."""
        dtype = name_of(read.dtype)
        logits = logits_of(read.to(self.elastic_on, self.work), self.tokens)
        require_close("export", _WHOSE, self.expected, logits)
        return {
            **difference(self.elastic, logits),
            "tokens": self.tokens.numel(),
            "dtype": dtype,
            "rounding": self.rounding,
            **self.more,
        }


def load_plain(
    directory: str | Path,
    dtype: Dtype | None = None,
    *,
    device: Device = "auto",
    device_map: Any = None,
    **hub: Any,
) -> PreTrainedModel:
    """Load an exported sub-network of any layout, or an extracted one that was saved with ``save_pretrained``.

    Args:
        directory: the directory of the export, or a hub id.
        dtype: what weights have in memory; ``"auto"``: what they are stored in; None: ``"auto"`` on a GPU, float32 on a
            CPU.
        device, device_map: what `flextron.from_pretrained` takes.
        hub: ``revision``, ``cache_dir`` and ``token`` for a hub id.

    Raises:
        CheckpointError: one sentence that says which file is wrong, and how.
    """
    chosen = device_of_call("load_plain", device, device_map)
    directory = local(directory, **hub)
    with opened(directory) as files:
        checksums = _checked(files) if EXPORT_FILE in files else None
        shapes = weight_shapes(files)
        config, values = read_config(files, shapes, without=(PER_LAYER_KEY, "auto_map"))
        config.dtype = dtype = memory_dtype("load_plain", dtype, config.dtype, chosen)
        layers = _layers_in(values, files / CONFIG_FILE, config.num_hidden_layers, shapes)
        with foreign(files / CONFIG_FILE, "the configuration of a model that can be built"):
            model = skeleton(config)
            if layers is not None:
                resize(model, layers)
        tensors, _ = load_weights(files, parameter_shapes(model), checksums, dtype, chosen)
        fill(model, tensors).to(chosen)  # the rest of it: a few buffers
        model.generation_config = read_generation_config(files) or model.generation_config
    return model


def _checked(files: Files) -> dict[str, str]:
    """Check the files of an export, except the weights; their checksums are among those that are returned."""
    path, report = files / EXPORT_FILE, files.read_json(EXPORT_FILE)
    check_format(report, path)
    checksums = checksums_of(report, path)
    verify_beside(files, checksums)
    return checksums


def _card(report: dict[str, Any]) -> list[str]:
    """The paragraphs of an export's model card."""
    code = 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("DIRECTORY")'
    if len(report["loads_in"]) == 1:
        code = 'import flextron\n\nmodel = flextron.load_plain("DIRECTORY")'
    elif report["layout"] == "ragged":
        code = code.replace('"DIRECTORY"', '"DIRECTORY", trust_remote_code=True')
    return [
        "One sub-network of an elastic model, as a plain one, made by "
        f"flextron: {report['params'] / 1e6:.2f} M parameters, "
        f"layout `{report['layout']}`.{' ' + report['note'] if 'note' in report else ''}",
        f"```python\n{code}\n```",
    ]


def _note(config: ElasticConfig, widths: Widths, layout: str, params: int, refused: str | None) -> str | None:
    if layout == "uniform":
        return None
    why = stock_problem(config, widths) or "asked for"
    if refused:
        return f"Stock transformers, vLLM and llama.cpp refuse this directory: {why}, and {refused}."
    if layout == "ragged":
        return f"Stock transformers needs trust_remote_code=True, for the code in {MODELING_FILE}: {why}."
    return f"Padded from {config.params(widths)} to {params} parameters for stock transformers: {why}."


def _layers_in(
    values: dict[str, Any], path: Path, count: int, weights: Mapping[str, tuple[int, ...]]
) -> list[dict[str, int]] | None:
    """The sizes of each layer of a ragged model; None if the configuration describes all layers."""
    if values.get(LAYOUT_KEY) is None:
        return None
    own = build_from(dict[str, Any], values[LAYOUT_KEY], path, LAYOUT_KEY)
    place = f"{LAYOUT_KEY}.layers"
    layers = build_from(tuple[dict[str, int], ...], own.get("layers"), path, place)
    if len(layers) != count:
        raise CheckpointError(f"{path}: {LAYOUT_KEY} must size {count} layers, got {len(layers)}")
    most = sum(map(prod, weights.values()))
    for i, layer in enumerate(layers):
        if layer.keys() != set(SIZES) or not all(0 <= size <= most for size in layer.values()):
            raise CheckpointError(
                f"{path}: {place}[{i}] must give {', '.join(SIZES)} that fit the weights, got something else"
            )
        heads, groups = layer["num_attention_heads"], layer["num_key_value_heads"]
        if heads % groups if groups else heads:
            raise CheckpointError(
                f"{path}: {place}[{i}].num_attention_heads must be a multiple of num_key_value_heads, got {layer}"
            )
    return list(layers)
