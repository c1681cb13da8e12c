"""How far two models are apart, and whether a sub-network computes the same as the plain model extracted from it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from flextron.config import Widths
from flextron.nn.allocator import give_back
from flextron.nn.anatomy import anatomy_of
from flextron.nn.families import elastic_config
from flextron.nn.model import make_elastic
from flextron.nn.plain import build, layout_of
from flextron.nn.protocol import Elastic
from flextron.nn.skeleton import fill, say_tied, skeleton
from flextron.nn.widened import is_narrow, widened

BOUND = 1e-4  # of the largest logit, float32: above the rounding of another summation order
EXACT = 1e-6  # the same in float64: above what norms that round to float32 on their way leave
_PROMPT, _GENERATED = 16, 8  # tokens
_PIECE = 1 << 20  # logits that are compared at once


class ParityError(ValueError):
    """Two models that must compute the same do not; nothing was written."""


def difference(before: Tensor, after: Iterable[Tensor]) -> dict[str, float]:
    """How far logits moved: ``max_abs``, and ``max_rel`` to the largest of ``before``; a sequence at a time."""
    rows, found = iter(after), list[Tensor]()
    for row in before:
        found += _apart(
            row, next(rows)
        )  # which nothing else refers to: it is gone before the next is computed
    max_abs, largest = torch.stack(found).amax(0).tolist()
    return {"max_abs": max_abs, "max_rel": max_abs / max(largest, torch.finfo(torch.float32).tiny)}


def _apart(before: Tensor, after: Tensor) -> list[Tensor]:
    """Of each piece of one sequence's logits: how far they moved at most, and the largest before."""
    pieces = zip(*(logits.reshape(-1).split(_PIECE) for logits in (before, after)), strict=True)
    return [torch.stack([(new - old).abs().max(), old.abs().max()]) for old, new in pieces]


def require_close(who: str, what: str, before: Tensor, after: Iterable[Tensor]) -> dict[str, float]:
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


