"""Take a sub-network out of an elastic model as a plain transformers model with memory of its own.

A transformers configuration has one ``intermediate_size`` and one number of heads for all layers. So there
are three layouts for a sub-network:

``uniform``  every layer has the same widths: an ordinary checkpoint, for all that reads this architecture.
``padded``   every layer is filled up with zero neurons and zero heads to the widest layer: an ordinary
             checkpoint with the same logits, but as large and slow as the widest layer everywhere.
``ragged``   each layer has its own sizes: as small and fast as the sub-network is. `flextron.load_plain` reads it;
             stock transformers refuses it, for the sizes in its configuration are not those of the tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from flextron.config import ElasticConfig, Widths
from flextron.nn.projection import check_plain
from flextron.nn.protocol import Elastic
from flextron.nn.skeleton import fill, say_tied, skeleton

LAYOUTS = ("auto", "uniform", "padded", "ragged")
LAYOUT_KEY = "flextron"  # in config.json: the sizes of each layer of a ragged model
SIZES = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


def stock_problem(config: ElasticConfig, widths: Widths) -> str | None:
    """Why stock transformers cannot hold this sub-network as it is, in one sentence; None when it can."""
    different = [axis for axis in ("mlp", "heads") if len(set(getattr(widths, axis))) > 1]
    if different:
        axes = " and ".join(different)
        return f"layers differ in {axes}, but a {config.family} configuration has one width for all"
    return _illegal_heads(config, config.query_heads(widths.heads[0]))


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
    problem = stock_problem(config, widths)
    if layout == "auto":
        return fallback if problem else "uniform"
    if layout == "uniform" and problem:
        raise ValueError(
            f"extract: layout must be padded (for stock transformers) or ragged, got uniform: {problem}"
        )
    return layout


def _illegal_heads(config: ElasticConfig, heads: int) -> str | None:
    """Llama's configuration alone insists that heads divide the hidden size, although head_dim is free."""
    if config.family == "llama" and config.hidden_size % heads:
        return f"the query heads of a llama must divide hidden_size {config.hidden_size}, got {heads}"
    return None


def build(model: Elastic, widths: Widths, layout: str, shares: bool = False) -> PreTrainedModel:
    """The plain model of `extract`, its layout already chosen by `layout_of`.

    ``shares``: its weights are views of the elastic ones where they can be, for a comparison that takes no memory.
    """
    check_plain("extract", model)
    elastic: ElasticConfig = model.elastic
    kept = [_kept(elastic, d, n) for d, n in zip(widths.mlp, widths.heads, strict=True)]
    held = [_padded(elastic, widths)] * elastic.num_layers if layout == "padded" else kept
    layers = [_sizes(*size) for size in held]

    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values.update(architectures=[type(model).__name__], head_dim=elastic.head_dim, dtype=model.dtype)
    if layout == "ragged":
        values[LAYOUT_KEY] = {"layout": layout, "layers": layers}
    else:
        values.update(layers[0])
    config = CONFIG_MAPPING[elastic.family].from_dict(values)
    say_tied(model, config)
    plain = skeleton(config)
    if layout == "ragged":
        resize(plain, layers)
    fill(plain, _tensors(model, kept, held, shares)).to(model.device)  # the rest of it: a few buffers
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def _kept(config: ElasticConfig, d: int, heads: int) -> tuple[int, int, int]:
    """(neurons, groups, query heads in each group) of a choice."""
    return (
        (d, heads, config.heads_per_group) if config.unit == "kv_group" else (d, config.num_kv_heads, heads)
    )


def _padded(config: ElasticConfig, widths: Widths) -> tuple[int, int, int]:
    """The smallest size that holds every layer and that the configuration can say."""
    counts = range(max(widths.heads), config.max_heads + 1)  # the last is the parent's own, which is legal
    heads = next(n for n in counts if not _illegal_heads(config, config.query_heads(n)))
    return _kept(config, max(widths.mlp), heads)


def _sizes(d: int, groups: int, per_group: int) -> dict[str, int]:
    return dict(zip(SIZES, (d, groups * per_group, groups), strict=True))


def resize(model: PreTrainedModel, layers: list[dict[str, int]]) -> None:
    """Give each layer of a `skeleton` its own sizes."""
    for layer, size in zip(model.model.layers, layers, strict=True):
        d, H, G = (size[key] for key in SIZES)
        mlp, attention = layer.mlp, layer.self_attn
        D = attention.head_dim
        for module, name, inputs, outputs in (
            (mlp, "gate_proj", None, d),
            (mlp, "up_proj", None, d),
            (mlp, "down_proj", d, None),
            (attention, "q_proj", None, H * D),
            (attention, "k_proj", None, G * D),
            (attention, "v_proj", None, G * D),
            (attention, "o_proj", H * D, None),
        ):
            old = getattr(module, name)
            new = nn.Linear(
                inputs or old.in_features,
                outputs or old.out_features,
                bias=old.bias is not None,
                device="meta",
                dtype=old.weight.dtype,
            )
            setattr(module, name, new)
        mlp.intermediate_size = d
        attention.num_key_value_groups = H // G  # what the attention functions repeat keys by


def _tensors(
    model: Elastic, kept: list[tuple[int, int, int]], held: list[tuple[int, int, int]], shares: bool
) -> dict[str, Tensor]:
    """Every parameter of the plain model: a prefix of the elastic one's, zero from ``kept`` to ``held``."""
    cut: dict[str, Callable[[Tensor], Tensor]] = {}
    G, M, D = model.elastic.num_kv_heads, model.elastic.heads_per_group, model.elastic.head_dim
    for i, ((d, g, m), (d_held, g_held, m_held)) in enumerate(zip(kept, held, strict=True)):
        neurons = ((d,), (d_held,), (model.elastic.intermediate_size,))
        query = ((g, m, D), (g_held, m_held, D), (G, M, D))
        keys = ((g, D), (g_held, D), (G, D))
        for name, dim, prefix in (
            ("mlp.gate_proj", 0, neurons),
            ("mlp.up_proj", 0, neurons),
            ("mlp.down_proj", 1, neurons),
            ("self_attn.q_proj", 0, query),
            ("self_attn.k_proj", 0, keys),
            ("self_attn.v_proj", 0, keys),
            ("self_attn.o_proj", 1, query),
        ):
            stem = f"model.layers.{i}.{name}"
            cut[f"{stem}.weight"] = partial(_cut, dim=dim, sizes=prefix, shares=shares)
            if dim == 0:  # a bias belongs to outputs: those of down and o are the hidden size, and stay whole
                cut[f"{stem}.bias"] = cut[f"{stem}.weight"]
    whole = Tensor.detach if shares else torch.clone
    return {name: cut.get(name, whole)(p.detach()) for name, p in model.named_parameters()}


def _cut(t: Tensor, dim: int, sizes: tuple[tuple[int, ...], ...], shares: bool) -> Tensor:
    """View dimension ``dim`` as ``whole``, keep a prefix of each axis of it, pad with zeros to ``held``.

    The result may share memory with ``t`` if ``shares``, and has its own otherwise.
    """
    kept, held, whole = sizes
    prefix = (*(slice(None),) * dim, *(slice(n) for n in kept))
    source, last = t.unflatten(dim, whole)[prefix], dim + len(held) - 1
    if shares and kept == held:
        return source.flatten(dim, last)
    out = t.new_zeros((*t.shape[:dim], *held, *t.shape[dim + 1 :]))
    out[prefix] = source
    return out.flatten(dim, last)
