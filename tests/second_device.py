"""A second device for the tests: its tensors lie on the CPU, but no op takes them together with the CPU's.

torch's open device (PrivateUse1) in Python. An op of ours or of torch sees tensors that say ``fake:0``. It is refused
where others are on the CPU, as a GPU would refuse it, and is computed on the CPU otherwise. Only moving is allowed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fake"
CPU = torch.device("cpu")
# ops that read a tensor of one device and write, or make, one of another
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._copy_from.default}


class _Module(_DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
FAKE = torch.device(NAME, 0)


class FakeTensor(Tensor):
    """A tensor of the second device."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> FakeTensor:
        made = Tensor._make_wrapper_subclass(
            cls, elem.size(), elem.stride(), elem.storage_offset(), dtype=elem.dtype, device=FAKE
        )
        made.elem = elem
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_a_mixture(func, args, kwargs)
        given = kwargs.get("device")
        to_cpu = given is not None and torch.device(given).type == "cpu"
        inside = {**kwargs, "device": CPU} if given is not None else kwargs
        out = func(*tree_map(_elem, args), **tree_map(_elem, inside))
        if to_cpu or (func in _MOVES and given is None and not isinstance(args[0], FakeTensor)):
            return args[0] if func is torch.ops.aten.copy_.default else out
        out = tree_map(_wrapped, out)
        return return_and_correct_aliasing(func, args, kwargs, out)

    def __repr__(self) -> str:
        return f"fake {self.elem!r}"

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def tolist(self) -> Any:
        return self.elem.tolist()


def _elem(value: Any) -> Any:
    return value.elem if isinstance(value, FakeTensor) else value


def _wrapped(value: Any) -> Any:
    return FakeTensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value


def _refuse_a_mixture(func: Any, args: Any, kwargs: Any) -> None:
    if func in _MOVES:
        return
    found: list[Tensor] = []
    tree_map(lambda v: found.append(v) if isinstance(v, Tensor) else None, (args, kwargs))
    if strays := [t for t in found if not isinstance(t, FakeTensor) and (t.dim() or "index" in str(func))]:
        # torch lets a number of the CPU, and indices of it, into a GPU's ops
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            return
        raise RuntimeError(
            f"{func}: tensors must be on one device, got {NAME} and {list(strays[0].shape)} on cpu"
        )


_LIBRARY = torch.library.Library("aten", "IMPL")


def _empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> Tensor:
    return FakeTensor(torch.empty(size, dtype=dtype, device=CPU))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return FakeTensor(torch.empty_strided(size, stride, dtype=dtype, device=CPU))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor` calls, beneath every subclass."""
    _elem(target).copy_(_elem(source))
    return target


for name, made in (
    ("empty.memory_format", _empty),
    ("empty_strided", _empty_strided),
    ("_copy_from", _copy_from),
):
    _LIBRARY.impl(name, made, "PrivateUse1")
