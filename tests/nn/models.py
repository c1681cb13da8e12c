"""Small random models of each family for the tests; large weights, so that an error cannot hide."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # which differ little: for what does not depend on the anatomy

_NEOX = dict(
    hidden_size=64, num_attention_heads=4
)  # these have as many groups as heads, of hidden size / heads
_FEW = dict(num_key_value_heads=2, **_NEOX)
_WINDOW = dict(sliding_window=5)
_PATTERN = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_WINDOW)
# Every family of the table, with settings that use what is particular to it.
EVERY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _WINDOW,
    "ministral": _PATTERN,
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": dict(
        query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **_PATTERN
    ),
    "gemma3_text": dict(query_pre_attn_scalar=20, **_PATTERN),
    "granite": dict(
        embedding_multiplier=3.0, residual_multiplier=0.6, logits_scaling=2.0, attention_multiplier=0.2
    ),
    "arcee": {},
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "hunyuan_v1_dense": {},
    "phi": dict(qk_layernorm=True, hidden_act="gelu_new", **_FEW),
    "phi3": dict(partial_rotary_factor=0.5, **_WINDOW),
    "olmo": dict(clip_qkv=1.0),
    "olmo2": {},
    "olmo3": _PATTERN,
    "exaone4": _PATTERN,
    "cohere": dict(use_qk_norm=True, logit_scale=0.3),
    "cohere2": _PATTERN,
    "helium": dict(hidden_size=128, head_dim=16),
    "glm": dict(attention_bias=True),
    "glm4": dict(attention_bias=True),
    "nemotron": dict(hidden_act="relu2"),
    "starcoder2": _WINDOW,
    "stablelm": dict(use_qkv_bias=True, **_FEW),
    "gpt2": dict(n_inner=40, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **_NEOX),
    "gpt_neox": _NEOX,
    "gptj": dict(n_inner=40, rotary_dim=8, **_NEOX),
    "opt": dict(ffn_dim=40, word_embed_proj_dim=64, dropout=0.0, **_NEOX),
    "falcon": dict(
        ffn_hidden_size=40,
        new_decoder_architecture=True,
        num_kv_heads=2,
        hidden_size=64,
        num_attention_heads=4,
    ),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, **_WINDOW),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, clip_qkv=1.0, **_FEW),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, **_PATTERN),
}
# Rows that the configuration changes, and what they are then called.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere without head norms": ("cohere", dict(use_qk_norm=False)),
    "phi without head norms": ("phi", dict(qk_layernorm=False)),
    "olmo without a bound": ("olmo", dict(clip_qkv=None)),
    "stablelm, parallel": ("stablelm", dict(use_parallel_residual=True)),
    "gpt_neox, in turn": ("gpt_neox", dict(use_parallel_residual=False)),
    "opt, norms last": ("opt", dict(do_layer_norm_before=False)),
    "falcon 7b": ("falcon", dict(new_decoder_architecture=False, multi_query=True, parallel_attn=True)),
    "falcon, in turn": (
        "falcon",
        dict(
            new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True, num_kv_heads=4
        ),
    ),
    "falcon, one norm": ("falcon", dict(num_ln_in_parallel_attn=1)),
}
GQA = {"1:1": (4, 4), "2:1": (8, 4), "3:1": (9, 3), "4:1": (8, 2)}  # query heads, key/value heads


def small_model(
    family: str = "llama", gqa: str = "2:1", seed: int = 0, listed: bool = True, **overrides: Any
) -> Any:
    """A random model of 3 layers, hidden size 72, head size 16, 40 neurons, vocabulary 61."""
    heads, groups = GQA[gqa]
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
    if listed and family not in FAMILIES:
        settings |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | EVERY[family]
    if settings["hidden_size"] != 72 and "head_dim" not in EVERY.get(family, {}):
        del settings["head_dim"]
    config = CONFIG_MAPPING[family](**(settings | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                1 + 0.3 * torch.randn_like(p) if "norm" in name else torch.randn_like(p) * p.shape[-1] ** -0.5
            )
    return model


def row_model(row: str, seed: int = 0, **overrides: Any) -> Any:
    """The random model of a row of `EVERY` or `VARIANTS`."""
    family, special = VARIANTS.get(row, (row, EVERY.get(row, {})))
    return small_model(family, "2:1", seed, **(special | overrides))
