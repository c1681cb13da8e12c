"""Take a sub-network out of an elastic model as a plain transformers model with memory of its own.

A transformers configuration has one ``intermediate_size`` and one number of heads for all layers. So there
are three layouts for a sub-network:

``uniform``  every layer has the same widths: an ordinary checkpoint, for all that reads this architecture.
``padded``   every layer is filled up with zero neurons and zero heads to the widest layer: an ordinary
             checkpoint with the same logits, but as large and slow as the widest layer everywhere.
``ragged``   each layer has its own sizes: as small and fast as the sub-network is. `flextron.load_plain` reads it;
             stock transformers needs the code that `flextron.export` writes beside it, for the sizes in its
             configuration are not those of the tensors.

A layer that skips its MLP or its attention has zeros in the place of it where it is padded, and the output's bias is
zeros too; a ragged one leaves it out, but for the norms and a bias that a stock layer has.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flextron.config import ElasticConfig, Widths
from flextron.nn.anatomy import (
    Sizes,
    anatomy_of,
    has_one_head_size,
    normalises_all_heads,
    places,
    row_of,
    size,
)
from flextron.nn.families import head_size
from flextron.nn.projection import check_plain
from flextron.nn.protocol import Elastic
from flextron.nn.skeleton import fill, say_tied, skeleton

LAYOUTS = ("auto", "uniform", "padded", "ragged")
LAYOUT_KEY = "flextron"  # in config.json: the sizes of each layer of a ragged model
_CACHES = ("cache", "layer_past")  # stock attentions' names of their cache
SIZES = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


def stock_problem(config: ElasticConfig, widths: Widths) -> str | None:
    """Why stock transformers cannot hold this sub-network as it is, in one sentence; None when it can."""
    different = [name for name, layers in widths.to_dict().items() if len(set(layers)) > 1]
    if different:
        axes = " and ".join(different)
        return f"layers differ in {axes}, but a {config.family} configuration has one width for all"
    if skipped := [name for name, layers in widths.to_dict().items() if 0 in layers]:
        return (
            f"layers have no {' and no '.join(skipped)}, but a {config.family} configuration has at least one"
        )
    return _illegal_heads(config, widths.heads[0])


def padded_problem(config: ElasticConfig, widths: Widths) -> str | None:
    """Why heads of zeros would change what this sub-network computes, in one sentence; None when they would not."""
    if not normalises_all_heads(config):
        return None
    counts = {*widths.heads} - {0}  # a layer of nothing but zeros gives zeros
    if len(counts) <= 1 and not any(_illegal_heads(config, n) for n in counts):
        return None
    return f"a {config.family} normalises all heads of a token together"


def extract(
    model: Elastic, budget: Widths | float | None = None, *, layout: str = "auto", **units: Any
) -> Any:
    """A plain transformers model that computes what ``model`` computes at a budget.

    Args:
        model: elastic; left as it is.
        budget: widths, or a fraction as for ``set_budget``; None takes the current widths.
        layout: ``"uniform"``, ``"padded"`` or ``"ragged"``; ``"auto"``: uniform where possible, else ragged.
        units: other budgets of ``set_budget``: ``latency_ms=``, ``params=``, ``memory_gb=``, ...

    Returns:
        A model of the parent's stock class, in eval mode, with memory of its own.

    Raises:
        ValueError: the layout cannot hold these widths (the message says which can).
    """
    widths = widths_of(model, budget, units)
    return build(model, widths, layout_of(layout, model.elastic, widths, "ragged"))


def widths_of(model: Elastic, budget: Widths | float | None, units: dict[str, Any]) -> Widths:
    """The one static network that `extract` was asked for."""
    if not hasattr(model, "layers_of"):
        raise TypeError(f"extract: model must be elastic, got {type(model).__name__}")
    if isinstance(budget, Widths):
        model.elastic.check(budget)
        return budget
    if budget is None and not units:
        if model.dial.targets or len(model.dial.widths) > 1:
            raise ValueError(
                "extract: budget must be given where requests or tokens have widths of their own, got none"
            )
        return model.widths
    with model.budget(budget, **units) as widths:
        if not isinstance(widths, Widths):
            raise ValueError("extract: budget must be one static network, got one for each request or token")
        return widths


def layout_of(layout: str, config: ElasticConfig, widths: Widths, fallback: str) -> str:
    """The layout to write; ``fallback`` is what ``auto`` means where uniform is impossible."""
    if layout not in LAYOUTS:
        raise ValueError(f"extract: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    problem, changed = stock_problem(config, widths), padded_problem(config, widths)
    if layout == "auto":
        return "uniform" if not problem else "ragged" if changed else fallback
    if layout == "padded" and changed:
        raise ValueError(f"extract: layout must be ragged, got padded: {changed}")
    if layout == "uniform" and problem:
        other = "ragged" if changed else "padded (for stock transformers) or ragged"
        raise ValueError(f"extract: layout must be {other}, got uniform: {problem}")
    return layout


def _illegal_heads(config: ElasticConfig, heads: int) -> str | None:
    """Why a configuration cannot say this width of the head axis.

    Llama's insists that query heads divide the hidden size, although head_dim is free; others have no head_dim.
    """
    if has_one_head_size(config) and heads != config.max_heads:
        return (
            f"a {config.family} configuration has hidden_size / heads for its head size, so heads must be all"
        )
    query = config.query_heads(heads)
    if row_of(config) == "llama" and config.hidden_size % query:
        return f"the query heads of a llama must divide hidden_size {config.hidden_size}, got {query}"
    return None


def build(
    model: Elastic, widths: Widths, layout: str, shares: bool = False, held: list[Sizes] | None = None
) -> PreTrainedModel:
    """The plain model of `extract`, its layout already chosen by `layout_of`.

    ``shares``: its weights are views of the elastic ones where they can be, for a comparison that takes no memory.
    ``held``: the sizes of each layer of a ragged one, where they are larger than what is kept; the rest is zeros.
    """
    check_plain("extract", model)
    elastic: ElasticConfig = model.elastic
    kept = kept_sizes(elastic, widths)
    if held is None:
        held = [_padded(elastic, widths)] * elastic.num_layers if layout == "padded" else kept
    layers, anatomy = [_sizes(size) for size in held], model.anatomy

    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values.update(architectures=[type(model).__name__], dtype=model.dtype)
    says_heads = not has_one_head_size(elastic)
    if says_heads:
        values.update(head_dim=elastic.head_dim)
    if layout == "ragged":
        values[LAYOUT_KEY] = {"layout": layout, "layers": layers}
    else:
        neurons, heads, groups = layers[0].values()
        values[anatomy.sizes[0]] = neurons
        if says_heads:
            values.update({"num_attention_heads": heads, anatomy.sizes[1]: groups})
    config = CONFIG_MAPPING[elastic.family].from_dict(values)
    say_tied(model, config)
    if anatomy.experts:  # transformers' faster ways do not take every width
        config._experts_implementation = "eager"
    plain = skeleton(config)
    if layout == "ragged":
        resize(plain, layers)
    fill(plain, _tensors(model, kept, held, shares)).to(model.device)  # the rest of it: a few buffers
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def kept_sizes(config: ElasticConfig, widths: Widths) -> list[Sizes]:
    """What a sub-network keeps of each layer."""
    return [_kept(config, d, n) for d, n in zip(widths.mlp, widths.heads, strict=True)]


def _kept(config: ElasticConfig, d: int, heads: int) -> Sizes:
    """What a choice keeps."""
    if heads == 0:
        return Sizes(d, 0, 1)
    if config.unit == "kv_group":
        return Sizes(d, heads, config.heads_per_group)
    return Sizes(d, config.num_kv_heads, heads)


def _padded(config: ElasticConfig, widths: Widths) -> Sizes:
    """The smallest size that holds every layer and that the configuration can say."""
    counts = range(
        max(1, *widths.heads), config.max_heads + 1
    )  # the last is the parent's own, which is legal
    heads = next(n for n in counts if not _illegal_heads(config, n))
    return _kept(config, max(1, *widths.mlp), heads)


def _sizes(s: Sizes) -> dict[str, int]:
    return dict(zip(SIZES, (s.neurons, s.groups * s.per_group, s.groups), strict=True))


def resize(model: PreTrainedModel, layers: list[dict[str, int]]) -> None:
    """Give each layer of a `skeleton` its own sizes."""
    anatomy, D = anatomy_of(model.config), head_size(model.config)
    axes = anatomy.tensors()
    for layer, sizes in zip(anatomy.layers_in(model), layers, strict=True):
        d, H, G = (sizes[key] for key in SIZES)
        own = Sizes(d, G, H // max(1, G))
        for name, p in list(layer.named_parameters()):
            shape = [
                size(axis, own, D) if axis else n
                for axis, n in zip(axes.get(name, ((),) * p.dim()), p.shape, strict=True)
            ]
            path, _, leaf = name.rpartition(".")
            owner = layer.get_submodule(path)
            setattr(owner, leaf, nn.Parameter(p.new_empty(shape), requires_grad=p.requires_grad))
            if isinstance(owner, nn.Linear) and leaf == "weight":
                owner.out_features, owner.in_features = shape
            if isinstance(owner, Conv1D) and leaf == "weight":
                owner.nx, owner.nf = shape
        attention, mlp = anatomy.attention_in(layer), anatomy.mlp_in(layer)
        if d == 0 and anatomy.mlp and not anatomy.experts:
            mlp.forward = torch.zeros_like  # transformers' Conv1D fails without inputs
        if hasattr(mlp, "intermediate_size"):
            mlp.intermediate_size = d
        if G == 0:
            attention.forward = partial(_skip, attention)
            continue
        counts = {"query": H, "groups": G, "per_group": H // G, "query_features": H * D}
        for name, what in anatomy.counts.items():
            owner, leaf = attention, name.removeprefix("config.")
            if leaf != name:
                attention.config = owner = copy.copy(attention.config)
            setattr(owner, leaf, counts[what])


def _skip(attention: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The forward of a stock attention without heads: zeros, and a number for each token in the cache.

    transformers counts the tokens in the first layer's, and of keys without elements it counts none.
    """
    given = inspect.signature(type(attention).forward).bind(attention, *args, **kwargs).arguments
    given |= given.get("kwargs", {})
    x: Tensor = given["hidden_states"]
    cache: Any = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    if cache is not None:
        mark = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
        cache.update(mark, mark, attention.layer_idx)
    return torch.zeros_like(x), None


