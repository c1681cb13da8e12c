"""Plans for so many GPUs: what is sent, how long it takes, which one fits first, and what the page says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scale_page

from flextron.devices import DEVICES
from flextron.recipes import StepConfig, TrainConfig
from flextron.scale.plans import first_that_fits, plan
from flextron.scale.shapes import SHAPES
from flextron.scale.speed import MFU, mean_flops, speed
from flextron.training import WidthSampler

H100 = next(d for d in DEVICES if d.name == "h100")
EIGHT, STEP = SHAPES["8b"], StepConfig()
P = EIGHT.params(EIGHT.full())


def test_one_gpu_sends_nothing_and_computes_what_the_sampler_draws():
    found = speed(EIGHT, STEP, 1, H100)
    assert found.node_bytes == found.network_bytes == found.traffic == 0
    sampler = WidthSampler(EIGHT, TrainConfig().full_probability)
    drawn = [EIGHT.flops(sampler.draw(), STEP.length) for _ in range(500)]
    mean = mean_flops(EIGHT, STEP.length, TrainConfig().full_probability)
    assert mean == pytest.approx(sum(drawn) / len(drawn), rel=0.03)
    assert found.compute == pytest.approx(mean * STEP.length / (MFU * 989e12))


def test_traffic_is_that_of_rings():
    whole = speed(EIGHT, STEP, 8, H100)
    assert whole.node_bytes == pytest.approx(2 * 7 / 8 * 4 * P)  # an all-reduce of float32 gradients
    full = speed(EIGHT, replace(STEP, shard="full"), 8, H100)
    # weights twice in bfloat16, gradients once in float32: as much, but for the root, which is gathered once
    assert full.node_bytes == pytest.approx(7 / 8 * 8 * P, rel=0.04) and full.network_bytes == 0
    hybrid = speed(EIGHT, replace(STEP, shard="hybrid"), 64, H100)
    assert hybrid.node_bytes == full.node_bytes and hybrid.network_bytes == pytest.approx(
        2 * 7 / 8 * 4 * P / 8
    )
    spread = speed(EIGHT, replace(STEP, shard="full"), 64, H100)
    assert spread.network_bytes == pytest.approx(7 / 8 * 8 * P / 8, rel=0.04)  # a ring for each of 8 adapters


def test_checkpointing_and_a_teacher_take_a_third_more_each():
    def compute(**changes):
        return speed(EIGHT, replace(STEP, **changes), 1, H100).compute

    assert compute(checkpoint_activations=True) == pytest.approx(4 / 3 * compute())
    teacher = EIGHT.flops(EIGHT.full(), STEP.length) / 3 * STEP.length / (MFU * 989e12)
    assert (
        compute(teacher="whole") == pytest.approx(compute() + teacher)
        and compute(teacher="cached") == compute()
    )


def test_the_first_plan_that_fits_is_the_simplest():
    def name(shape, ranks):
        found = first_that_fits(SHAPES[shape], STEP, ranks, H100)
        return found.name if found.fits else None

    assert [name("1b", n) for n in (1, 8)] == ["none", "none"]
    assert [name("8b", n) for n in (1, 8, 16)] == [None, "full", "hybrid"]
    assert [name("70b", n) for n in (8, 16, 64)] == [None, None, "full, checkpointed"]


def test_a_plan_says_what_to_type():
    step = replace(STEP, shard="hybrid", teacher="sharded", checkpoint_activations=True, rows=2)
    assert plan(EIGHT, step, 16, H100).command() == (
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node0:29500 --nproc-per-node 8 -m flextron train "
        "elastic/ --batch-size 32 --length 4096 --distillation 1 --checkpoint-activations --shard hybrid"
    )
    cached = replace(STEP, teacher="cached")
    assert plan(EIGHT, cached, 1, H100).command().endswith("--distillation 1 --teacher-logits 64")


def test_the_page_is_what_is_computed():
    page = scale_page.PAGE.read_text(encoding="utf-8")
    assert page.split(scale_page.MARK)[1] == f"\n{scale_page.made()}", (
        "run python tests/scale_page.py --update"
    )
