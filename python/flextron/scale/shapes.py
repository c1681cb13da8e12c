"""The parameters of an elastic model by name and shape, and three shapes that everybody knows. No torch here."""

from __future__ import annotations

from math import prod

from flextron.config import ElasticConfig

Dims = tuple[int, ...]


def of_layer(shape: ElasticConfig) -> dict[str, Dims]:
    """The parameters of one layer, under the names that transformers gives them."""
    K, F, D = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, k = shape.num_heads * D, shape.num_kv_heads * D
    found: dict[str, Dims] = {"input_layernorm.weight": (K,), "post_attention_layernorm.weight": (K,)}
    for name, features in (("q", q), ("k", k), ("v", k)):
        found[f"self_attn.{name}_proj.weight"] = (features, K)
        if shape.attention_bias:
            found[f"self_attn.{name}_proj.bias"] = (features,)
    found["self_attn.o_proj.weight"] = (K, q)
    if shape.output_bias:
        found["self_attn.o_proj.bias"] = (K,)
    if shape.qk_norm:
        found |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
    for name, dims in (("gate", (F, K)), ("up", (F, K)), ("down", (K, F))):
        found[f"mlp.{name}_proj.weight"] = dims
        if shape.mlp_bias:
            found[f"mlp.{name}_proj.bias"] = dims[:1]
    return found


def of_root(shape: ElasticConfig) -> dict[str, Dims]:
    """The parameters outside the layers: the embedding, the last norm, and the head where it is not the embedding."""
    V, K = shape.vocab_size, shape.hidden_size
    found: dict[str, Dims] = {"model.embed_tokens.weight": (V, K), "model.norm.weight": (K,)}
    return found if shape.tied else found | {"lm_head.weight": (V, K)}


def count(tensors: dict[str, Dims], shards: int = 1) -> int:
    """Parameters of these tensors on one of ``shards`` ranks.

    FSDP2 cuts each tensor along its first dimension and pads it, so that every rank has the rows of the first one
    (torch.distributed.fsdp.fully_shard: "each parameter is sharded on dim-0").
    """
    return sum(-(-dims[0] // shards) * prod(dims[1:]) for dims in tensors.values())


def _llama(
    layers: int, hidden: int, neurons: int, heads: int, groups: int, head_dim: int, tied: bool
) -> ElasticConfig:
    return ElasticConfig(
        family="llama",
        unit="kv_group",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        vocab_size=128256,
        tied=tied,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        mlp_choices=tuple(neurons * i // 4 for i in (1, 2, 3, 4)),
        head_choices=tuple(groups * i // 4 for i in (1, 2, 3, 4)),
    )


# Llama 3.2 1B, Llama 3.1 8B and 70B (config.json of meta-llama/Llama-3.2-1B, Llama-3.1-8B, Llama-3.1-70B)
SHAPES = {
    "1b": _llama(16, 2048, 8192, 32, 8, 64, tied=True),
    "8b": _llama(32, 4096, 14336, 32, 8, 128, tied=False),
    "70b": _llama(80, 8192, 28672, 64, 8, 128, tied=False),
}
