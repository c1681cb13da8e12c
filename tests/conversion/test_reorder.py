"""Reordering changes places, not the function: permuted = parent, and any legal order can be undone."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from nn.models import FAMILIES, GQA, small_model
from torch import Tensor

from flextron.conversion import (
    Importance,
    LayerOrder,
    identity_orders,
    random_orders,
    reorder,
    score,
    sorted_orders,
)
from flextron.nn import elastic_config


def tokens() -> Tensor:
    return torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(5))


def biased(family: str, gqa: str, **overrides: Any) -> Any:
    """A model with every bias its family has, none of them zero."""
    if family in ("llama", "qwen3"):
        overrides |= {"attention_bias": True}
    if family == "llama":
        overrides |= {"mlp_bias": True}
    return small_model(family, gqa, **overrides)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gqa", GQA)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_permuted_is_the_parent(family: str, gqa: str, tied: bool) -> None:
    model = biased(family, gqa, tie_word_embeddings=tied)
    config = elastic_config(model)
    before, weights = model(tokens()).logits, copy.deepcopy(model.state_dict())
    orders = random_orders(config, seed=1)
    reorder(model, orders, config)
    after = model(tokens()).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])]
    for part in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert (
            f"model.layers.1.self_attn.{part}.weight" in moved or f"model.layers.1.mlp.{part}.weight" in moved
        )
    assert not any("norm" in k or "embed" in k or "lm_head" in k for k in moved)

    reorder(model, [order.inverse() for order in orders], config)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("gqa", GQA)
@torch.no_grad()
def test_hidden_values_move_with_their_weights(gqa: str) -> None:
    """Neuron i and query head i of the new model are those that the order names, value for value."""
    model = biased("llama", gqa)
    config = elastic_config(model)
    parent = copy.deepcopy(model)
    orders = random_orders(config, seed=2)
    reorder(model, orders, config)
    new, old = (score(m, tokens()) for m in (model, parent))
    for i, order in enumerate(orders):
        torch.testing.assert_close(new.neurons[i], old.neurons[i][order.neurons], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(new.heads[i], old.heads[i][order.query_heads()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", ["kv_group", "query"])
@pytest.mark.parametrize("gqa", GQA)
def test_sorting_puts_the_important_first(gqa: str, unit: str) -> None:
    model = small_model("qwen3", gqa)
    config = elastic_config(model, unit)
    found = score(model, tokens())
    reorder(model, sorted_orders(found, config), config)
    again = score(model, tokens())
    H, G = GQA[gqa]
    slack = 1e-4

    def falls(scores: Tensor) -> bool:
        return bool((scores.diff() <= slack * scores.max()).all())

    assert not all(falls(s) for s in found.neurons)
    for neurons, heads, groups in zip(again.neurons, again.heads, again.groups(G), strict=True):
        assert falls(neurons) and falls(groups)
        assert all(falls(inside) for inside in heads.view(G, H // G))


@pytest.mark.parametrize("gqa", GQA)
def test_the_group_of_every_head_is_kept(gqa: str) -> None:
    """Query heads of one old group are together in one new group, with the keys and values of the old one."""
    config = elastic_config(small_model("llama", gqa))
    M = config.heads_per_group
    for order in [*random_orders(config, seed=0), *sorted_orders(_random_importance(config), config)]:
        query = order.query_heads()
        assert query.sort().values.tolist() == list(range(config.num_heads))
        assert ((query // M).view(-1, M) == order.groups[:, None]).all()


def test_prefixes_nest() -> None:
    """What a smaller width keeps of the parent, a larger width keeps too, in both units."""
    for unit in ("kv_group", "query"):
        config = elastic_config(small_model("llama", "3:1"), unit)
        for order in sorted_orders(_random_importance(config), config):
            heads = order.query_heads().view(config.num_kv_heads, config.heads_per_group)
            neurons = [set(order.neurons[:d].tolist()) for d in config.mlp_choices]
            kept = [
                set((heads[:n] if unit == "kv_group" else heads[:, :n]).flatten().tolist())
                for n in config.head_choices
            ]
            for sets in (neurons, kept):
                assert all(small < large for small, large in pairwise(sets))


def test_ties_keep_the_parents_order() -> None:
    config = elastic_config(small_model("llama", "2:1"))
    flat = Importance((torch.ones(40),) * 3, (torch.ones(8),) * 3, "l2", 1)
    for ours, none in zip(sorted_orders(flat, config), identity_orders(config), strict=True):
        assert torch.equal(ours.neurons, none.neurons) and torch.equal(ours.query_heads(), none.query_heads())


def test_random_orders_depend_on_the_seed_alone() -> None:
    config = elastic_config(small_model("llama", "2:1"))
    a, b, c = (random_orders(config, seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(x.neurons, y.neurons) and torch.equal(x.heads, y.heads) for x, y in zip(a, b, strict=True)
    )
    assert any(not torch.equal(x.neurons, y.neurons) for x, y in zip(a, c, strict=True))
    assert len({tuple(order.neurons.tolist()) for order in a}) == 3  # layers draw for themselves


@pytest.mark.parametrize("part", ["neurons", "groups", "heads"])
def test_what_is_no_permutation_changes_nothing(part: str) -> None:
    model = small_model("llama", "2:1")
    config = elastic_config(model)
    weights = copy.deepcopy(model.state_dict())
    orders = random_orders(config, seed=0)
    last = orders[-1]
    wrong = {"neurons": last.neurons, "groups": last.groups, "heads": last.heads}
    wrong[part] = wrong[part].clone()
    wrong[part][..., 0] = wrong[part][..., 1]
    for broken in (wrong, wrong | {part: wrong[part][..., 1:]}):
        with pytest.raises(ValueError, match=f"{part} of layer 2 must permute"):
            reorder(model, [*orders[:-1], LayerOrder(**broken)], config)
    with pytest.raises(ValueError, match="one for each of 3 layers, got 2"):
        reorder(model, orders[:-1], config)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def _random_importance(config: Any) -> Importance:
    draw = torch.Generator().manual_seed(7)
    layers = range(config.num_layers)
    return Importance(
        tuple(torch.rand(config.intermediate_size, generator=draw) for _ in layers),
        tuple(torch.rand(config.num_heads, generator=draw) for _ in layers),
        "l2",
        1,
    )
