"""Fit what comes last in MLPs and attentions for given networks, layer after layer, on what each network computes.

`refit` fits every projection alone, to features of the full network: it serves any network, and knows none. Where it is
known which networks budgets will run, the layers are fitted in order. What a projection is given is then what the
network itself has after the layers that are fitted already, and what it is to give is all that its stream lacks,

    minimise over W   sum_n s_n |(X* - X_n) - W[:, :c_n] H_n[:c_n]|^2  +  r |W - W_parent|^2,

where X_n [outputs, tokens] is the stream of network n in front of the addition, X* the parent's behind it, and H_n its
hidden features. So a layer also makes up for what narrower layers before it have lost, as far as its features tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flextron.config import Widths
from flextron.conversion.refit import NARROWER, RIDGE, Progress, Refit, check_fit
from flextron.nn.anatomy import Anatomy, places
from flextron.nn.plain import build, kept_sizes
from flextron.nn.protocol import Elastic

Call = dict[str, Any]  # what a model hands to a layer beside the stream


class _Reached(Exception):
    """Ends a forward pass that has shown all that is wanted."""


class _Network:
    """One of the networks that are fitted.

    Attributes:
        share: how much it counts.
        stock: its plain model, which has the elastic one's memory.
        sizes: what it keeps of each layer.
        streams: its residual stream in front of the next projection's sum, a tensor [B, T, K] for each batch.
    """

    def __init__(self, model: Elastic, widths: Widths, share: float) -> None:
        self.share = share
        self.stock = build(model, widths, "ragged", shares=True).eval()
        self.sizes = kept_sizes(model.elastic, widths)
        self.streams: list[Tensor] = []


@torch.no_grad()
def refit_in_order(
    model: Elastic,
    calibration: Tensor,
    networks: Sequence[Widths],
    *,
    narrower: float = NARROWER,
    ridge: float = RIDGE,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Refit:
    """Fit the last projection of every MLP and attention for these networks and the full one, in place.

    Memory beside the model: the stream of every network, [tokens, hidden size] float32, and of one layer the features
    of every network.

    Args:
        model: with plain weights, those of the parent; its widths do not matter.
        calibration: [n, L] int64 token ids, n at least 2.
        networks: what the weights are to serve.
        narrower: how much each of them counts beside the full one, which counts 1.
        ridge: r as a share of the mean square of an input; more of it keeps weights nearer to what they were.
        batch_size: sequences in a forward pass.
        progress: called after each layer with the layers done and the layers in all.

    Raises:
        ValueError: an argument is not what it must be, or the family's layers do not add what attention and then MLP
            give to the stream as it is. Nothing was changed.
    """
    check_fit(model, calibration, narrower, ridge)
    for widths in networks:
        model.elastic.check(widths)
    anatomy, full = model.anatomy, model.elastic.full()
    if fault := in_order_fault(anatomy):
        raise ValueError(
            f"refit: ladder must be of a family that can be fitted in order, got {model.elastic.family}: {fault}"
        )
    below = [widths for widths in dict.fromkeys(networks) if widths != full]
    if not below:
        raise ValueError("refit: networks must be at least one below the full one, got none")
    whole = _Network(model, full, 1.0)
    nets = [whole, *(_Network(model, widths, narrower) for widths in below)]
    ids = [batch.to(model.device) for batch in calibration.split(batch_size)]
    count = model.elastic.num_layers
    # masks and rotations depend on the number of sequences alone
    given = {len(batch): _given(whole, anatomy, batch, count) for batch in ids[:1] + ids[-1:]}
    parent = [_given(whole, anatomy, batch, 1)[0][0] for batch in ids]
    for net in nets:
        net.streams = list(parent)
    for i in range(count):
        calls = [given[len(batch)][i][1] for batch in ids]
        # until a layer is fitted, the full network's is the parent's
        seen = [_parents(whole, anatomy, i, x, call) for x, call in zip(parent, calls, strict=True)]
        middle, parent = [mid for mid, _ in seen], [out for _, out in seen]
        _fit(model, nets, i, "heads", calls, middle, ridge)
        _fit(model, nets, i, "mlp", calls, parent, ridge)
        if progress:
            progress(i + 1, count)
    return Refit(calibration.numel(), {}, ())


def in_order_fault(anatomy: Anatomy) -> str:
    """Why a family's layers cannot be fitted in order; empty where they can."""
    if anatomy.parallel:
        return "attention and MLP read the same input"
    if anatomy.experts:
        return "a layer has several MLPs"
    if anatomy.attention_post or anatomy.mlp_post or anatomy.multiplier or not anatomy.mlp_norm:
        return "what attention and MLP give is not added to the stream as it is"
    return "" if anatomy.mlp else "a layer's MLP is no module"


