"""Permute neurons and heads inside each layer, in place, so that the model computes the same function.

Neurons: rows of the gate and up projections move together with columns of the down projection.
Heads: a key/value group moves as a whole, with all its query heads, and query heads move only inside their group, so
that the map from heads to groups holds. What moves with them is what the family's anatomy says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flextron.config import ElasticConfig
from flextron.conversion.importance import Importance
from flextron.nn.anatomy import anatomy_of, permuted


@dataclass(frozen=True)
class LayerOrder:
    """The permutation of one layer. Entry i says which old place moves to the new place i.

    Attributes:
        neurons: [F] int64, the old neurons; [E, F] of E experts.
        groups: [G] int64, the old key/value groups.
        heads: [G, M] int64, for each new group the places that its query heads had inside the old group.
    """

    neurons: Tensor
    groups: Tensor
    heads: Tensor

    def query_heads(self) -> Tensor:
        """[H] int64: the old query head at each new place."""
        return (self.groups[:, None] * self.heads.shape[1] + self.heads).flatten()

    def inverse(self) -> LayerOrder:
        """The order that undoes this one."""
        groups = self.groups.argsort()
        return LayerOrder(self.neurons.argsort(dim=-1), groups, self.heads.argsort(dim=1)[groups])


def sorted_orders(importance: Importance, config: ElasticConfig) -> list[LayerOrder]:
    """Neurons, groups, and query heads inside each group, the most important first; ties keep their order."""
    orders = []
    layers = zip(importance.neurons, importance.heads, importance.groups(config.num_kv_heads), strict=True)
    for neurons, heads, groups in layers:
        order = _descending(groups)
        inside = _descending(heads.view(config.num_kv_heads, config.heads_per_group))
        orders.append(LayerOrder(_descending(neurons), order, inside[order]))
    return orders


def random_orders(config: ElasticConfig, seed: int) -> list[LayerOrder]:
    """A random order that keeps the map from heads to groups; sorting by importance is compared with it."""
    generator = torch.Generator().manual_seed(seed)

    def shuffled(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)

    G, M = config.num_kv_heads, config.heads_per_group
    return [
        LayerOrder(
            shuffled(config.intermediate_size), shuffled(G), torch.stack([shuffled(M) for _ in range(G)])
        )
        for _ in range(config.num_layers)
    ]


def identity_orders(config: ElasticConfig) -> list[LayerOrder]:
    """The parent's own order."""
    G, M = config.num_kv_heads, config.heads_per_group
    order = LayerOrder(
        torch.arange(config.intermediate_size), torch.arange(G), torch.arange(M).expand(G, M).contiguous()
    )
    return [order] * config.num_layers


def reorder(model: PreTrainedModel, orders: list[LayerOrder], config: ElasticConfig) -> None:
    """Permute the weights of ``model``, in place.

    Raises:
        ValueError: an order is no permutation of what the model has; nothing was changed.
    """
    if len(orders) != config.num_layers:
        raise ValueError(
            f"reorder: orders must be one for each of {config.num_layers} layers, got {len(orders)}"
        )
    for layer, order in enumerate(orders):
        _check_order(layer, order, config)
    anatomy = anatomy_of(model.config)
    whole, D = anatomy.whole(model.config), config.head_dim
    axes, parameters = anatomy.tensors(), dict(model.named_parameters())
    for layer, order in enumerate(orders):
        for name, dims in axes.items():
            p = parameters.get(f"{anatomy.layer_path(layer)}.{name}")
            for dim, followed in enumerate(dims):
                if p is None or not followed:
                    continue
                if order.neurons.dim() == 1 or followed[0] not in ("neurons", "pairs"):
                    own = (order.neurons, order.groups, order.heads)
                    _permute(p, dim, permuted(followed, *own, whole, D))
                    continue
                for expert, neurons in enumerate(order.neurons):  # experts come first
                    _permute(
                        p[expert], dim - 1, permuted(followed, neurons, order.groups, order.heads, whole, D)
                    )


def _descending(scores: Tensor) -> Tensor:
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


@torch.no_grad()
def _permute(parameter: Tensor, dim: int, order: Tensor) -> None:
    parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))


def _check_order(layer: int, order: LayerOrder, config: ElasticConfig) -> None:
    G, M = config.num_kv_heads, config.heads_per_group
    for name, values, shape in (
        ("neurons", order.neurons, (*order.neurons.shape[:-1], config.intermediate_size)),
        ("groups", order.groups, (G,)),
        ("heads", order.heads, (G, M)),
    ):
        straight = torch.arange(shape[-1]).expand(shape)
        if tuple(values.shape) != shape or not torch.equal(values.sort(dim=-1).values, straight):
            raise ValueError(
                f"reorder: {name} of layer {layer} must permute {shape[-1]} places in shape {list(shape)}, "
                f"got shape {list(values.shape)}"
            )
