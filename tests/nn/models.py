"""Small random models of each family for the tests; large weights, so that an error cannot hide."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
GQA = {"1:1": (4, 4), "2:1": (8, 4), "3:1": (9, 3), "4:1": (8, 2)}  # query heads, key/value heads


def small_model(family: str = "llama", gqa: str = "2:1", seed: int = 0, **overrides: Any) -> Any:
    """A random model of 3 layers, hidden size 72, head size 16, 40 neurons, vocabulary 61."""
    heads, groups = GQA[gqa]
    config_class, model_class = FAMILIES[family]
    settings = dict(
        vocab_size=61,
        hidden_size=72,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        sliding_window=None,
    )
    config = config_class(**(settings | overrides))
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                1 + 0.3 * torch.randn_like(p) if "norm" in name else torch.randn_like(p) * p.shape[-1] ** -0.5
            )
    return model
