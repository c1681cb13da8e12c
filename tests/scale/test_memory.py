"""The memory of a training step on paper is that of a step, counted tensor by tensor."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
from nn.models import EVERY
from steps import counted, elastic
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from flextron.recipes import StepConfig, TrainConfig
from flextron.scale.memory import estimate, fits
from flextron.scale.shapes import SHAPES, count, kind_of, of_layer, of_root
from flextron.training.sharding import cut

WITHIN = 0.03  # 0.1 is promised
SMALL = dict(rows=1, length=64)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (dict(bf16=False), dict(family="qwen3")),
        (dict(bf16=True, accumulation=2), dict()),
        (dict(bf16=True, checkpoint_activations=True), dict(num_hidden_layers=3)),
        (dict(bf16=True, teacher="whole"), dict(vocab_size=32768)),
        (dict(bf16=True, teacher="whole", teacher_value=2), dict(num_hidden_layers=4)),
        (SMALL | dict(bf16=False), dict(tie_word_embeddings=True, vocab_size=16384)),
        (SMALL | dict(bf16=False), dict(intermediate_size=4096, vocab_size=256)),
        (dict(cpu=True, bf16=True, teacher="whole", teacher_value=2), dict(vocab_size=32768)),
        (dict(cpu=True, bf16=True, accumulation=2), dict(tie_word_embeddings=True, vocab_size=16384)),
        (dict(cpu=True, bf16=False, teacher="whole"), dict(tie_word_embeddings=True, vocab_size=16384)),
        (dict(cpu=True, bf16=True), dict(num_hidden_layers=4)),
    ],
    ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()) or "small",
)
def test_the_estimate_is_what_a_step_takes(step, shape):
    step = StepConfig(**(dict(rows=4, length=256) | step))
    peak, elastic_shape = counted(step, **shape)
    assert estimate(elastic_shape, step).total == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize(
    "family, bf16",
    [
        ("nemotron", False),  # torch's norms, an MLP without a gate
        ("phi", True),  # one norm before both parts
        ("gemma3_text", True),  # norms before and after them
        ("gemma2", False),  # and bounded logits
        ("cohere", True),  # norms of transformers' own
        ("mixtral", True),
        ("gpt_oss", False),
    ],
)
def test_the_estimate_knows_what_layers_of_a_family_save(family, bf16):
    """`measured.py families` shows all of them."""
    step = StepConfig(rows=4, length=256, bf16=bf16)
    peak, elastic_shape = counted(step, family)
    assert estimate(elastic_shape, step).total == pytest.approx(peak, rel=0.04)


@pytest.mark.parametrize("family", EVERY)
def test_the_norms_of_a_family_are_those_of_its_row(family):
    with torch.device("meta"):
        model = elastic(family)
    a, layer, kind = model.anatomy, model.decoder_layers[0], kind_of(model.elastic)
    names = filter(None, (a.attention_norm, a.attention_post, a.mlp_norm, a.mlp_post))
    norms = [layer.get_submodule(name) for name in names]
    assert len(norms) == kind.norms
    written = inspect.getsource(type(norms[0]).forward)
    found = "torch" if "layer_norm(" in written else "centred" if "- mean" in written else "rms"
    assert found == kind.norm


@pytest.fixture
def four_ranks():
    """A process group whose other ranks are fakes: what they send is whatever is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (SMALL | dict(bf16=False), dict(hidden_size=512, intermediate_size=2048, vocab_size=512)),
        (
            SMALL | dict(bf16=True, teacher="sharded", teacher_value=2, checkpoint_activations=True),
            dict(num_hidden_layers=3, vocab_size=512),
        ),
    ],
)
def test_the_estimate_is_what_a_step_of_shards_takes(step, shape, four_ranks):
    step = StepConfig(**(dict(rows=4, length=256, shard="full") | step))
    peak, elastic_shape = counted(step, shard=lambda model: cut(model, four_ranks, step.bf16), **shape)
    assert estimate(elastic_shape, step, 4).total == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_are_those_of_the_model(family, tied):
    with torch.device("meta"):
        model = elastic(family, tie_word_embeddings=tied)
    matrices = [
        tuple(p.shape) for name, p in model.named_parameters() if ".layers.0." in name and p.dim() == 2
    ]
    own, shape = sum(p.numel() for p in model.decoder_layers[0].parameters()), model.elastic
    assert count(of_layer(shape)) == own
    assert sorted(dims for dims in of_layer(shape).values() if len(dims) == 2) == sorted(matrices)
    assert count(of_root(shape)) + shape.num_layers * own == shape.params(shape.full())


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
