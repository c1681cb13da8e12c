"""What a query may see: the masks that transformers takes, and the two forms in which they reach the layers.

Left padding (each row is hidden at first, then visible to its end) becomes `first_keys`, which the ops take. Every
other mask goes to torch's attention in four dimensions, which handles all of them but skips no hidden key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from flextron.nn.cache import ElasticCache, given_cache


def is_left_padded(mask: Tensor) -> bool:
    """Whether no row of mask [B, S] hides a token after a visible one. The host reads the answer."""
    seen = mask.bool()
    return bool((seen[:, 1:] >= seen[:, :-1]).all())


def first_keys(mask: Tensor) -> Tensor:
    """The index of each sequence's first visible key, [B] int64, from a left-padded mask [B, S]; S if there is none."""
    return (~mask.bool()).sum(1)


def with_form(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a causal LM's forward, their mask in one of the two forms for the layers.

    Raises:
        ValueError, TypeError: attention_mask is not one that transformers takes.
    """
    mask = given.get("attention_mask")
    if mask is None:
        return given
    if not isinstance(mask, Tensor):
        raise TypeError(f"flextron: attention_mask must be a tensor, got {type(mask).__name__}")
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return given
    cache = given_cache(given)
    past = cache.get_seq_length() if isinstance(cache, ElasticCache) else 0
    (B, T), keys = tokens.shape[:2], past + tokens.shape[1]
    if mask.dim() == 4:
        check_masked(mask, B, T, keys)
        return given
    if mask.dim() != 2 or mask.shape[0] != B:
        raise ValueError(
            f"flextron: attention_mask must have shape [{B}, {keys}] or [{B}, 1, {T}, {keys}], got {list(mask.shape)}"
        )
    if torch.compiler.is_compiling() or mask.shape[1] != keys:
        return given
    known = isinstance(cache, ElasticCache) and cache.is_left_padded
    if not known and not is_left_padded(mask):
        return given
    return given | {"attention_mask": _as_argument(first_keys(mask.to(tokens.device)))}


def with_positions(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward with the positions that its model would count over a mask's visible tokens."""
    mask = given.get("attention_mask")
    if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return given
    cache, seen = given_cache(given), mask.long()
    past = 0 if cache is None else cache.get_seq_length()
    return given | {"position_ids": (seen.cumsum(1) * seen - 1)[:, past:]}


def with_none(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, with a mask that hides nothing where neither mask nor positions are given.

    Without a mask transformers looks for packed sequences in the positions, even in those it counted itself. Their
    values are unknown under a compiler, which would therefore take every batch for packed.
    """
    if any(given.get(name) is not None for name in ("attention_mask", "position_ids")):
        return given
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or given_cache(given) is not None:
        return given
    none = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    return given | {"attention_mask": _as_argument(none)}


def _as_argument(first: Tensor) -> Tensor:
    """First keys [B] as [B, 1, 1, 1]: transformers hands a mask of four dimensions on to the layers as it is."""
    return first[:, None, None, None]


def split(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A layer's mask as (first keys [B], mask of four dimensions), of which at most one is there."""
    if mask is not None and mask.dtype == torch.int64:
        return mask.flatten(), None
    return None, mask


def check_masked(mask: Tensor, B: int, T: int, keys: int) -> None:
    """Raise unless a mask of four dimensions is one that torch's attention takes."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"flextron: attention_mask of four dimensions must be boolean or floating, got {mask.dtype}"
        )
    ends = zip((mask.shape[0], *mask.shape[2:]), (B, T, keys), strict=True)
    if any(size not in (1, wanted) for size, wanted in ends):
        raise ValueError(
            f"flextron: attention_mask must have shape [{B}, 1 or heads, {T}, {keys}], got {list(mask.shape)}"
        )


_IN_A_WINDOW, _OVERLAY = sliding_window_causal_mask_function(1), sliding_window_overlay(1)


def _is_plain(mask_function: Any) -> bool:
    """Whether a mask is causal and nothing more, but for the window that a layer knows of itself."""
    if mask_function is causal_mask_function:
        return True
    if mask_function.__code__ is not _IN_A_WINDOW.__code__:
        return False
    (parts,) = (cell.cell_contents for cell in mask_function.__closure__)
    return parts[0].__code__ is _OVERLAY.__code__ and parts[1:] == (causal_mask_function,)


def _form(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls by name: None for a causal one, else four dimensions."""
    if attention_mask is None and _is_plain(mask_function):
        return None
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


ALL_MASK_ATTENTION_FUNCTIONS.register("flextron", _form)
