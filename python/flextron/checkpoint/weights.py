"""A model's weights in a directory: one safetensors file or, from `SHARD_BYTES` on, shards and the index of them.

The names are Hugging Face's, so stock transformers reads both. A reader holds no more of a file than `_WINDOW` beside
the tensors that it makes of it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from flextron.checkpoint.files import Files, opened
from flextron.checkpoint.format import INDEX_FILE, WEIGHTS_FILE, CheckpointError
from flextron.checkpoint.io import (
    Pending,
    check_tensors,
    checksum_of,
    existing,
    parse_shapes,
    reading,
    reopened,
    stream_tensors,
    write_json,
)
from flextron.sentences import listed

SHARD_BYTES = 5_000_000_000  # the largest file of weights, as the hub has it
_WINDOW = 1 << 24  # bytes of a file that are mapped at once, unless a tensor is larger
_OWN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save_weights(
    folder: str | Path, tensors: Mapping[str, Pending], shard_bytes: int | None = None
) -> dict[str, str]:
    """Write a model's tensors into a folder, one after the other, each file atomically.

    Args:
        folder: it must exist.
        tensors: what makes each tensor, by name.
        shard_bytes: bytes of tensors in a file, which only a tensor that is larger by itself exceeds; None:
            `SHARD_BYTES`.

    Returns:
        name -> sha256 of each file that was written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes or SHARD_BYTES,
    )
    folder = Path(folder)
    checksums = {
        file: stream_tensors(folder / file, {name: tensors[name] for name in names})
        for file, names in plan.filename_to_tensors.items()
    }
    if plan.is_sharded:
        write_json(folder / INDEX_FILE, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
        checksums[INDEX_FILE] = checksum_of(folder / INDEX_FILE)
    return checksums


def weight_files(names: Iterable[str]) -> list[str]:
    """Those of these names under which `save_weights` writes tensors."""
    return sorted(name for name in names if _OWN.fullmatch(name))


def weight_names(files: Files) -> list[str]:
    """The names of the safetensors files that hold a model's weights.

    Raises:
        CheckpointError: there are none, or the index names one that is not there.
    """
    if WEIGHTS_FILE in files:
        return [WEIGHTS_FILE]
    if INDEX_FILE not in files:
        kinds = (".bin", ".pt", ".pth", ".gguf")
        other = sorted(p.name for p in files.directory.iterdir() if p.suffix in kinds)
        raise CheckpointError(
            f"{files.directory}: must hold its weights as {WEIGHTS_FILE} or in shards, got {listed(other) or 'neither'}"
        )
    names = sorted(set(_weight_map(files).values()))
    if missing := [name for name in names if name not in files]:
        raise CheckpointError(f"{files / INDEX_FILE}: every shard must be there, got no {listed(missing)}")
    return names


def weight_shapes(files: Files) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model; no tensor is read."""
    return {name: shape for file in weight_names(files) for name, shape in files.shapes(file).items()}


def verify_beside(files: Files, checksums: Mapping[str, str]) -> None:
    """Refuse files whose sha256 is not the recorded one, and weights in others than recorded; their own are left."""
    files.verify({name: found for name, found in checksums.items() if not _OWN.fullmatch(name)})
    if odd := sorted({*weight_files(checksums)}.symmetric_difference(weight_names(files))):
        raise CheckpointError(
            f"{files.directory}: weights must be in the files whose sha256 were recorded, got a difference in "
            f"{listed(odd)}"
        )


def load_weights(
    directory: str | Path | Files,
    expected: Mapping[str, tuple[int, ...] | Tensor],
    checksums: Mapping[str, str] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Read a model's tensors, one after another, from the files to a device; all checks come before the first.

    Args:
        directory: the model's.
        expected: name -> shape. The names must agree exactly. Or name -> tensor of that shape: what is read is copied
            into a sharded one, and only this process's part of it is read.
        checksums: name -> sha256 of files, which have passed `verify_beside`; None: they are not checked.
        dtype: what the tensors have in memory; what is stored is converted on the device.
        device: where they go.

    Returns:
        The tensors, and the dtype that each of them has in its file, by name.

    Raises:
        CheckpointError: one sentence that says what is wrong with which file.
    """
    tensors: dict[str, Tensor] = {}
    stored: dict[str, torch.dtype] = {}
    with opened(directory) as files:
        names = weight_names(files)
        if checksums is not None:
            files.verify({name: checksums[name] for name in names})
        places = {name: file for file in names for name in files.shapes(file)}
        if names != [WEIGHTS_FILE]:
            _check_index(files, places)
        what = files / (WEIGHTS_FILE if names == [WEIGHTS_FILE] else INDEX_FILE)
        check_tensors(what, weight_shapes(files), expected)
        for file in names:
            for name, tensor in streamed(files / file, files.handle(file)):
                stored[name] = tensor.dtype
                tensors[name] = _placed(tensor, expected[name], dtype, device)
    return tensors, stored


@torch.no_grad()
def overwrite(parameters: Mapping[str, Tensor], paths: Iterable[Path]) -> None:
    """Copy over a model's parameters the tensors in these files, which must be all of them.

    Of a sharded parameter's tensor, only this process's part is read.
    """
    paths, shapes = list(paths), dict[str, tuple[int, ...]]()
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(existing(path).open("rb")) for path in paths]
        for path, handle in zip(paths, handles, strict=True):
            shapes |= parse_shapes(path, handle)
        check_tensors(paths[0], shapes, parameters)
        for path, handle in zip(paths, handles, strict=True):
            for name, tensor in streamed(path, handle):
                own = parameters[name]
                if isinstance(own, DTensor):
                    _copy_part(tensor, own)
                else:
                    own.copy_(tensor)


