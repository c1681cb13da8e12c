"""The bytes of all tensors that are alive, counted as a program runs; fake tensors, which have no memory, count too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Inside a ``with`` block, count every storage that an op returns until nothing refers to it.

    What an op of ours allocates inside itself is not seen by a dispatch mode, so `inside` adds it for the largest: the
    MLP's backward holds three tensors of hidden values, two without a gate (csrc/ops/mlp/gpu.cpp, backward_on_gpu), its
    forward one.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.watching: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self._see(tensor)

    def restart(self) -> None:
        self.peak = self.now

    def __enter__(self) -> Live:
        resize = self.resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            """FSDP2 frees and allocates gathered weights by this, and no op says so."""
            result = resize(storage, size)
            if storage._cdata in self.sizes:
                self._count(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resized
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:  # a sparse one has a few rows
                self._see(leaf)
        self.peak = max(self.peak, self.now + inside(str(func), args))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return

        def gone(_: object) -> None:
            self._count(key, 0)
            del self.sizes[key], self.watching[key]

        self.watching[key] = weakref.ref(storage, gone)
        self._count(key, storage.nbytes())

    def _count(self, key: int, size: int) -> None:
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)


def inside(op: str, args: tuple[Any, ...]) -> int:
    """What an op allocates and frees itself, in bytes."""
    if op == "flextron.elastic_mlp_backward.default":
        w_gate, hidden = args[2], args[-3]
        return (2 if w_gate is None else 3) * hidden.nbytes
    return 0
