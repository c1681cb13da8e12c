"""Build a transformers model without initialising it, and fill it with tensors from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def skeleton(hf_config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM whose parameters have shapes but no memory (device ``meta``); to be filled by `fill`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    # The rotary table is no parameter: it is computed from the configuration, on a real device.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=hf_config)
    return model.eval()


def give_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Give a `skeleton` whose parameters are sharded memory on a device; their values are still to be copied there."""
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    model.tie_weights()


def say_tied(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Record in a configuration whether a model's embeddings are tied; transformers does not tie two that differ."""
    config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight


def parameter_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that `fill` takes; a tied one comes once."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def fill(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Make ``tensors`` the parameters of a `skeleton`, without a copy; the names must be its own."""
    result = model.load_state_dict(dict(tensors), strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    for fault, names in (("nothing for", empty), ("unknown", result.unexpected_keys)):
        if names:
            raise ValueError(f"fill: tensors must be the model's own, got {fault} {', '.join(names[:5])}")
    return model
