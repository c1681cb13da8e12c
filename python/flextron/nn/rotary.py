"""RoPE tables that depend on a call's own positions: some of transformers' remember the longest ever asked for."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

_LOCK = threading.Lock()  # for the microseconds in which a table is made
_REMEMBERING = ("dynamic", "longrope")


def forget(rotary: nn.Module) -> None:
    """Make each call of a model's ``rotary_emb`` depend on its own positions only, whatever other threads ask for."""
    if rotary.rope_type in _REMEMBERING:
        rotary.register_forward_pre_hook(_begin)
        rotary.register_forward_hook(_end, always_call=True)


def _begin(rotary: Any, _: Any) -> None:
    if torch.compiler.is_compiling():
        return
    _LOCK.acquire()
    if rotary.rope_type == "dynamic":
        rotary.max_seq_len_cached, rotary.inv_freq = rotary.original_max_seq_len, rotary.original_inv_freq


def _end(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        _LOCK.release()