def _tensors(model: Elastic, kept: list[Sizes], held: list[Sizes], shares: bool) -> dict[str, Tensor]:
    """Every parameter of the plain model: a prefix of the elastic one's, zero from ``kept`` to ``held``.

    With ``shares`` it has the elastic one's memory where it can: where a prefix is the first places of a dimension.
    """
    anatomy, D = model.anatomy, model.elastic.head_dim
    axes, whole = anatomy.tensors(), anatomy.whole(model.config)
    followed = {
        f"{anatomy.layer_path(i)}.{name}": (dims, *sizes)
        for i, sizes in enumerate(zip(kept, held, strict=True))
        for name, dims in axes.items()
    }

    skipped = {
        f"{anatomy.layer_path(i)}.{name}"
        for i, own in enumerate(kept)
        for name in anatomy.output_biases(attention=own.groups == 0, mlp=own.neurons == 0)
    }

    def cut(name: str, t: Tensor) -> Tensor:
        if name in skipped:
            return torch.zeros_like(t)
        dims, part, room = followed.get(name, ((), whole, whole))
        for dim, axis in enumerate(dims):
            if axis:
                t = _cut(t, dim, places(axis, part, whole, D))
                if room != part:
                    shape = (*t.shape[:dim], size(axis, room, D), *t.shape[dim + 1 :])
                    t = t.new_zeros(shape).index_copy(dim, places(axis, part, room, D).to(t.device), t)
        return t if shares else t.clone(memory_format=torch.contiguous_format)

    return {name: cut(name, p.detach()) for name, p in model.named_parameters()}


def _cut(t: Tensor, dim: int, kept: Tensor) -> Tensor:
    """What is kept of a dimension: a view where it is the first places, as it is of most."""
    first = not len(kept) or int(kept[-1]) == len(kept) - 1  # ascending
    return t.narrow(dim, 0, len(kept)) if first else t.index_select(dim, kept.to(t.device))
