"""What llama.cpp's own library does for an export: it quantises the types that gguf-py reads but cannot write."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


def library() -> ctypes.CDLL:
    """The C functions of llama.cpp and ggml, which the wheel xllamacpp exports.

    Raises:
        ModuleNotFoundError: xllamacpp is not installed.
    """
    from xllamacpp import xllamacpp

    return ctypes.CDLL(xllamacpp.__file__)


def quantise(values: np.ndarray, kind: Any) -> np.ndarray:
    """float32 [rows, columns] in the bytes of a type of gguf, whose blocks divide the columns."""
    import gguf

    try:
        with np.errstate(over="ignore"):  # what became infinite is refused once it was read back
            return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return _by_ggml(values, kind)


def _by_ggml(values: np.ndarray, kind: Any) -> np.ndarray:
    import gguf

    try:
        ggml = library()
    except ModuleNotFoundError:
        raise ValueError(
            f"export: type must be one of f32, f16, bf16, q8_0, q4_0 where llama.cpp's quantiser is not installed "
            f"(pip install 'flextron[hosts]'), got {kind.name.lower()}"
        ) from None
    rows, columns = values.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((rows, columns // block * size), dtype=np.uint8)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    long = ctypes.c_int64
    written = ggml.ggml_quantize_chunk(
        ctypes.c_int(kind),
        np.ascontiguousarray(values, np.float32).ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        long(0),
        long(rows),
        long(columns),
        None,
    )
    if written != out.nbytes:
        raise RuntimeError(f"export: llama.cpp's quantiser must write {out.nbytes} bytes, got {written}")
    return out
