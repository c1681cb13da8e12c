"""Memory that the C library keeps after tensors are gone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_LARGE, _LARGEST = 2**20, 2**25  # bytes; the second is what glibc itself raises its threshold to


@contextmanager
def large_apart() -> Iterator[None]:
    """Within a ``with`` block, or a function, let tensors of 1 MiB and more have memory that is returned with them.

    glibc otherwise takes larger and larger ones from its heap, whose holes it keeps: of a conversion of 186 MB up to 10
    MB more on one processor than on another. Where a library has no such setting, nothing happens.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    option(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        option(_MMAP_THRESHOLD, _LARGEST)


@contextmanager
def kept() -> Iterator[None]:
    """Within a ``with`` block, keep the memory of tensors that are gone for those that come, whatever their size.

    The gradients of a training step otherwise go back to the system, which clears each page again in the next one:
    82000 pages, and 0.16 of 2.9 seconds of processor time, in a step of SmolLM2-135M at half its width with 512 tokens
    (an AMD EPYC, Zen 4). Afterwards what is not in use is returned. Where a library has no such setting, nothing
    happens.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    option(_TRIM_THRESHOLD, 2**31 - 1)
    option(_MMAP_MAX, 0)
    try:
        yield
    finally:
        option(_TRIM_THRESHOLD, 2 * _LARGEST)
        option(_MMAP_MAX, 2**16)  # glibc's default
        give_back()


def give_back() -> None:
    """Let the C library return to the system what it keeps of freed memory.

    glibc keeps up to 64 MiB at the end of its heap, and whatever lies between memory in use: a tenth of a billion
    parameters in bfloat16 was measured. Other libraries have no such call, and nothing happens.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
