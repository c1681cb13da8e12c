"""The parameters of an elastic model by shape, and three shapes that everybody knows. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from flextron.config import Counts, ElasticConfig

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """What a layer saves for its backward that its parameters do not tell. The defaults are Llama's.

    Attributes:
        norms: norms of the stream in a layer.
        norm: what a norm saves of its input: ``"rms"``: it in float32, and normalised; ``"torch"``, torch's own: it
            alone; ``"centred"``: it without its mean, twice, and normalised, all in float32.
        hidden: tensors of hidden values that are saved beside those before the activation.
        wide: whether hidden values are float32 where matrices are multiplied in bfloat16.
        capped: whether logits are bounded by a tanh, which saves them once more.
    """

    norms: int = 2
    norm: str = "rms"
    hidden: int = 0
    wide: bool = False
    capped: bool = False


_OF_TORCH = "falcon gpt2 gpt_neox gptj nemotron olmo opt phi stablelm starcoder2"  # LayerNorms
KINDS = {
    **{family: Kind(norm="torch") for family in _OF_TORCH.split()},
    **{family: Kind(norms=4) for family in ("gemma3_text", "glm4")},
    **{family: Kind(norms=1, norm="torch") for family in ("gptj", "phi")},
    **{family: Kind(norms=1, norm="centred") for family in ("cohere", "cohere2")},
    "gemma2": Kind(norms=4, capped=True),
    # weights that are stored transposed go through torch's GEMM and activation
    "gpt2": Kind(norm="torch", hidden=1),
    # transformers' own gate, a step at a time, after a float32 bias
    "gpt_oss": Kind(hidden=5, wide=True),
}


def kind_of(shape: ElasticConfig) -> Kind:
    """The kind of a model's layers."""
    return KINDS.get(shape.like or shape.family, Kind())


@dataclass(frozen=True)
class Experts:
    """How many MLPs a layer has, and how many of them a token is sent to."""

    number: int
    chosen: int


def experts_of(shape: ElasticConfig) -> Experts | None:
    """A layer's experts, whose MLPs have a gate; None where it has one MLP."""
    expert = 3 * shape.hidden_size  # parameters of one neuron, but for biases
    number = shape.counts.neuron // expert
    return Experts(number, shape.counts.active // expert) if number > 1 else None


def of_layer(shape: ElasticConfig) -> dict[str, Dims]:
    """The parameters of one layer: its matrices, and its norms and biases together."""
    K, F, D, c = shape.hidden_size, shape.intermediate_size, shape.head_dim, shape.counts
    q, k = shape.num_heads * D, shape.num_kv_heads * D
    found: dict[str, Dims] = {
        f"self_attn.{name}_proj.weight": (n, K) for name, n in (("q", q), ("k", k), ("v", k))
    }
    found["self_attn.o_proj.weight"] = (K, q)
    found |= {f"mlp.up_{i}.weight": (F, K) for i in range(c.neuron // K - 1)}  # gate and up, or up alone
    found["mlp.down_proj.weight"] = (K, F)
    rest = shape.params(shape.full()) - count(of_root(shape))
    vectors = rest // shape.num_layers - count(found)
    return found | ({"vectors": (vectors,)} if vectors else {})


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
    vocabulary = 128256
    return ElasticConfig(
        family="llama",
        unit="kv_group",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        vocab_size=vocabulary,
        tied=tied,
        qk_norm=False,
        counts=Counts.of_llama(layers, hidden, head_dim, vocabulary, tied),
        mlp_choices=tuple(neurons * i // 4 for i in (1, 2, 3, 4)),
        head_choices=tuple(groups * i // 4 for i in (1, 2, 3, 4)),
    )


STORED = 2  # bytes of a weight of these, which are published in bfloat16
# Llama 3.2 1B, Llama 3.1 8B and 70B (config.json of meta-llama/Llama-3.2-1B, Llama-3.1-8B, Llama-3.1-70B)
SHAPES = {
    "1b": _llama(16, 2048, 8192, 32, 8, 64, tied=True),
    "8b": _llama(32, 4096, 14336, 32, 8, 128, tied=False),
    "70b": _llama(80, 8192, 28672, 64, 8, 128, tied=False),
}
