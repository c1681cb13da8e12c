"""The elastic checkpoint: a Hugging Face directory of the parent's architecture, and ``flextron.json``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flextron import nn, ranks
from flextron.checkpoint import (
    CONFIG_FILE,
    ELASTIC_FILE,
    FORMAT,
    INDEX_FILE,
    CheckpointError,
    Files,
    Origin,
    check_format,
    checksum_of,
    commit,
    opened,
    read_json,
    write_json,
)
from flextron.checkpoint.hf import read_config, read_generation_config, write_tokenizer
from flextron.checkpoint.io import Pending
from flextron.checkpoint.origin import weights_of
from flextron.checkpoint.room import names_in
from flextron.checkpoint.schema import build, checksums_of
from flextron.checkpoint.weights import (
    load_weights,
    save_weights,
    verify_beside,
    weight_files,
    weight_names,
    weight_shapes,
)
from flextron.config import ElasticConfig
from flextron.nn import check_plain, elastic_config
from flextron.nn.placement import CPU, memory_dtype
from flextron.nn.protocol import Elastic
from flextron.nn.skeleton import fill, give_memory, move_buffers, say_tied, skeleton
from flextron.nn.stock import Fingerprint, fingerprint, read_back
from flextron.nn.storage import Dtype, common, counted, rounded, storage

# parts of a certificate that are shown beside its main figure; earlier versions wrote none of them
_SHOWN: dict[str, Any] = {
    "weights": str | None,
    "rounding": dict[str, float] | None,
    "sub_networks": tuple[dict[str, Any], ...] | None,
}
Cut = Callable[[Elastic], object]  # shards a model in place
_DESCRIBED = frozenset(f.name for f in fields(ElasticConfig))
_OWN_KEYS = ("format", "requires", "elastic", "dtypes", "checksums", "versions")


def save_elastic(
    model: Elastic,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict[str, Any] | None = None,
    beside: Callable[[Path, Origin], None] | None = None,
    *,
    prove: Callable[[Path, PreTrainedModel, str], dict[str, Any]] | None = None,
    dtype: Dtype = "auto",
    tensors: Mapping[str, Pending] | None = None,
    drop: Iterable[str] = (),
    shard_bytes: int | None = None,
    empties: bool = False,
) -> Origin:
    """Write an elastic model, all of it or nothing; other files in ``directory`` stay.

    Before the new files begin to count, stock transformers reads them back: every tensor must be what was meant.

    Args:
        model: made elastic; its current widths do not matter, the whole model is stored.
        directory: created when it is not there.
        tokenizer: stored too when given.
        report: what conversion found (``parity``, ``importance``); None keeps what the directory has, or, where it has
            none, what the one had that the model was read from. So it is with fields that a later version wrote.
        beside: writes into a folder what was made for these weights; it is stored with them or not at all.
        prove: called with the folder of the new files, the stock model read from it and the identity of its weights.
            What it returns joins the report; an error that it raises leaves the old files.
        dtype: ``"auto"``: each tensor in its own dtype in the file that the model was loaded from.
        tensors: what makes the model's parameters, by name, where they are not in the model.
        drop: names in ``directory`` that go when the new files begin to count. Weights in other files always go.
        shard_bytes: what `save_weights` takes.
        empties: the model's parameters lose their memory once they are written, which makes room to read them back.

    Returns:
        What files made for these weights are to say they were made for.

    Raises:
        ValueError: what was read back is not what was written.
    """
    if tensors is None:
        check_plain("save", model)
        tensors = pending("save", dict(model.named_parameters()), storage("save", model, dtype))
    dtypes = {name: one.dtype for name, one in tensors.items()}
    config, own = _stock_config(model, common(dtypes.values())), model.elastic
    # the vocabulary, and whether embeddings are tied, may have changed since the model was made elastic
    own = elastic_config(config, own.unit, *own.menus)
    gone = list(drop)
    with commit(directory, gone) as stage:
        there = names_in(Path(directory))  # now that an interrupted save is finished
        gone += [*weight_files(there), *(name for name in there if name == INDEX_FILE)]
        unknown: dict[str, Any] = {}  # of the model's description, written by a later version
        if report is None:
            path = Path(directory) / ELASTIC_FILE
            before = read_json(path) if path.is_file() else model.sidecar
            report = {k: v for k, v in before.items() if k not in _OWN_KEYS}
            described = before.get("elastic")
            if before.get("format") == FORMAT and isinstance(described, dict):
                unknown = {k: v for k, v in described.items() if k not in _DESCRIBED}
        config.save_pretrained(stage)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(stage)
        if tokenizer is not None:
            write_tokenizer(tokenizer, stage)
        meant: dict[str, Fingerprint] = {}
        checksums = save_weights(stage, to_write(tensors, meant), shard_bytes)
        checksums[CONFIG_FILE] = checksum_of(stage / CONFIG_FILE)
        del tensors
        if empties:
            model.to("meta")
        stock = read_back("save", stage, meant)
        meta = {
            "format": FORMAT,
            **({"requires": own.requires} if own.requires else {}),
            "elastic": unknown | own.to_dict(),
            **report,
            **(prove(stage, stock, weights_of(checksums)) if prove else {}),
            "dtypes": counted(dtypes),
            "checksums": checksums,
            "versions": _versions(),
        }
        write_json(stage / ELASTIC_FILE, meta)
        origin = Origin.of(meta)
        if beside is not None:
            beside(stage, origin)
    return origin


def pending(who: str, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Pending]:
    """What makes tensors that are here: each is rounded to its dtype when it is written."""
    return {
        name: Pending(tuple(t.shape), dtypes[name], partial(rounded, who, name, t, dtypes[name]))
        for name, t in tensors.items()
    }


def to_write(tensors: Mapping[str, Pending], meant: dict[str, Fingerprint]) -> dict[str, Pending]:
    """What `save_weights` takes: a tensor's fingerprint is put into ``meant``, for `read_back`, when it is made."""

    def make(name: str) -> Tensor:
        tensor = tensors[name].make()
        meant[name] = fingerprint(tensor)
        return tensor

    return {name: one._replace(make=partial(make, name)) for name, one in tensors.items()}


