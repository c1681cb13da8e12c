"""What the two attention ops share: checks before the call (heads, dtypes, lists, scores), shapes of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _common as common


def check_inputs(op: str, q: Tensor, **keys: Tensor) -> None:
    """Raise unless keys and values [..., G, D] fit q [..., H, D] in dtype, device and D, and G divides H."""
    common.check_tensor(op, "q", q, common.FLOATING)
    for name, value in keys.items():
        common.check_tensor(op, name, value, common.FLOATING)
        if value.dtype != q.dtype and not common.will_cast(q):
            raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {value.dtype}")
        if value.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device}, got {value.device}")
    (k_name, k), (v_name, v) = keys.items()
    common.check_shape(op, v_name, v, k.shape)
    if q.shape[-1] < 1 or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: {k_name}.shape[-1] must be {q.shape[-1]} and positive, got {k.shape[-1]}")
    H, G = q.shape[-2], k.shape[-2]
    if G < 1 or H % G:
        raise ValueError(f"{op}: q.shape[-2] must be divisible by {k_name}.shape[-2] ({G}), got {H}")


def check_dims(op: str, name: str, value: Tensor, dims: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimensions, got {value.dim()}")


def check_heads(op: str, heads: int, unit: str, H: int, G: int) -> None:
    if unit not in ("kv_group", "query"):
        raise ValueError(f"{op}: unit must be kv_group or query, got {unit}")
    common.check_range(op, "heads", heads, 0, G if unit == "kv_group" else H // G)


def check_scores(
    op: str, q: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None, causal: bool = True
) -> None:
    """Raise on what is wrong with the arguments that change scores, for q [..., H, D]."""
    if window is not None:
        common.check_range(op, "window", window, 1, 2**63 - 1)
        if not causal:
            raise ValueError(f"{op}: window must be None where causal is false, got {window}")
    common.check_finite(op, "softcap", softcap)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}")
    if sinks is None:
        return
    common.check_tensor(op, "sinks", sinks, common.FLOATING)
    if sinks.dtype not in (q.dtype, torch.float32) and not common.will_cast(q):
        raise TypeError(f"{op}: sinks must have the dtype of q, {q.dtype}, or float32, got {sinks.dtype}")
    common.check_shape(op, "sinks", sinks, (q.shape[-2],))
    if sinks.device != q.device:
        raise ValueError(f"{op}: sinks must be on {q.device}, got {sinks.device}")


def check_integers(op: str, name: str, value: Tensor | None, *lengths: int) -> None:
    """Raise unless the value is None or an int32 or int64 list of one of these lengths. Its values are not read."""
    if value is None:
        return
    common.check_tensor(op, name, value, common.INTEGERS)
    if value.dim() != 1 or value.shape[0] not in lengths:
        allowed = " or ".join(f"[{length}]" for length in dict.fromkeys(lengths))
        raise ValueError(f"{op}: {name} must have shape {allowed}, got {list(value.shape)}")


def gradient_shapes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: int) -> tuple[Tensor, ...]:
    """What a backward op returns: the gradients that the mask asks for, and empty tensors."""
    given = (q, k, v, q.new_empty(0) if sinks is None else sinks)
    return tuple(t.new_empty(t.shape if mask >> i & 1 else (0,)) for i, t in enumerate(given))
