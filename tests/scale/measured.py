"""Print the measured peaks of training steps beside the estimates, the rows of docs/scale.md: minutes on two cores.

PYTHONPATH=tests python tests/scale/measured.py WHAT

fake      1B, 8B and 70B: every tensor of a step counted, without its memory
families  a small model of every family: every tensor of a step counted
real      `flextron.training.train` on this CPU: what torch allocated
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist
from nn.models import EVERY
from steps import counted, elastic, sizes_of
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from flextron.config import ElasticConfig
from flextron.nn.families import elastic_config
from flextron.recipes import StepConfig, TrainConfig
from flextron.scale.memory import estimate
from flextron.scale.shapes import SHAPES
from flextron.training import train
from flextron.training.sharding import cut

SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)
# config.json of google/gemma-3-270m and microsoft/phi-1_5
OTHERS = {
    "gemma3_text": dict(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, tie_word_embeddings=True, sliding_window=512, layer_types=None,
    ),
    "phi": dict(
        vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, head_dim=64, qk_layernorm=False,
    ),
}  # fmt: skip
Row = tuple[str, int, StepConfig, int, ElasticConfig]  # name, ranks, step, measured bytes, shape

FAKE = [
    ("1b", 1, StepConfig(length=2048)),
    ("1b", 1, StepConfig(rows=4, length=2048, checkpoint_activations=True)),
    ("1b", 1, StepConfig(length=2048, accumulation=2, teacher="whole")),
    ("8b", 1, StepConfig(length=1024)),
    ("8b", 1, StepConfig(length=4096, checkpoint_activations=True)),
    ("8b", 8, StepConfig(length=4096, checkpoint_activations=True, shard="full")),
    ("8b", 8, StepConfig(length=1024, shard="full", teacher="sharded")),
    ("70b", 64, StepConfig(length=1024, checkpoint_activations=True, shard="full")),
]
REAL = [
    StepConfig(rows=1, length=512, bf16=False),
    StepConfig(rows=4, length=512, bf16=False),
    StepConfig(rows=4, length=512, bf16=False, checkpoint_activations=True),
    StepConfig(rows=2, length=512, bf16=False, accumulation=2),
    StepConfig(rows=2, length=512, bf16=False, teacher="whole"),
    StepConfig(rows=2, length=512, bf16=True),
]


def fake() -> Iterator[Row]:
    for name, ranks, step in FAKE:
        if ranks == 1:
            yield (name, ranks, step, *counted(step, **sizes_of(SHAPES[name])))
            continue
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
        found = counted(
            step, shard=lambda model, m=mesh, s=step: cut(model, m, s.bf16), **sizes_of(SHAPES[name])
        )
        dist.destroy_process_group()
        yield (name, ranks, step, *found)
    for family, sizes in OTHERS.items():
        for step in StepConfig(length=2048, bf16=False), StepConfig(length=2048):
            yield (family, 1, step, *counted(step, family, **sizes))


def families() -> Iterator[Row]:
    for family in EVERY:
        for bf16 in (False, True):
            step = StepConfig(rows=4, length=256, bf16=bf16)
            yield (family, 1, step, *counted(step, family))


def real() -> Iterator[Row]:
    for step in REAL:
        yield ("SmolLM2-135M", 1, step, *trained(step))


def trained(step: StepConfig, **overrides: object) -> tuple[int, ElasticConfig]:
    """The most bytes that torch's CPU allocator has handed out in the second step of a run."""
    config = TrainConfig(
        steps=2,
        batch_size=step.rows,
        length=step.length,
        accumulation=step.accumulation,
        distillation=float(step.teacher == "whole"),
        bf16=step.bf16,
        checkpoint_activations=step.checkpoint_activations,
        full_probability=1.0,
        eval_every=0,
        checkpoint_every=0,
    )
    begun = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = elastic(**(SMOLLM2 | overrides))
        teacher = elastic(**(SMOLLM2 | overrides)) if step.teacher == "whole" else None
        tokens = torch.randint(0, 256, (step.rows * step.length * step.accumulation * 2,))
        with tempfile.TemporaryDirectory() as folder:
            train(model, tokens, config, folder, teacher=teacher, progress=lambda *_: begun.append(mark()))
    return peak(profiler), elastic_config(model)


def mark() -> None:
    """What the profile has between two steps."""
    with torch.profiler.record_function("a step ended"):
        pass


def peak(profiler: profile) -> int:
    """The most bytes that are allocated after the end of the first step."""
    events = profiler.profiler.kineto_results.events()
    first = min(e.start_ns() for e in events if e.name() == "a step ended")
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for when, size in changes:
        now += size
        if when >= first:
            most = max(most, now)
    return most


def line(row: Row) -> str:
    name, ranks, step, measured, shape = row
    found = estimate(shape, step, ranks).total
    about = {
        f"{step.rows} x {step.length}, {'bf16' if step.bf16 else 'fp32'}": True,
        "checkpointed": step.checkpoint_activations,
        f"{step.accumulation} micro-batches": step.accumulation > 1,
        f"{step.teacher} teacher": step.teacher != "none",
        f"{step.shard}, {ranks} ranks": ranks > 1,
    }
    told = ", ".join(part for part, is_so in about.items() if is_so)
    unit, name_of_it = (1e9, "GB") if measured > 1e9 else (1e6, "MB")
    sizes = (
        f"{measured / unit:.2f} {name_of_it} | {found / unit:.2f} {name_of_it} | {found / measured - 1:+.1%}"
    )
    return f"| {name} | {told} | {sizes} |"


if __name__ == "__main__":
    for row in {"fake": fake, "families": families, "real": real}[sys.argv[1]]():
        print(line(row), flush=True)