def write(
    model: Elastic, directory: str | Path, tensors: Mapping[str, Tensor], shard_bytes: int | None
) -> None:
    """Save a model on behalf of its ``save_pretrained``; see `flextron.nn.model.Writer`."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    save_elastic(model, directory, tensors=pending("save", tensors, dtypes), shard_bytes=shard_bytes)


def make_elastic(model: PreTrainedModel, config: ElasticConfig | None = None) -> Elastic:
    """`flextron.nn.make_elastic`, of a model that ``save_pretrained`` stores as an elastic checkpoint."""
    model = nn.make_elastic(model, config)
    model.writer = write
    return model


def read_meta(files: Files) -> dict[str, Any]:
    """The contents of ``flextron.json``, once they and the checksums of all files but the weights are checked."""
    path = files / ELASTIC_FILE
    if ELASTIC_FILE not in files:
        raise CheckpointError(
            f"{files.directory}: must be an elastic checkpoint (flextron convert makes one), got no {ELASTIC_FILE}"
        )
    meta = files.read_json(ELASTIC_FILE)
    check_format(meta, path)
    build(ElasticConfig, meta.get("elastic"), path, "elastic")
    checksums = checksums_of(meta, path)
    _check_parity(meta, path)
    verify_beside(files, checksums)
    return meta


def read_model(
    directory: str | Path | Files,
    elastic: ElasticConfig,
    dtype: Dtype | None,
    checksums: Mapping[str, str] | None = None,
    device: torch.device = CPU,
    cut: Cut | None = None,
) -> Elastic:
    """The elastic model of a directory, once its ``flextron.json`` is read or where it is still to be written.

    Its ``stored`` has the dtype of each parameter in the file, by name.

    ``cut`` shards the model in place, before it has memory: each process then has, and reads, its part of each tensor.
    All processes call this with it, and each verifies its part of the files.
    """
    with opened(directory) as files:
        config = read_stock_config(files, elastic)
        config.dtype = dtype = memory_dtype("load", dtype, config.dtype, device)
        model = make_elastic(_described(files, skeleton(config), elastic), elastic)
        if cut is not None:
            cut(model)
            give_memory(model, device)
            _verify_together(files, checksums)
            checksums = None
        parameters = dict(model.named_parameters())
        tensors, model.stored = load_weights(files, parameters, checksums, dtype, device)
        if cut is None:
            fill(model, tensors)
            move_buffers(model, device)
        model.generation_config = read_generation_config(files) or model.generation_config
        model.name_or_path = str(files.directory)
    return model


def _verify_together(files: Files, checksums: Mapping[str, str] | None) -> None:
    known = checksums or {}
    names = [name for name in weight_names(files) if name in known]
    ranks.divided(names, lambda name: files.verify({name: known[name]}), CheckpointError)


def _stock_config(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedConfig:
    """The parent's configuration as stock transformers should read it back."""
    config = copy.deepcopy(model.config)
    # A parent that was read from a quantised file is plain floating point by now.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [model.stock.__name__]  # FSDP2 puts a class of its own in front
    config.dtype = dtype
    say_tied(model, config)
    return config


def _check_parity(meta: dict[str, Any], path: Path) -> None:
    """Refuse a certificate that cannot be shown."""
    if "parity" not in meta:
        return
    parity = build(dict[str, Any], meta["parity"], path, "parity")
    build(float, parity.get("max_rel"), path, "parity.max_rel")
    for name, kind in _SHOWN.items():
        build(kind, parity.get(name), path, f"parity.{name}")
    for i, proven in enumerate(parity.get("sub_networks") or ()):
        build(float, proven.get("max_rel"), path, f"parity.sub_networks[{i}].max_rel")


def read_stock_config(files: Files, elastic: ElasticConfig) -> PreTrainedConfig:
    """The configuration that stock transformers reads, which must be of the family that ``elastic`` says."""
    path = files / CONFIG_FILE
    config, _ = read_config(files, weight_shapes(files))
    if config.model_type != elastic.family:
        raise CheckpointError(
            f"{path}: model_type must be {elastic.family!r} as in {ELASTIC_FILE}, got {config.model_type!r}"
        )
    return config


def _described(files: Files, model: PreTrainedModel, elastic: ElasticConfig) -> PreTrainedModel:
    """A model that was built by the configuration, once it is known to be the one that ``elastic`` describes."""
    own = elastic_config(model, elastic.unit, *elastic.menus).to_dict()
    wrong = [f"{key} {own.get(key)!r}" for key, value in elastic.to_dict().items() if own.get(key) != value]
    if wrong:
        raise CheckpointError(
            f"{files / CONFIG_FILE}: must describe the model of {ELASTIC_FILE}, got {', '.join(wrong)}"
        )
    return model


def _versions() -> dict[str, str]:
    found = {}
    for package in ("flextron", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # flextron run from its source tree
            found[package] = "not installed"
    return found
