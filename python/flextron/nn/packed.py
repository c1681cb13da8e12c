"""Pack an elastic model for inference on a CPU: one copy of its weights, in panels, serves every width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from flextron.nn.projection import DTYPES, PackedLinear, PackedRows, check_plain, straight
from flextron.nn.protocol import Elastic
from flextron_ext import PanelFormat


@dataclass(frozen=True)
class Packing:
    """What `pack` did to the bytes of the layers that it packed; a tied head counts as new."""

    bytes_before: int
    bytes_after: int


_FORMATS = {torch.int8: PanelFormat.INT8, **{format.value: format for format in PanelFormat if format.scaled}}


def pack(model: Elastic, dtype: torch.dtype | str | None = None) -> Packing:
    """Put the weights of an elastic model's layers and head in panels, in place, for fast inference on a CPU.

    Budgets, ``generate()`` and per-token widths work as before; the packed copy takes the place of the plain weights,
    so what reads those (training, saving, extraction) refuses from then on.

    Args:
        model: elastic, on the CPU, float32, bfloat16 or float16.
        dtype: None keeps the model's; ``torch.int8`` or ``"int8"`` stores each row as integers and one scale; with
            ``"w8a8"`` what the layers read is rounded to 8 bits too, by token and each 32 inputs; with ``"int4"`` that,
            and weights are of 4 bits, each 32 of a row with a scale and a least value.

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
        old: nn.Linear, out_blocks: int = 1, gate: nn.Linear | None = None, in_blocks: int = 1
    ) -> Any:
        return counted(PackedLinear(old, out_blocks, format, gate, in_blocks), *filter(None, (old, gate)))

    a = model.anatomy
    if a.experts:
        raise NotImplementedError("pack: MLPs must have no experts, got those of a " + model.elastic.family)

    def found(owner: nn.Module, name: str) -> nn.Linear:
        return straight(getattr(owner, name))

    blocks = model.elastic.num_kv_heads if model.elastic.unit == "query" else 1
    for attention, mlp in model.layers_of():
        owner = mlp.owner
        if len(a.qkv) == 3:
            for name, out_blocks in zip(a.qkv, (blocks, 1, 1), strict=True):
                setattr(attention, name, replaced(found(attention, name), out_blocks))
        else:
            (name,) = a.qkv
            old = found(attention, name)
            new = replaced(old) if a.grouped else PackedRows(old, attention.rows(), (blocks, 1, 1), format)
            setattr(attention, name, new if a.grouped else counted(new, old))
        setattr(attention, a.output, replaced(found(attention, a.output), in_blocks=blocks))
        if a.gated and len(a.up) == 2:
            gate_name, up_name = a.up
            gate, up = found(owner, gate_name), found(owner, up_name)
            setattr(owner, up_name, replaced(up, gate=gate))
            setattr(owner, gate_name, None)
        elif a.gated:
            (name,) = a.up
            both = found(owner, name)
            gate, up = mlp.halves(both)
            setattr(owner, name, counted(PackedLinear(up, 1, format, gate), both))
        else:
            (name,) = a.up
            setattr(owner, name, replaced(found(owner, name)))
        setattr(owner, a.down, replaced(found(owner, a.down)))
    model.lm_head = replaced(model.lm_head)
    model.register_state_dict_pre_hook(_refuse_state)
    return Packing(before, after)


def _refuse_state(*_: Any) -> NoReturn:
    raise NotImplementedError("state_dict: weights must be plain, got packed ones; save before flextron.pack")
