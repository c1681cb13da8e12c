"""Promises of training on several processes: the run is one process's, however its rows and weights are spread."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sharded_run
import tiny_run
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flextron.artefacts.directory import load_elastic
from flextron.checkpoint import load_tensors
from flextron.training import WidthSampler
from flextron.training.resume import fingerprint
from flextron.training.sharding import cut

HERE = [(case, size) for case, (sizes, _) in sharded_run.CASES.items() for size in sizes]
LONG = sharded_run.LONG
CAN_MEASURE = os.path.exists("/proc/self/clear_refs")


@pytest.fixture(scope="module")
def root(tmp_path_factory, processes):
    """The folders of every case, run by one process and by several; and of runs that go on."""
    root = tmp_path_factory.mktemp("sharded")
    for size in (2, 3, 4):
        jobs = [
            (changes, root / f"{case}-{size}")
            for case, (sizes, changes) in sharded_run.CASES.items()
            if size in sizes
        ]
        if size == 2:
            jobs += [({**LONG, "steps": 4}, root / "whole"), ({**LONG, "steps": 2}, root / "stopped")]
            jobs += [({**LONG, "steps": 2, "widths_per_rank": True, "shard": "none"}, root / "wide")]
        if size == 3:
            jobs += [({**LONG, "steps": 3}, root / "moved")]
            if CAN_MEASURE:
                sharded_run.store_large(root / "loading")
                jobs.insert(0, (None, root / "loading"))
        sharded_run.start(processes, size, jobs)
        if size == 2:
            shutil.copytree(root / "stopped", root / "moved")
            sharded_run.start(processes, size, [({**LONG, "steps": 4}, root / "stopped")])
    for case, (_, changes) in sharded_run.CASES.items():
        sharded_run.run(changes, root / f"{case}-1")
    sharded_run.run({**LONG, "steps": 4}, root / "alone")
    sharded_run.run({**LONG, "steps": 4}, root / "moved")
    return root


def told(directory: Path, rank: int = 0) -> dict:
    return json.loads((directory / f"rank-{rank}.json").read_text())


def logged(directory: Path) -> list[dict]:
    """What depends on no clock, line by line."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in r.items() if isinstance(v, int | float)} for r in records]
    clock = ("seconds", "tokens_per_s", "peak_bytes")
    return [
        {k: v for k, v in own.items() if k not in clock} | r.get("loss_by_size", {})
        for own, r in zip(numbers, records, strict=True)
    ]


def assert_same(one: Path, many: Path, processes: int, **close: float) -> None:
    for a, b in zip(logged(one), logged(many), strict=True):
        assert b == pytest.approx(a, **close)
    weights, found = (load_tensors(d / "weights.safetensors") for d in (one, many))
    for name, value in weights.items():
        assert torch.allclose(found[name], value, rtol=close["rel"], atol=close["abs"]), name
    for a, b in zip(told(one)["evaluations"], told(many)["evaluations"], strict=True):
        assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], **close)
    assert all(told(many, rank) == told(many) for rank in range(processes))
    assert told(one)["begun"] == told(many)["begun"]


@pytest.mark.parametrize(("case", "size"), HERE)
def test_loss_gradient_and_weights_are_those_of_one_process(root, case, size):
    # routers compute in float32
    close = {"rel": 1e-5, "abs": 1e-5} if case.startswith("tune") else {"rel": 1e-9, "abs": 1e-10}
    assert_same(root / f"{case}-1", root / f"{case}-{size}", size, **close)


@pytest.mark.skipif(not CAN_MEASURE, reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("rank", range(3))
def test_a_process_reads_no_more_than_its_part_of_a_model(root, rank):
    found = told(root / "loading", rank)
    print(found)
    assert 45e6 < found["part"] < 0.34 * found["whole"]
    # which has more values than a fingerprint looks at
    assert found["known"] == fingerprint(load_elastic(root / "loading" / "large")[0].state_dict())
    mapped = 1 << 24  # of the files, at once
    assert found["grown"] < found["part"] + found["layer"] + mapped < 0.6 * found["whole"]


@pytest.mark.skipif(not CAN_MEASURE, reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("rank", range(3))
def test_one_tensor_at_a_time_is_whole_while_a_sharded_model_is_written(root, rank):
    found = told(root / "loading", rank)
    print(found)
    assert found["wrote"] < 2 * found["largest"] < 0.25 * found["whole"]  # whole, and its parts on their way
    stored, again = (
        load_tensors(root / "loading" / n / "model.safetensors") for n in ("large", "large-again")
    )
    assert stored.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in stored.items())


def test_a_stopped_run_goes_on_bit_for_bit_on_as_many_processes(root):
    whole, stopped = (load_tensors(root / name / "weights.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    assert logged(root / "whole") == logged(root / "stopped")


def test_a_run_goes_on_on_three_processes_and_then_on_one(root):
    assert_same(root / "alone", root / "moved", 1, rel=1e-9, abs=1e-10)


def test_checkpoints_of_several_processes_are_two_folders_of_safetensors(root):
    """What a pickle would be in, and what a writer leaves, is not there."""
    names = sorted(path.name for path in (root / "whole").rglob("*") if "step" in str(path))
    shards = [f"shard-{r:05d}-model-00001-of-00001.safetensors" for r in (1, 2)] * 2
    steps = [f"step-{n:08d}{suffix}" for n in (3, 4) for suffix in ("", ".json")]
    assert names == sorted([*shards, *steps])


def test_each_process_may_train_a_sub_network_of_its_own(root):
    sizes = [line["size"] for line in logged(root / "wide") if "loss" in line]
    config = replace(sharded_run.CONFIG, steps=2)
    samplers = [
        WidthSampler(tiny_run.elastic().elastic, config.full_probability, config.seed) for _ in range(2)
    ]
    drawn = [[sampler.draw_for(rank) for _ in range(4)] for rank, sampler in enumerate(samplers)]
    assert drawn[0] != drawn[1]
    params, full = (tiny_run.elastic().elastic.params, tiny_run.elastic().elastic.full())
    shares = [[params(w) / params(full) for w in own] for own in drawn]
    # rank 0 has two of the five rows; two micro-batches make a step
    means = [(2 * a + 3 * b) / 5 for a, b in zip(*shares, strict=True)]
    assert sizes == pytest.approx([sum(means[:2]) / 2, sum(means[2:]) / 2])


def test_the_shards_of_a_narrow_teacher_compute_in_float32():
    narrow, wide = tiny_run.elastic(), tiny_run.elastic()
    for p, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        p.data = p.data.bfloat16()
        other.data = p.data.float()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        cut(narrow, init_device_mesh("cpu", (1,)), bf16=False)
        ids = tiny_run.tokens(24)[None]
        with torch.no_grad():
            found, wanted = (model(ids).logits for model in (narrow, wide))
        assert {p.dtype for p in narrow.decoder_layers.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    finally:
        dist.destroy_process_group()
