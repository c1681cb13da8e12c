"""How far two models are apart, and whether a sub-network computes the same as the plain model extracted from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from flextron.config import Widths
from flextron.nn.families import elastic_config
from flextron.nn.model import make_elastic
from flextron.nn.plain import extract
from flextron.nn.protocol import Elastic
from flextron.nn.skeleton import fill, say_tied, skeleton

BOUND = 1e-4  # of the largest logit, float32: above the rounding of another summation order
_PROMPT, _GENERATED = 16, 8  # tokens


class ParityError(ValueError):
    """Two models that must compute the same do not; nothing was written."""


def difference(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far logits moved: ``max_abs``, and ``max_rel`` to the largest of ``before``."""
    max_abs = (after - before).abs().max().item()
    return {
        "max_abs": max_abs,
        "max_rel": max_abs / max(before.abs().max().item(), torch.finfo(torch.float32).tiny),
    }


def require_close(who: str, what: str, before: Tensor, after: Tensor) -> dict[str, float]:
    """`difference`, once it is known to be within `BOUND`.

    Raises:
        ParityError: it is not, or not a number.
    """
    found = difference(before, after)
    if not (math.isfinite(found["max_rel"]) and found["max_rel"] <= BOUND):
        raise ParityError(
            f"{who}: logits must stay within {BOUND:g} of {what}, got {found['max_rel']:.3g}; nothing was written"
        )
    return found


@torch.no_grad()
def logits_of(model: Elastic | PreTrainedModel, tokens: Tensor) -> Tensor:
    """[n, L, V] on the CPU; one sequence at a time, for logits of a large vocabulary are big."""
    rows = [model(input_ids=row[None].to(model.device), use_cache=False).logits.cpu() for row in tokens]
    return torch.cat(rows)


def in_dtype(model: Elastic, dtype: torch.dtype) -> Elastic:
    """The elastic model with its parameters in ``dtype``: itself where they are, otherwise another."""
    if all(p.dtype == dtype for p in model.parameters()):
        return model
    config = type(model.config).from_dict(model.config.to_dict())  # without what makes it elastic
    say_tied(model, config)
    other = skeleton(config)
    fill(other, {name: p.detach().to(dtype) for name, p in model.named_parameters()}).to(model.device)
    own = model.elastic  # which tokens there are, and whether they are tied, may have changed since
    return make_elastic(other, elastic_config(config, own.unit, own.mlp_choices, own.head_choices))


def prove_sub_network(who: str, model: Elastic, widths: Widths, tokens: Tensor) -> dict[str, Any]:
    """Certify one sub-network of an elastic model against the plain model that `extract` takes out of it.

    Logits of whole sequences are compared, by the op that inference takes on a CPU and by the modules that training
    takes. Then the elastic model generates with its cache: the plain model, without one, must find each of those tokens
    the likeliest, or level with it.

    Args:
        model: elastic, float32 or float64.
        tokens: [n, L] int64.

    Returns:
        ``mlp`` and ``heads`` of the widths, ``max_abs``, ``max_rel``, ``tokens`` and ``generated`` (tokens).

    Raises:
        ParityError: they differ.
    """
    plain = extract(model, widths)
    whose = "those of the sub-network as a plain model"
    expected = logits_of(plain, tokens)
    with model.budget(widths=widths):
        found = require_close(who, whose, expected, logits_of(model, tokens))
        with torch.enable_grad():
            trained = model(input_ids=tokens[:1].to(model.device), use_cache=False).logits.detach().cpu()
        require_close(who, whose, expected[:1], trained)
        said = _greedy(model, tokens[:1, :_PROMPT])
    judged = logits_of(plain, said)[:, min(_PROMPT, tokens.shape[1]) - 1 : -1]  # [1, generated, V]
    new = said[:, -judged.shape[1] :, None]
    lost = judged.max(-1).values - judged.gather(-1, new)[..., 0]
    if not (lost <= 2 * BOUND * judged.abs().max()).all():
        raise ParityError(
            f"{who}: tokens generated with a cache must be those of the sub-network as a plain model, got others; "
            "nothing was written"
        )
    return {
        "mlp": list(widths.mlp),
        "heads": list(widths.heads),
        **found,
        "tokens": tokens.numel(),
        "generated": new.numel(),
    }


def _greedy(model: Elastic, prompt: Tensor) -> Tensor:
    """A prompt [1, T] and the tokens after it, from the logits alone: the model's generation config is set aside."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        prompt = prompt.to(model.device)
        # without a mask transformers takes every token with the id of the padding for padding
        options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
        return model.generate(prompt, max_new_tokens=_GENERATED, **options).cpu()
    finally:
        model.generation_config = settings
