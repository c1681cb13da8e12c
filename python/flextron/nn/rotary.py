"""RoPE tables that depend on a call's own positions: some of transformers' remember the longest ever asked for."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from flextron.nn.anatomy import Anatomy

_LOCK = threading.Lock()  # for the microseconds in which a table is made
_REMEMBERING = ("dynamic", "longrope")


def rotary_of(model: Any, anatomy: Anatomy) -> Any:
    """The module that makes a model's RoPE tables; None where it has none."""
    return anatomy.base_in(model)._modules.get("rotary_emb")


def once(rotary: str, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of an interleaved rotation with every frequency once, [.., R / 2]; ``rotary`` is an anatomy's."""
    if rotary == "interleaved":
        return cos[..., ::2], sin[..., ::2]
    if rotary == "interleaved_halves":
        return cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]
    return sin, cos


def forget(rotary: nn.Module) -> None:
    """Make each call of a model's ``rotary_emb`` depend on its own positions only, whatever other threads ask for."""
    kind = getattr(rotary, "rope_type", None)
    if isinstance(kind, dict) and any(each in _REMEMBERING for each in kind.values()):
        raise NotImplementedError(
            f"make_elastic: rope_type of a kind of layer must not be {' or '.join(_REMEMBERING)}, got {kind}"
        )
    if kind in _REMEMBERING:
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