def _given(whole: _Network, anatomy: Anatomy, ids: Tensor, count: int) -> list[tuple[Tensor, Call]]:
    """What the parent's model gives each of its first layers: the stream, and all else by name."""
    found: list[tuple[Tensor, Call]] = []

    def see(_: Any, args: Any, call: Call) -> None:
        given = dict(call)
        found.append((args[0] if args else given.pop("hidden_states"), given))
        if len(found) == count:
            raise _Reached

    layers = anatomy.layers_in(whole.stock)
    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        whole.stock.base_model(input_ids=ids, use_cache=False)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def _parents(whole: _Network, anatomy: Anatomy, i: int, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The parent's stream behind a layer's attention, and behind its MLP."""
    layer, seen = anatomy.layers_in(whole.stock)[i], []
    norm = getattr(layer, anatomy.mlp_norm)
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        out = layer(x, **call)
    finally:
        handle.remove()
    return seen[0], out[0] if isinstance(out, tuple) else out


def _features(net: _Network, anatomy: Anatomy, i: int, part: str, x: Tensor, call: Call) -> Tensor:
    """What the last projection of a layer's part is given, [B T, inputs]."""
    layer, seen = anatomy.layers_in(net.stock)[i], []
    module = _projection(anatomy, layer, part)

    def see(_: Any, args: Any) -> None:
        seen.append(args[0].flatten(0, -2))
        raise _Reached

    handle = module.register_forward_pre_hook(see)
    try:
        if part == "heads":
            layer(x, **call)
        else:
            anatomy.mlp_in(layer)(getattr(layer, anatomy.mlp_norm)(x))
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _projection(anatomy: Anatomy, layer: Any, part: str) -> Any:
    if part == "heads":
        return getattr(anatomy.attention_in(layer), anatomy.output)
    return getattr(anatomy.mlp_in(layer), anatomy.down)


def _fit(
    model: Elastic,
    nets: list[_Network],
    i: int,
    part: str,
    calls: list[Call],
    wanted: list[Tensor],
    ridge: float,
) -> None:
    """Fit one projection, and take the stream of every network past it; ``wanted`` is the parent's there."""
    anatomy = model.anatomy
    size, axis = anatomy.whole(model.config), ("query",) if part == "heads" else ("neurons",)
    own = _projection(anatomy, anatomy.layers_in(model)[i], part)
    weight = own.weight.T if anatomy.transposed else own.weight  # [outputs, inputs]
    bias = 0 if own.bias is None else own.bias
    left = weight.new_zeros(2 * weight.shape[1:], dtype=torch.float64)
    right = torch.zeros_like(weight, dtype=torch.float64)
    pull = 0.0
    features: list[list[Tensor]] = []
    kept = [places(axis, net.sizes[i], size, model.elastic.head_dim).to(weight.device) for net in nets]
    for net, inputs in zip(nets, kept, strict=True):
        features.append([])
        if not len(inputs):  # the part is skipped
            continue
        G, C = weight.new_zeros(2 * inputs.shape), weight.new_zeros(len(weight), len(inputs))
        for x, call, goal in zip(net.streams, calls, wanted, strict=True):
            H = _features(net, anatomy, i, part, x, call)
            features[-1].append(H)
            G.addmm_(H.T, H)
            C.addmm_((goal - x - bias).flatten(0, -2).T, H)
        left[inputs[:, None], inputs] += net.share * G.double()
        right[:, inputs] += net.share * C.double()
        pull += ridge * net.share * float(G.diagonal().mean())
    left.diagonal().add_(pull)
    right += pull * weight
    weight.copy_(torch.cholesky_solve(right.T, torch.linalg.cholesky(left)).T)
    for net, inputs, Hs in zip(nets, kept, features, strict=True):
        for place, H in enumerate(Hs):
            x = net.streams[place]
            net.streams[place] = x + (H @ weight[:, inputs].T + bias).view_as(x)
