"""Promises of activation checkpointing: the same bits from less memory, whatever decides the widths."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nn.models import small_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flextron.nn import elastic_config, make_elastic
from flextron.nn.policy import PerRequest
from flextron.nn.recomputation import recomputing
from flextron.nn.router import AdaptiveRouter, GumbelSampler, StaticRouter
from flextron.routing.learning import learning_policy, mean_choices

TARGETS = (0.5, 1.0)


def elastic() -> Any:
    model = small_model()
    return make_elastic(model, elastic_config(model, "kv_group", (8, 24, 40))).train()


def tokens(B: int = 2, T: int = 24) -> Tensor:
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(1))


def router_of(model: Any, kind: str) -> Any:
    c = model.elastic
    if kind == "static":
        return StaticRouter(c.num_layers, c.choices, TARGETS, hidden=8)
    router = AdaptiveRouter(c.num_layers, c.hidden_size, c.choices, TARGETS, 8)
    with torch.no_grad():  # so that tokens choose differently
        router.w2.normal_(generator=torch.Generator().manual_seed(2))
    return router


def gradients(model: Any, router: Any, gates: str) -> tuple[list[Tensor], Tensor]:
    """The loss of two micro-batches and every gradient, and what the noise would draw next."""
    noise, losses = GumbelSampler(5), []
    parameters = [*model.parameters(), *(router.parameters() if router else ())]
    for p in parameters:
        p.grad = None
    for _ in range(2):
        tau = torch.tensor([0.5, 1.0])
        policy = learning_policy(model, router, tau, noise, 0.5, 3.0, gates) if router else None
        if router:
            model.set_policy(policy, model.elastic.full(), "all")
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        if router:
            loss = loss + (mean_choices(policy, 2).mlp[..., 0]).mean()
            soft = {layer: id(p.mlp) for layer, p in policy.soft.items()}
        loss.backward()
        if router:
            assert soft == {layer: id(p.mlp) for layer, p in policy.soft.items()}
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in parameters)], noise.generator.get_state()


@pytest.mark.parametrize(
    ("kind", "gates"), [("", ""), ("static", "hard"), ("adaptive", "soft"), ("adaptive", "hard")]
)
def test_losses_gradients_and_noise_keep_their_bits(kind, gates):
    model = elastic()
    model.set_policy(
        PerRequest((model.elastic.smallest(), model.elastic.full()), model.device),
        model.elastic.full(),
        "all",
    )
    router = router_of(model, kind) if kind else None
    kept, drawn = gradients(model, router, gates)
    with recomputing(model):
        again, drawn_again = gradients(model, router, gates)
    assert all(torch.equal(*both) for both in zip(kept, again, strict=True))
    assert torch.equal(drawn, drawn_again)


class Storages(TorchDispatchMode):
    """The memory behind what every op returned."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.found[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        return sum(size for storage, size in self.found.values() if not storage.expired())


def kept_bytes(model: Any) -> int:
    """What is still in memory after a forward, for the backward pass."""
    with Storages() as storages:
        loss = model(input_ids=tokens(), use_cache=False).logits.sum()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages.found = {place: found for place, found in storages.found.items() if place not in own}
    kept = storages.alive()
    loss.backward()
    return kept


def test_memory_falls_to_the_layers_inputs():
    model, inputs = elastic(), 2 * 24 * 72 * 4
    for widths, factor in ((model.elastic.full(), 4), (model.elastic.smallest(), 3)):
        model.set_widths(widths)
        kept = kept_bytes(model)
        with recomputing(model):
            again = kept_bytes(model)
        assert inputs * model.elastic.num_layers <= again < kept / factor


def test_a_model_is_left_as_it_was():
    model = elastic()
    layers = model.model.layers
    before, names = [dict(layer.__dict__) for layer in layers], list(model.state_dict())
    layers[0].gradient_checkpointing = before[0]["gradient_checkpointing"] = True
    with recomputing(model):
        assert all(layer.gradient_checkpointing for layer in layers)
        assert list(model.state_dict()) == names
    assert [layer.__dict__ for layer in layers] == before


def test_a_budget_that_has_changed_since_does_not_reach_a_layer_that_runs_again():
    model, found = elastic(), []
    for change in (False, True):
        model.zero_grad()
        with recomputing(model):
            model.set_widths(model.elastic.smallest())
            loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
            if change:
                model.set_widths(model.elastic.full())
            loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_layers_that_fsdp_shards_keep_their_bits_too():
    """One process; and a step that `found_inf` stops leaves sharded weights as they are."""
    found = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for sharded in (False, True):
            model = elastic()
            for module in (*model.model.layers, model) if sharded else ():
                fully_shard(module, mesh=mesh)
            optimizer: Any = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
            losses = []
            for stopped in (0.0, 1.0, 0.0):
                with recomputing(model) if sharded else nullcontext():
                    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
                    loss.backward()
                optimizer.found_inf = torch.tensor(stopped)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
            found.append([*losses, *weights])
    finally:
        dist.destroy_process_group()
    assert found[0][1] == found[0][2] != found[0][0]
    assert all(torch.equal(*both) for both in zip(*found, strict=True))
