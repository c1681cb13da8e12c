"""A 70B model on 64 GPUs, planned without one: sharded on the meta device, in a process group of fake ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from steps import elastic, sizes_of
from torch.testing._internal.distributed.fake_pg import FakeStore

from flextron.ranks import Ranks
from flextron.recipes import StepConfig
from flextron.scale.memory import estimate
from flextron.scale.shapes import SHAPES
from flextron.training.sharding import cut, mesh_of

SHAPE, SIZE, NODE = SHAPES["70b"], 64, 8


@pytest.mark.parametrize(("shard", "rank"), [("full", SIZE - 1), ("hybrid", 0)])
def test_a_rank_holds_what_the_plan_says(shard, rank, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(NODE))
    me = Ranks(rank, SIZE, rank % NODE, torch.device("cpu"))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=SIZE)
    try:
        with torch.device("meta"):
            model = elastic(**sizes_of(SHAPE))
        cut(model, mesh_of(me, shard), bf16=True)
        held = sum(p.to_local().nbytes for p in model.parameters())
        layers = {type(layer).__name__ for layer in model.model.layers}
    finally:
        dist.destroy_process_group()
    step = StepConfig(shard=shard, node=NODE)
    assert (
        held == estimate(SHAPE, step, SIZE).parameters == 4 * SHAPE.params(SHAPE.full()) // step.shards(SIZE)
    )
    assert len(model.model.layers) == 80 and all(name.startswith("FSDP") for name in layers)