def streamed(path: Path, file: BinaryIO) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file that is open, in its order; each must be copied before the next is asked for.

    They lie in a memory mapping, at odd addresses. It is made anew for every `_WINDOW`: pages that were read would
    otherwise count as this process's memory until the end.
    """
    place = reopened(path, file)
    with reading(path):
        with safe_open(place, framework="pt", device="cpu") as opened_file:
            rest = opened_file.offset_keys()[::-1]
        while rest:
            with safe_open(place, framework="pt", device="cpu") as opened_file:
                mapped = 0
                while rest and mapped < _WINDOW:
                    tensor = opened_file.get_tensor(name := rest.pop())
                    mapped += tensor.nbytes
                    yield name, tensor
                    del tensor


def _placed(
    tensor: Tensor, like: tuple[int, ...] | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if isinstance(like, DTensor):
        _copy_part(tensor, like)
        return like
    if device.type == "cpu":
        return tensor.to(dtype, copy=True)
    return tensor.to(device).to(dtype)  # in two steps: in one torch converts on the host


@torch.no_grad()
def _copy_part(tensor: Tensor, target: DTensor) -> None:
    """Copy this process's part of a tensor into a sharded one; no other part is read from a mapping."""
    (chunk,) = target.__create_chunk_list__()
    for dim, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    own = target.to_local()
    own.copy_(tensor.to(own.device))  # in two steps, as in `_placed`


def _weight_map(files: Files) -> dict[str, str]:
    found = files.read_json(INDEX_FILE).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(
            f"{files / INDEX_FILE}: weight_map must name the file of each tensor, got something else"
        )
    return found


def _check_index(files: Files, places: Mapping[str, str]) -> None:
    said = _weight_map(files)
    if wrong := sorted(name for name in said.keys() | places.keys() if said.get(name) != places.get(name)):
        one = wrong[0]
        raise CheckpointError(
            f"{files / INDEX_FILE}: weight_map must name the file of each tensor, got {said.get(one, 'none')} for "
            f"{one}, which is in {places.get(one, 'none')}"
        )
