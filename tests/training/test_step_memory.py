"""What a step takes is said before the first one, and what cannot fit is refused with what would."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch

from flextron.recipes import SHARDS, StepConfig, TrainConfig
from flextron.scale.memory import estimate
from flextron.scale.shapes import SHAPES
from flextron.training import room as rooms
from flextron.training.sharding import chosen

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch_size=16, length=1024, bf16=True)
TAKES = estimate(SHAPES["1b"], StepConfig(rows=16, length=1024, cpu=True)).total


@pytest.fixture
def device_has(monkeypatch):
    return lambda size: monkeypatch.setattr(rooms, "memory_of", lambda device: int(size))


def test_what_fits_is_told_in_one_line_after_what_it_computes_in(device_has):
    device_has(2 * TAKES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        computes, line = str(rooms.room("train", SHAPES["1b"], CONFIG, CPU)).splitlines()
    assert computes == "computes in bfloat16, weights in float32"
    assert re.fullmatch(
        r"memory of a step: 43\.2 GB \(parameters 4\.94 GB, optimiser states 9\.89 GB, gradients 1\.05 GB, "
        r"activations 27\.3 GB\); cpu has 86\.4 GB",
        line,
    )


@pytest.mark.parametrize("fast", [True, False])
def test_what_is_computed_in_by_default_is_told(fast, device_has, monkeypatch):
    device_has(2 * TAKES)
    monkeypatch.setattr("flextron.training.sharding.bf16_is_fast", lambda device: fast)
    told = str(rooms.room("train", SHAPES["1b"], replace(CONFIG, bf16=None), CPU))
    assert told.startswith("computes in bfloat16, weights in float32\n" if fast else "computes in float32\n")


def test_what_is_close_is_warned_of(device_has):
    device_has(TAKES)
    with pytest.warns(UserWarning, match=r"train: a step may not fit on cpu, got 43\.2 GB for the 43\.2 GB"):
        rooms.room("train", SHAPES["1b"], CONFIG, CPU)


@pytest.mark.parametrize(
    ("has", "remedy"),
    [
        (30e9, "it takes 21.4 GB with --checkpoint-activations"),
        (23e9, "it takes 20.1 GB with --checkpoint-activations --batch-size 8"),
        (10e9, "no batch is small enough"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_first_change_that_does(device_has, has, remedy):
    device_has(has)
    with pytest.raises(ValueError, match=rf"train: a step must fit on cpu, got 43\.2 GB for .*; {remedy}$"):
        rooms.room("train", SHAPES["1b"], CONFIG, CPU)


def test_one_process_has_all_parts():
    """So that it can resume a run of several, whose command names a way to share."""
    assert {chosen(SHAPES["1b"], replace(CONFIG, shard=s), False, CPU) for s in SHARDS} == {"none"}


def test_a_machine_says_how_much_memory_it_has():
    assert 1 << 28 < rooms.memory_of(CPU) < 1 << 50
