"""Training steps whose memory is counted: the models, the losses, and the count itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from live import Live
from nn.models import EVERY
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flextron.config import ElasticConfig
from flextron.judge import objectives
from flextron.judge.objectives import imitation, next_token, weighted
from flextron.nn import make_elastic
from flextron.nn.headless import headless, plain_head
from flextron.nn.recomputation import recomputing
from flextron.nn.widened import widened
from flextron.recipes import StepConfig

_NEURONS = ("n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")


def elastic(family="llama", **overrides):
    """A random elastic model of any family, small unless it is told otherwise."""
    sizes = dict(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    own = {name: value for name, value in EVERY[family].items() if name not in sizes}
    own |= {name: 768 for name in _NEURONS if name in own} | dict(bos_token_id=1, eos_token_id=2)
    own |= {"pad_token_id": 0} if family != "llama" else {}
    own |= {"word_embed_proj_dim": 256} if family == "opt" else {}
    own |= {"layer_types": own["layer_types"][:2]} if "layer_types" in own else {}
    own |= {"no_rope_layers": [1, 0]} if family == "smollm3" else {}
    if family == "falcon":  # its configuration has other names for these
        del sizes["head_dim"], sizes["num_key_value_heads"]
    config = CONFIG_MAPPING[family](**(sizes | dict(tie_word_embeddings=False) | own | overrides))
    return make_elastic(AutoModelForCausalLM.from_config(config))


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
def unmasked(model) -> Iterator[None]:
    """transformers makes no mask where nothing is padded; of fake tensors it cannot know."""
    module = sys.modules[type(model).__module__]
    with ExitStack() as stack:
        for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, lambda **_: None))
        yield


def losses(model, ids, teacher, cpu):
    """As `flextron.training.loop.Run._losses`."""
    terms = [(1.0, next_token(ids))]
    if teacher is not None:
        with torch.no_grad(), widened(teacher):
            terms.append((1.0, imitation(teacher(input_ids=ids, use_cache=False).logits)))
    head = plain_head(model) if cpu else None
    with nullcontext() if head is None else headless(model, head):
        x = model(input_ids=ids, use_cache=False).logits
    return weighted(x, head, terms)[0]


@contextmanager
def on(cpu: bool, is_one: bool) -> Iterator[None]:
    """Let ops and losses do what they do on a CPU, or what they do on a GPU; neither reads a tensor's value.

    ``is_one``: whether the loss is differentiated as it is."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(objectives, "_is_one", lambda scale: is_one))
        if not cpu:
            stack.enter_context(mock.patch.object(objectives, "_CHUNK_VALUES_CPU", 1 << 62))
        yield


def counted(step: StepConfig, family: str = "llama", shard=None, **overrides) -> tuple[int, ElasticConfig]:
    """The most bytes that are alive in the second step of a training, and the shape of its model.

    No tensor has memory, but those of experts: which of them a token is sent to must be known. ``shard`` is called with
    each model, to cut it over the ranks of a process group.
    """
    mixed = step.bf16 and shard is None
    with nullcontext() if "num_experts_per_tok" in EVERY[family] else FakeTensorMode():
        model = elastic(family, **overrides).train()
        teacher = None
        if step.teacher in ("whole", "sharded"):
            teacher = elastic(family, **overrides).requires_grad_(False).eval()
            for p in teacher.parameters() if step.teacher_value == 2 else ():
                p.data = p.data.bfloat16()
        held = [module for module in (model, teacher) if module is not None]
        if shard is not None:
            for module in held:
                shard(module)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(3, 61, (step.rows, step.length))
        layers = recomputing(model) if step.checkpoint_activations else nullcontext()
        with (
            layers,
            on(step.cpu, step.cpu and step.accumulation == 1),
            unmasked(model),
            Live(p for module in held for p in module.parameters()) as live,
        ):
            for _ in range(2):
                live.restart()  # the first step makes the optimiser's states
                for _ in range(step.accumulation):
                    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                        loss = losses(model, ids, teacher, step.cpu)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return live.peak, model.elastic