def require_same(
    who: str, what: str, model: Elastic, plain: PreTrainedModel, tokens: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The logits [n, L, V] of an elastic and of a plain model that must compute the same, and what a report adds.

    A network may amplify float32's rounding beyond `BOUND`. Where float32 exceeds it, both compute in float64: they
    must be within `EXACT` of each other, and what the elastic model's float32 is off at nine of ten positions at most
    twice what the plain one's is. The report then adds ``float64``: ``max_rel`` there; otherwise nothing.

    Args:
        model: elastic, set to a budget; in float32 or wider, as ``plain`` is.
        tokens: [n, L] int64.

    Raises:
        ParityError: they differ by more than rounding.
    """
    before, after = logits_of(model, tokens), logits_of(plain, tokens)
    try:
        require_close(who, what, before, after)
    except ParityError:
        wide = [logits_of(each, tokens, torch.float64) for each in (model, plain)]
        ours, theirs = (_usually_off(*pair) for pair in zip(wide, (before, after), strict=True))
        exact = difference(*wide)["max_rel"]
        if not (exact <= EXACT and ours <= 2 * theirs):
            raise
        return before, after, {"float64": exact}
    return before, after, {}


def _usually_off(exact: Tensor, logits: Tensor) -> float:
    """How far the logits of nine of ten positions are off at most: near-ties of attention make the rest a lottery."""
    return (logits - exact).abs().amax(-1).flatten().quantile(0.9).item()


def logits_of(model: Elastic | PreTrainedModel, tokens: Tensor, least: torch.dtype | None = None) -> Tensor:
    """[n, L, V] on the CPU, computed as in `each_logits`."""
    found: Tensor | None = None
    for i, row in enumerate(tokens):
        logits = _logits(model, row, least)
        found = logits.new_empty(len(tokens), *logits.shape) if found is None else found
        found[i] = logits
        del logits  # room for the next
    assert found is not None
    return found


def each_logits(
    model: Elastic | PreTrainedModel, tokens: Tensor, least: torch.dtype | None = None
) -> Iterator[Tensor]:
    """[L, V] on the CPU of one sequence after another, for logits of a large vocabulary are big.

    Args:
        tokens: [n, L] int64.
        least: the narrowest dtype to compute in, see `widened`; None: that of the weights.
    """
    for row in tokens:
        yield _logits(model, row, least)


@torch.no_grad()
def _logits(model: Elastic | PreTrainedModel, row: Tensor, least: torch.dtype | None) -> Tensor:
    with contextlib.nullcontext() if least is None else widened(model, least):
        return model(input_ids=row[None].to(model.device), use_cache=False).logits[0].cpu()


def in_dtype(model: Elastic, dtype: torch.dtype) -> Elastic:
    """The elastic model with its parameters in ``dtype``: itself where they are, otherwise another."""
    if all(p.dtype == dtype for p in model.parameters()):
        return model
    config = type(model.config).from_dict(model.config.to_dict())  # without what makes it elastic
    say_tied(model, config)
    other = skeleton(config)
    fill(other, {name: p.detach().to(dtype) for name, p in model.named_parameters()}).to(model.device)
    own = model.elastic  # which tokens there are, and whether they are tied, may have changed since
    return make_elastic(other, elastic_config(other, own.unit, *own.menus))


def prove_sub_network(who: str, model: Elastic, widths: Widths, tokens: Tensor) -> dict[str, Any]:
    """Certify one sub-network of an elastic model against the plain model that `extract` takes out of it.

    Logits of whole sequences are compared, by the op that inference takes on a CPU and by the modules that training
    takes. Then the elastic model generates with its cache: the plain model, without one, must find each of those tokens
    the likeliest, or level with it.

    Arithmetic is float32 at least. Weights in a narrower dtype are not copied for it: the whole model computes by its
    modules, see `widened`. Where the layers are Llama's, each is then proven in all of these ways on what it was given
    in that forward.

    Args:
        model: elastic.
        tokens: [n, L] int64.

    Returns:
        ``mlp`` and ``heads`` of the widths, ``max_abs``, ``max_rel``, ``tokens`` and ``generated`` (tokens).

    Raises:
        ParityError: they differ.
    """
    plain = build(model, widths, layout_of("auto", model.elastic, widths, "ragged"), shares=True)
    whose = "those of the sub-network as a plain model"
    with _watched(plain) as given:
        expected = logits_of(plain, tokens, torch.float32)
    with model.budget(widths=widths), widened(model):
        found = require_close(who, whose, expected, each_logits(model, tokens))
        require_close(who, whose, expected[:1], _as_trained(model, tokens[:1]))
        said = _greedy(model, tokens[:1, :_PROMPT])
    judged = logits_of(plain, said, torch.float32)[:, min(_PROMPT, tokens.shape[1]) - 1 : -1]
    new = said[:, -judged.shape[1] :, None]  # of judged [1, generated, V]
    lost = judged.max(-1).values - judged.gather(-1, new)[..., 0]
    if not (lost <= 2 * BOUND * judged.abs().max()).all():
        raise ParityError(
            f"{who}: tokens generated with a cache must be those of the sub-network as a plain model, got others; "
            "nothing was written"
        )
    del expected, judged  # room for a layer
    if is_narrow(model) and model.anatomy.is_llama(model.config):
        positions = torch.arange(tokens.shape[1])[None]
        for layer, (mlp, heads) in enumerate(zip(widths.mlp, widths.heads, strict=True)):
            own = Widths((mlp,), (heads,))
            proven = prove_sub_network(
                f"{who}: layer {layer}", _alone(model, layer, given[layer]), own, positions
            )
            found = {key: max(value, proven[key]) for key, value in found.items()}
    return {
        **widths.to_dict(),
        **found,
        "tokens": tokens.numel(),
        "generated": new.numel(),
    }


@contextlib.contextmanager
def _watched(plain: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield a list that gets what each layer is given for a sequence, [T, K]: L entries for each sequence."""
    given: list[Tensor] = []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args[0] if args else kwargs["hidden_states"])[0].detach())

    layers = anatomy_of(plain.config).layers_in(plain)
    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def _as_trained(model: Elastic, tokens: Tensor) -> Tensor:
    """[n, L, V] on the CPU, by the modules that training takes; nothing is kept for a backward pass."""
    nothing: Any = lambda _: None  # noqa: E731
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(nothing, nothing):
        return model(input_ids=tokens.to(model.device), use_cache=False).logits.detach().cpu()


def _alone(model: Elastic, layer: int, given: Tensor) -> Elastic:
    """One layer of an elastic model as a model by itself, in the dtype of ``given``.

    Token t is embedded as what the layer is given for it, ``given`` [T, K], again and again for more tokens; the
    logits are what comes out of the layer, through the model's last norm.
    """
    give_back()
    own, (T, K) = model.elastic, given.shape
    values = model.config.to_dict()  # without what makes it elastic
    values.update(
        num_hidden_layers=1,
        vocab_size=max(T, K),
        tie_word_embeddings=False,
        pad_token_id=None,
        dtype=given.dtype,
    )
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][layer : layer + 1]
    config = type(model.config).from_dict(values)
    tensors = {
        "model.embed_tokens.weight": given[torch.arange(max(T, K)) % T],
        "model.norm.weight": model.base_model.norm.weight.detach().to(given.dtype),
        "lm_head.weight": torch.eye(max(T, K), K, dtype=given.dtype, device=given.device),
    }
    for name, p in model.decoder_layers[layer].named_parameters():
        tensors[f"model.layers.0.{name}"] = p.detach().to(given.dtype)
    alone = fill(skeleton(config), tensors).to(given.device)
    return make_elastic(alone, elastic_config(alone, own.unit, *own.menus))


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
