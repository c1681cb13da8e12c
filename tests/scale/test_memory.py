"""The memory of a training step on paper is that of a step, counted tensor by tensor."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from live import Live
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flextron.config import ElasticConfig
from flextron.judge.objectives import cross_entropy, distillation
from flextron.nn import make_elastic
from flextron.nn.recomputation import recomputing
from flextron.recipes import StepConfig, TrainConfig
from flextron.scale.memory import estimate, fits
from flextron.scale.shapes import SHAPES, count, of_layer, of_root

WITHIN = 0.02  # 0.1 is promised
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def elastic(family="llama", **overrides):
    settings = dict(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=False,
    )
    config, model = KINDS[family]
    return make_elastic(model(config(**(settings | overrides))))


@pytest.fixture(autouse=True)
def no_mask(monkeypatch):
    """transformers makes no mask where nothing is padded; of fake tensors it cannot know."""
    for family in KINDS:
        where = f"transformers.models.{family}.modeling_{family}.create_causal_mask"
        monkeypatch.setattr(where, lambda **_: None)


def losses(model, ids, teacher):
    """As `flextron.training.loop.Run._losses`."""
    logits = model(input_ids=ids, use_cache=False).logits
    loss = cross_entropy(logits, ids)
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits
        loss = loss + distillation(logits, wanted)
    return loss


def counted(step: StepConfig, family: str = "llama", **overrides) -> tuple[int, ElasticConfig]:
    """The most bytes that are alive in the second step of a training, and the shape of its model."""
    with FakeTensorMode():
        model = elastic(family, **overrides).train()
        teacher = (
            elastic(family, **overrides).requires_grad_(False).eval() if step.teacher == "whole" else None
        )
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(step.rows, step.length, dtype=torch.int64)
        layers = recomputing(model) if step.checkpoint_activations else nullcontext()
        with layers, Live([*model.parameters(), *(teacher.parameters() if teacher else ())]) as live:
            for _ in range(2):
                live.restart()  # the first step makes the optimiser's states
                for _ in range(step.accumulation):
                    with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16):
                        loss = losses(model, ids, teacher)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return live.peak, model.elastic


SMALL = dict(rows=1, length=64)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (dict(bf16=False), dict()),
        (dict(bf16=True), dict()),
        (dict(bf16=True, checkpoint_activations=True), dict(num_hidden_layers=4)),
        (dict(bf16=True, accumulation=2), dict()),
        (dict(bf16=True, teacher="whole", teacher_value=4), dict(vocab_size=32768)),
        (SMALL | dict(bf16=False), dict(tie_word_embeddings=True, vocab_size=16384)),
        (SMALL | dict(bf16=False), dict(intermediate_size=4096, vocab_size=256)),
        (dict(bf16=True), dict(family="qwen3")),
    ],
    ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()) or "small",
)
def test_the_estimate_is_what_a_step_takes(step, shape):
    step = StepConfig(**(dict(rows=4, length=256) | step))
    peak, elastic_shape = counted(step, **shape)
    found = estimate(elastic_shape, step)
    print(f"{found.total / peak - 1:+.2%} {found.moment}")
    assert found.total == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_are_those_of_the_model(family, tied):
    with torch.device("meta"):
        model = elastic(family, tie_word_embeddings=tied)
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shape = model.elastic
    layers = {f"model.layers.{i}.{n}": d for i in range(2) for n, d in of_layer(shape).items()}
    assert layers | of_root(shape) == own


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.24), ("8b", 8.03), ("70b", 70.55)])
def test_the_shapes_that_everybody_knows_have_their_size(name, billions):
    shape = SHAPES[name]
    total = shape.num_layers * count(of_layer(shape)) + count(of_root(shape))
    assert total == shape.params(shape.full()) and round(total / 1e9, 2) == billions


def test_what_does_not_fit_fits_with_checkpointing_and_sharding():
    shape, device = SHAPES["8b"], 79 << 30
    assert not fits(shape, StepConfig(), device, ranks=8)  # 16 bytes a parameter alone are 128 GB
    assert fits(shape, StepConfig(checkpoint_activations=True, shard="full"), device, ranks=8)
    assert not fits(SHAPES["70b"], StepConfig(checkpoint_activations=True, shard="full"), device, ranks=8)


def test_a_run_says_what_its_step_is():
    config = TrainConfig(
        batch_size=8, length=128, accumulation=2, distillation=1.0, checkpoint_activations=True
    )
    step = StepConfig.of(config, 3, bf16=True, shard="full")
    assert step == StepConfig(3, 128, 2, True, True, "full", teacher="whole")
