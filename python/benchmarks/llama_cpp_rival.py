"""llama.cpp on a GGUF file: the C library inside the wheel xllamacpp, of which a few functions are called.

Without xllamacpp the benchmarks leave this rival out.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from flextron.exporting.llama_cpp import library

# Words of 4 bytes in llama_context_params, of which a version may add some: the defaults say whether they still hold.
_CONTEXT, _BATCH, _UBATCH, _THREADS, _BATCH_THREADS = 0, 1, 2, 7, 8
_FLASH, _KEYS, _VALUES = 13, 26, 27
_AUTO, _OFF, _F32, _F16 = -1, 0, 0, 1
_ROOM = 128  # words: more than either structure has


class _Params(ctypes.Structure):
    """llama_model_params or llama_context_params, whichever version's: larger than both."""

    _fields_ = [("words", ctypes.c_int32 * _ROOM)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


def _declared() -> ctypes.CDLL:
    lib = library()
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    for name, result, *arguments in (
        ("llama_model_default_params", _Params),
        ("llama_context_default_params", _Params),
        ("llama_model_load_from_file", pointer, text, _Params),
        ("llama_init_from_model", pointer, pointer, _Params),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", size, pointer),
        ("llama_batch_get_one", _Batch, pointer, size),
        ("llama_decode", size, pointer, _Batch),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, size),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, ctypes.c_bool),
        ("llama_tokenize", size, pointer, text, size, pointer, size, ctypes.c_bool, ctypes.c_bool),
        ("llama_model_chat_template", text, pointer, text),
        ("llama_log_set", None, pointer, pointer),
        ("llama_free", None, pointer),
        ("llama_model_free", None, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


_Silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silence = _Silent(lambda *_: None)


class LlamaCpp:
    """A GGUF file in llama.cpp, its defaults kept but for the threads: one sequence.

    ``exact``: attention in float32, without its fused form and with a cache of float32; else both are half precision.
    """

    def __init__(self, path: Path, threads: int, context: int, exact: bool = False) -> None:
        self.lib = lib = _declared()
        lib.llama_log_set(ctypes.cast(_silence, ctypes.c_void_p), None)
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp: {path} must load, got an error")
        params = lib.llama_context_default_params()
        words = params.words
        if (words[_FLASH], words[_KEYS], words[_VALUES]) != (_AUTO, _F16, _F16):
            raise ValueError(
                "llama.cpp: llama_context_params must have the fields of build 11549, got others"
            )
        words[_CONTEXT], words[_BATCH], words[_UBATCH] = context, 512, 512
        words[_THREADS] = words[_BATCH_THREADS] = threads
        if exact:
            words[_FLASH], words[_KEYS], words[_VALUES] = _OFF, _F32, _F32
        self.context = lib.llama_init_from_model(self.model, params)
        self.vocabulary = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocabulary)

    def step(self, tokens: list[int]) -> np.ndarray:
        """[V]: logits after the last of these tokens, which follow all that came before."""
        self._decode(tokens)
        return self._logits(-1)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[n, V]: a copy of the logits after each of these tokens, up to 512, which follow all that came before."""
        wanted = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
        self._decode(tokens, wanted)
        return np.stack([self._logits(i) for i in range(len(tokens))])

    def _decode(self, tokens: list[int], wanted: Any = None) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self.lib.llama_batch_get_one(ctypes.cast(array, ctypes.c_void_p), len(tokens))
        if wanted is not None:
            batch.logits = ctypes.cast(wanted, ctypes.c_void_p)
        done = self.lib.llama_decode(self.context, batch)
        if done != 0:
            raise RuntimeError(f"llama.cpp: llama_decode must return 0, got {done}")

    def _logits(self, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), shape=(self.size,))

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text; ``special``: with those that begin and end it, and special ones in the text."""
        encoded, room = text.encode(), 4 * len(text.encode()) + 8
        array = (ctypes.c_int32 * room)()
        found = self.lib.llama_tokenize(
            self.vocabulary,
            encoded,
            len(encoded),
            ctypes.cast(array, ctypes.c_void_p),
            room,
            special,
            special,
        )
        return list(array[:found])

    def chat_template(self) -> str | None:
        text = self.lib.llama_model_chat_template(self.model, None)
        return text.decode() if text else None

    def reset(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
