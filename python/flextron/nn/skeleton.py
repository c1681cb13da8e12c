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
    # Buffers are no parameters: they are computed from the configuration, on a real device.
    for owner in list(model.modules()):
        for name, module in owner.named_children():
            if not any(True for _ in module.buffers(recurse=False)):
                continue
            if any(True for _ in module.parameters(recurse=False)):
                module._buffers.update(
                    {key: torch.empty_like(b, device="cpu") for key, b in module._buffers.items()}
                )
                model._init_weights(module)
            else:
                setattr(owner, name, type(module)(config=hf_config))
    return model.eval()


def move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Put the buffers of a `skeleton`, which its parameters need not be beside, on a device."""
    for module in model.modules():
        module._buffers.update(
            {name: b if b is None else b.to(device) for name, b in module._buffers.items()}
        )


def give_memory(model: PreTrainedModel, device: torch.device) -> None:
    """Give a `skeleton` whose parameters are sharded memory on a device; their values are still to be copied there."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
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
