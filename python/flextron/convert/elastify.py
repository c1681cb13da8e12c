"""Turn a stock checkpoint into an elastic one: score, sort, prove that the full model is unchanged, store."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flextron.config import ElasticConfig
from flextron.convert.importance import check_tokens, score
from flextron.convert.reorder import LayerOrder, identity_orders, random_orders, reorder, sorted_orders
from flextron.convert.store import save_elastic
from flextron.nn import ElasticModel, elastic_config, make_elastic
from flextron.nn.skeleton import skeleton

ORDERS = ("importance", "none", "random")
PARITY_BOUND = 1e-4  # of the largest logit, float32: above the rounding of another summation order
_HELD_OUT = 4  # sequences kept from scoring, for the proof
_HELD_OUT_TOKENS = 128  # of each: logits of a large vocabulary are big
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class ParityError(ValueError):
    """The converted model is not the parent; nothing was written."""


def convert(
    parent: Any,
    out_dir: str | Path,
    *,
    calibration: Tensor,
    tokenizer: Any = None,
    unit: str = "kv_group",
    aggregate: str = "l2",
    mlp_choices: tuple[int, ...] | None = None,
    head_choices: tuple[int, ...] | None = None,
    order: str = "importance",
    seed: int = 0,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make an elastic checkpoint of a stock one.

    Args:
        parent: a loaded transformers causal LM (left as it is), a directory, or the id of a model on the hub.
        out_dir: the elastic checkpoint; still loads in stock transformers as the full parent.
        calibration: [n, L] int64 token ids, at least two sequences; a few are held out for the proof.
        tokenizer: stored with the model; read from the directory when ``parent`` is one.
        unit: ``"kv_group"`` or ``"query"``: what the head axis counts.
        aggregate: of importance over tokens: ``"l2"``, ``"mean_abs"`` or ``"variance"``.
        mlp_choices, head_choices: menus of widths; by default quarters.
        order: ``"importance"``; ``"none"`` and ``"random"`` are for comparison.
        seed: of the random order.
        batch_size: sequences in a scoring pass.
        progress: called after each scoring pass with sequences done and in all.

    Returns:
        What ``flextron.json`` stores: ``parity`` (``max_abs``, ``max_rel``, ``tokens``) and ``importance``.

    Raises:
        ParityError: the full elastic model differs from the parent by more than 1e-4 of its largest logit.
    """
    if order not in ORDERS:
        raise ValueError(f"convert: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if isinstance(parent, ElasticModel):
        raise ValueError("convert: parent must be a stock model, got one that is elastic already")
    stored = parent if isinstance(parent, str | Path) else None
    if stored is not None and Path(stored).resolve() == Path(out_dir).resolve():
        raise ValueError(f"convert: out_dir must be another directory than the parent's, got {out_dir}")
    hf_config = AutoConfig.from_pretrained(stored) if stored is not None else parent.config
    config = elastic_config(hf_config, unit, mlp_choices, head_choices)
    make_elastic(
        skeleton(copy.deepcopy(hf_config)), config
    )  # refuses, before any work, what cannot be elastic
    check_tokens("convert", calibration, config.vocab_size, sequences=2)

    if stored is not None:
        # safetensors only: a pickled checkpoint runs whatever code its author put there.
        model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32, use_safetensors=True)
        tokenizer = tokenizer or _tokenizer_of(stored)
        dtype = hf_config.dtype or torch.float32
    else:
        dtype = parent.dtype
        model = copy.deepcopy(parent).float()
    model.eval()

    held_out = min(_HELD_OUT, max(1, len(calibration) // 4))
    proof = calibration[-held_out:, :_HELD_OUT_TOKENS]
    before = _logits(model, proof)
    orders, found = _orders(
        model, config, calibration[:-held_out], order, aggregate, seed, batch_size, progress
    )
    reorder(model, orders, config)
    make_elastic(model, config)
    report = {"parity": parity(before, _logits(model, proof)), "importance": found}
    _store_as(model, dtype)
    save_elastic(model, out_dir, tokenizer, report)
    return report


def parity(before: Tensor, after: Tensor) -> dict[str, Any]:
    """The certificate: how far the logits [n, L, V] moved, absolutely and relative to the largest of them.

    Raises:
        ParityError: by more than 1e-4, or to something that is not a number.
    """
    max_abs = (after - before).abs().max().item()
    max_rel = max_abs / max(before.abs().max().item(), torch.finfo(torch.float32).tiny)
    if not (math.isfinite(max_rel) and max_rel <= PARITY_BOUND):
        raise ParityError(
            f"convert: logits must stay within {PARITY_BOUND:g} of the parent's, got {max_rel:.3g}; "
            "nothing was written"
        )
    return {"max_abs": max_abs, "max_rel": max_rel, "tokens": before.shape[0] * before.shape[1]}


def _orders(
    model: Any,
    config: ElasticConfig,
    calibration: Tensor,
    order: str,
    aggregate: str,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[LayerOrder], dict[str, Any]]:
    if order == "none":
        return identity_orders(config), {"order": order}
    if order == "random":
        return random_orders(config, seed), {"order": order, "seed": seed}
    importance = score(model, calibration, aggregate=aggregate, batch_size=batch_size, progress=progress)
    found = {"order": order, "aggregate": aggregate, "tokens": importance.tokens}
    return sorted_orders(importance, config), found


@torch.no_grad()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    rows = [
        model(input_ids=row[None].to(model.device), use_cache=False).logits.float().cpu() for row in tokens
    ]
    return torch.cat(rows)


def _store_as(model: Any, dtype: torch.dtype) -> None:
    """Give the parameters the parent's dtype back; what was converted up from it returns exactly."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def _tokenizer_of(source: str | Path) -> Any:
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(source)
