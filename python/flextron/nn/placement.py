"""The dtype and the device that a model is loaded in, from what its user asks for."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from flextron.nn.storage import DTYPES, Dtype, named
from flextron.sentences import first_line
from flextron_ext import build_info

Device = (
    str | int | torch.device
)  # "auto", "cpu", "cuda", "cuda:1", or what transformers takes for one device
CPU = torch.device("cpu")


def memory_dtype(
    who: str, dtype: Dtype | None, stored: torch.dtype | None, device: torch.device = CPU
) -> torch.dtype:
    """The dtype of all weights in memory.

    ``"auto"`` is ``stored``, the configuration's. Stock transformers reads it the same way: the narrowest dtype that
    holds what the file does. None is ``"auto"`` on a GPU and float32 on a CPU.
    """
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    return named(who, dtype, (*DTYPES, "float64")) or stored or torch.float32


def one_device(who: str, device: Any = "auto", name: str = "device") -> torch.device:
    """The one device that a user names: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or what transformers takes.

    ``"auto"`` is the GPU of this process: the first one, or under torchrun that of its local rank; the CPU where no GPU
    can be used. ``"cuda"`` is the same GPU, and there must be one.

    Args:
        who, name: begin the message: ``train: device``.
        device: also a number, a torch device, or ``{"": device}``.

    Raises:
        ValueError: it names several devices, offloads, or cannot be used here; the sentence says why.
    """
    given = device.get("") if isinstance(device, Mapping) and len(device) == 1 else device
    spoken = f"cuda:{given}" if isinstance(given, int) and not isinstance(given, bool) else str(given)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", spoken):
        raise ValueError(
            f"{who}: {name} must be auto or one device, such as cpu or cuda:0 (layers are not split over devices "
            f"or offloaded), got {device!r}"
        )
    if spoken == "cpu":
        return CPU
    if spoken == "auto" and not _takes_gpus(who):
        return CPU
    if (fault := _fault_of_gpus()) is not None:
        raise ValueError(f"{who}: {name} must be one that can be used here, got {spoken}, but {fault}")
    _, _, index = spoken.partition(":")
    return torch.device("cuda", _checked(who, name, spoken, int(index) if index else None))


def device_of_call(who: str, device: Device, device_map: Any) -> torch.device:
    """`one_device` of a loader that takes ``device_map`` too, which transformers' users type."""
    if device_map is None:
        return one_device(who, device)
    if device != "auto":
        raise ValueError(f"{who}: device or device_map must be given, got both, {device} and {device_map}")
    return one_device(who, device_map, "device_map")


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A ``with`` block in which a GPU is torch's current one, which clocks and graphs go by."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _checked(who: str, name: str, spoken: str, index: int | None) -> int:
    """The index of a GPU that is there, and under torchrun is nobody else's."""
    count, own = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if index is None and own >= count:
        raise ValueError(
            f"{who}: processes must be at most one for each GPU, got local rank {own} on a machine with {count}"
        )
    if index is not None and index >= count:
        raise ValueError(
            f"{who}: {name} must be one that can be used here, got {spoken}, but the machine's last GPU is "
            f"cuda:{count - 1}"
        )
    if index is not None and index != own and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"{who}: {name} must be auto, cuda or cpu under torchrun, which gives each process a GPU of its own, "
            f"got {spoken}"
        )
    return own if index is None else index


def _takes_gpus(who: str) -> bool:
    """Whether ``"auto"`` is a GPU."""
    fault = _fault_of_gpus()
    if fault is not None and torch.cuda.is_available():  # one that waits for our ops
        warnings.warn(f"{who}: runs on the CPU, for {fault}", stacklevel=4)
    return fault is None


def _fault_of_gpus() -> str | None:
    """Why no GPU can be used here, as the end of a sentence; None where one can."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return f"torch says: {first_line(error)}"
        return "no GPU is seen"
    if not build_info()["cuda"]:
        return "flextron's ops are built without CUDA (FLEXTRON_CUDA=ON builds them with it)"
    return None
