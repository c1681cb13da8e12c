"""Pack an elastic model for inference on a CPU: one copy of its weights, in panels, serves every width."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flextron.nn.plain import build
from flextron.nn.projection import DTYPES, PackedLinear, PackedRows, check_plain, straight
from flextron.nn.protocol import Elastic
from flextron_ext import PanelFormat


@dataclass(frozen=True)
class Packing:
    """What `pack` did to the bytes of the layers that it packed; a tied head counts as new."""

    bytes_before: int
    bytes_after: int


_FORMATS: dict[Any, PanelFormat] = {format.value: format for format in PanelFormat if format.scaled}
_FORMATS[torch.int8] = PanelFormat.INT8


_ROOM = 2**30  # bytes of products that are held at once, or those of one projection
_HEAD = ""  # in the place of the path of a head


class _Products:
    """Sums of x^T x over what the projections of the full network read, of as many at a time as there is room for.

    The projections that read the same have one of them for all: the first.
    """

    def __init__(self, model: Any, calibration: Tensor) -> None:
        self.stock, self.calibration = (
            build(model, model.elastic.full(), "uniform", shares=True).eval(),
            calibration,
        )
        self.names = {id(module): name for name, module in model.named_modules()}
        a, self.paths = model.anatomy, []
        for attention, mlp in model.layers_of():
            readers = (
                (attention, a.qkv[0]),
                (attention, a.output),
                (mlp.owner, a.up[0]),
                (mlp.owner, a.down),
            )
            self.paths += [self.names[id(getattr(owner, name))] for owner, name in readers]
        self.paths.append(_HEAD)
        self.found: dict[str, Tensor] = {}

    def of(self, module: nn.Module) -> Tensor:
        path = self.names[id(module)]
        return self._at(path if path in self.paths else _HEAD)

    def _at(self, path: str) -> Tensor:
        if path not in self.found:
            self._gather(self.paths.index(path))
        return self.found[path]

    def _size(self, path: str) -> int:
        if path == _HEAD:
            return self.stock.get_input_embeddings().weight.shape[1]
        module: Any = self.stock.get_submodule(path)
        return module.weight.shape[0 if type(module) is Conv1D else 1]

    @torch.no_grad()
    def _gather(self, first: int) -> None:
        self.found, room, handles = {}, _ROOM, []
        for path in self.paths[first:]:
            size = self._size(path)
            room -= 4 * size * size
            if self.found and room < 0:
                break
            self.found[path] = torch.zeros(size, size)
            if path != _HEAD:
                hook = partial(self._see, path)
                handles.append(self.stock.get_submodule(path).register_forward_pre_hook(hook))
        try:
            for rows in self.calibration.split(4):
                last = self.stock.base_model(input_ids=rows, use_cache=False)[0]
                if _HEAD in self.found:
                    self._see(_HEAD, None, (last,))
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, path: str, _: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        self.found[path].addmm_(x.T, x)


def _check_calibration(model: Elastic, format: PanelFormat | None, calibration: Tensor) -> None:
    if format is not PanelFormat.INT4:
        raise ValueError(
            f"pack: calibration must be None unless dtype is int4, got tokens for {format or 'None'}"
        )
    vocabulary = model.config.vocab_size
    if calibration.dim() != 2 or calibration.dtype != torch.int64 or not calibration.numel():
        kind = f"{calibration.dtype} of shape {list(calibration.shape)}"
        raise ValueError(f"pack: calibration must be int64 tokens [n, length], got {kind}")
    low, high = (int(n) for n in calibration.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"pack: calibration must have tokens in [0, {vocabulary}), got {low if low < 0 else high}"
        )


def pack(
    model: Elastic, dtype: torch.dtype | str | None = None, calibration: Tensor | None = None
) -> Packing:
    """Put the weights of an elastic model's layers and head in panels, in place, for fast inference on a CPU.

    Budgets, ``generate()`` and per-token widths work as before; the packed copy takes the place of the plain weights,
    so what reads those (training, saving, extraction) refuses from then on.

    Args:
        model: elastic, on the CPU, float32, bfloat16 or float16.
        dtype: None keeps the model's; ``torch.int8`` or ``"int8"`` stores each row as integers and one scale; with
            ``"w8a8"`` what the layers read is rounded to 8 bits too, by token and each 32 inputs; with ``"int4"`` that,
            and weights are of 4 bits, each 32 of a row with a scale and a least value.
        calibration: int4 alone: int64 token ids [n, length], some thousands in all. What rounding misses of a weight is
            then made up for by those of the inputs behind it, by what the layers of the full network read of this text
            (GPTQ). Memory: up to 1 GB, and passes over the text as this asks for.

    Returns:
        The bytes of the weights before and after.
    """
    if dtype is not None and dtype not in _FORMATS:
        raise ValueError(f"pack: dtype must be None, int8, w8a8 or int4, got {dtype}")
    if not hasattr(model, "layers_of"):
        raise TypeError(f"pack: model must be elastic, got {type(model).__name__}")
    if isinstance(model.lm_head, PackedLinear):
        raise ValueError("pack: model must have plain weights, got packed ones")
    check_plain("pack", model)
    weight = model.lm_head.weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        raise ValueError(
            f"pack: model must be float32, bfloat16 or float16 on cpu, got {weight.dtype} on {weight.device}"
        )
    format = None if dtype is None else _FORMATS[dtype]
    if calibration is not None:
        _check_calibration(model, format, calibration)
    tied = weight is model.get_input_embeddings().weight
    before = 0 if tied else weight.nbytes
    after = 0

    def counted(new: Any, *old: nn.Linear) -> Any:
        nonlocal before, after
        before += sum(part.weight.nbytes for part in old if part is not model.lm_head)
        parts: Any = new.parts if isinstance(new, PackedRows) else [new]
        after += sum(p.panels.nbytes + (0 if p.scales is None else p.scales.nbytes) for p in parts)
        return new

    def replaced(
        old: nn.Linear,
        out_blocks: int = 1,
        gate: nn.Linear | None = None,
        in_blocks: int = 1,
        read: Tensor | None = None,
    ) -> Any:
        new = PackedLinear(old, out_blocks, format, gate, in_blocks, read)
        return counted(new, *filter(None, (old, gate)))

    a = model.anatomy
    if a.experts:
        raise NotImplementedError("pack: MLPs must have no experts, got those of a " + model.elastic.family)
    products = None if calibration is None else _Products(model, calibration)

    def read_by(module: nn.Module) -> Tensor | None:
        return None if products is None else products.of(module)

    def found(owner: nn.Module, name: str) -> nn.Linear:
        return straight(getattr(owner, name))

    blocks = model.elastic.num_kv_heads if model.elastic.unit == "query" else 1
    for attention, mlp in model.layers_of():
        owner = mlp.owner
        read = read_by(getattr(attention, a.qkv[0]))
        if len(a.qkv) == 3:
            for name, out_blocks in zip(a.qkv, (blocks, 1, 1), strict=True):
                setattr(attention, name, replaced(found(attention, name), out_blocks, read=read))
        else:
            (name,) = a.qkv
            old = found(attention, name)
            if a.grouped:
                setattr(attention, name, replaced(old, read=read))
            else:
                parts = PackedRows(old, attention.rows(), (blocks, 1, 1), format, read)
                setattr(attention, name, counted(parts, old))
        read = read_by(getattr(attention, a.output))
        setattr(attention, a.output, replaced(found(attention, a.output), in_blocks=blocks, read=read))
        read = read_by(getattr(owner, a.up[0]))
        if a.gated and len(a.up) == 2:
            gate_name, up_name = a.up
            gate, up = found(owner, gate_name), found(owner, up_name)
            setattr(owner, up_name, replaced(up, gate=gate, read=read))
            setattr(owner, gate_name, None)
        elif a.gated:
            (name,) = a.up
            both = found(owner, name)
            gate, up = mlp.halves(both)
            setattr(owner, name, counted(PackedLinear(up, 1, format, gate, products=read), both))
        else:
            (name,) = a.up
            setattr(owner, name, replaced(found(owner, name), read=read))
        read = read_by(getattr(owner, a.down))
        setattr(owner, a.down, replaced(found(owner, a.down), read=read))
    model.lm_head = replaced(model.lm_head, read=read_by(model.lm_head))
    model.register_state_dict_pre_hook(_refuse_state)
    return Packing(before, after)


def _refuse_state(*_: Any) -> NoReturn:
    raise NotImplementedError("state_dict: weights must be plain, got packed ones; save before flextron.pack")
