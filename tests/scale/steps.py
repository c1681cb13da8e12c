"""Training steps whose memory is counted: the models, the losses, and the count itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from live import Live
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flextron.config import ElasticConfig
from flextron.judge.objectives import cross_entropy, distillation
from flextron.nn import make_elastic
from flextron.nn.recomputation import recomputing
from flextron.recipes import StepConfig

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "nemotron": (NemotronConfig, NemotronForCausalLM),
}


def elastic(family="llama", **overrides):
    """A random elastic model, small unless it is told otherwise."""
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


def sizes_of(shape: ElasticConfig) -> dict[str, object]:
    """The settings of `elastic` that make a Llama of this shape."""
    return dict(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )


@contextmanager
def unmasked(family: str) -> Iterator[None]:
    """transformers makes no mask where nothing is padded; of fake tensors it cannot know."""
    with mock.patch(f"transformers.models.{family}.modeling_{family}.create_causal_mask", lambda **_: None):
        yield


def losses(model, ids, teacher):
    """As `flextron.training.loop.Run._losses`."""
    logits = model(input_ids=ids, use_cache=False).logits
    loss = cross_entropy(logits, ids)
    if teacher is not None:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits
        loss = loss + distillation(logits, wanted)
    return loss


def counted(step: StepConfig, family: str = "llama", shard=None, **overrides) -> tuple[int, ElasticConfig]:
    """The most bytes that are alive in the second step of a training, and the shape of its model.

    No tensor has memory. ``shard`` is called with each model, to cut it over the ranks of a process group.
    """
    mixed = step.bf16 and shard is None
    with unmasked(family), FakeTensorMode():
        model = elastic(family, **overrides).train()
        teacher = None
        if step.teacher in ("whole", "sharded"):
            teacher = elastic(family, **overrides).requires_grad_(False).eval()
        held = [module for module in (model, teacher) if module is not None]
        if shard is not None:
            for module in held:
                shard(module)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.zeros(step.rows, step.length, dtype=torch.int64)
        layers = recomputing(model) if step.checkpoint_activations else nullcontext()
        with layers, Live(p for module in held for p in module.parameters()) as live:
            for _ in range(2):
                live.restart()  # the first step makes the optimiser's states
                for _ in range(step.accumulation):
                    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                        loss = losses(model, ids, teacher)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return live.peak, model.elastic
