"""The dtype and the device that a model is loaded in, from what its user asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flextron.nn.storage import DTYPES, Dtype, named


def memory_dtype(who: str, dtype: Dtype, stored: torch.dtype | None) -> torch.dtype:
    """The dtype of all weights in memory; ``"auto"`` is ``stored``, the configuration's.

    Stock transformers reads ``"auto"`` the same way: the narrowest dtype that holds what the file does.
    """
    return named(who, dtype, (*DTYPES, "float64")) or stored or torch.float32


def one_device(who: str, device_map: Any) -> torch.device | None:
    """The device that ``device_map`` names: ``"auto"``, a device, or ``{"": device}``; None where it is None.

    ``"auto"`` is the first GPU, or the CPU where there is none.

    Raises:
        ValueError: it names several devices, offloads, or the machine has no such device.
    """
    if device_map is None:
        return None
    if device_map == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    named: Any = (
        device_map.get("") if isinstance(device_map, Mapping) and len(device_map) == 1 else device_map
    )
    try:
        device = torch.device(named)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type == "meta":
        raise ValueError(
            f"{who}: device_map must be auto or one device, such as cpu or cuda:0 (layers are not split over devices "
            f"or offloaded), got {device_map!r}"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{who}: device_map must be a device of this machine, got {device_map!r}")
    return device
