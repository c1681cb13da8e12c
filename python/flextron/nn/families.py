"""The model families that can be made elastic: one row each, keyed by ``model_type``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from flextron.config import ElasticConfig


@dataclass(frozen=True)
class Family:
    """What differs between members of the Llama family.

    Attributes:
        qk_norm: each head's query and key pass an RMSNorm before the rotary embedding (``q_norm``, ``k_norm``).
        qkv_bias: whether the projections q, k and v have a bias: a bool, or the name of the configuration's flag.
        output_bias: the same for the output projection.
        mlp_bias: the same for the three projections of the MLP.
    """

    qk_norm: bool = False
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True, qkv_bias="attention_bias", output_bias="attention_bias"),
}


def family_of(hf_config: PreTrainedConfig) -> Family:
    """The row of a transformers configuration; NotImplementedError names the families there are."""
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in FAMILIES:
        raise NotImplementedError(
            f"flextron: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}"
        )
    return FAMILIES[model_type]


def default_mlp_choices(intermediate_size: int) -> tuple[int, ...]:
    """Quarters of the MLP, rounded to a multiple of 128 where a quarter holds two of them, of 64, then of 8.

    Multiples of the tile keep every width as efficient as the full one (design: widths that are odd cost
    time and save none). A model too small for that takes quarters of what it has.
    """
    quarter = intermediate_size / 4
    step = next((s for s in (128, 64, 8) if quarter >= 2 * s), 1)
    menu = {max(step, round(quarter * i / step) * step) for i in (1, 2, 3)}
    return (*sorted(d for d in menu if d < intermediate_size), intermediate_size)


def default_head_choices(max_heads: int) -> tuple[int, ...]:
    """Every count when there are up to four heads, otherwise quarters."""
    if max_heads <= 4:
        return tuple(range(1, max_heads + 1))
    return tuple(sorted({max(1, round(max_heads * i / 4)) for i in (1, 2, 3)} | {max_heads}))


def elastic_config(
    hf_config: PreTrainedConfig | PreTrainedModel,
    unit: str = "kv_group",
    mlp_choices: tuple[int, ...] | None = None,
    head_choices: tuple[int, ...] | None = None,
) -> ElasticConfig:
    """Describe a transformers model (or its configuration) and its menus of widths.

    Raises:
        NotImplementedError: the family is not in the table.
        ValueError: a menu does not ascend to the model's own size.
    """
    c = getattr(hf_config, "config", hf_config)
    family = family_of(c)

    def flag(value: bool | str) -> bool:
        return bool(getattr(c, value, False)) if isinstance(value, str) else value

    max_heads = (
        c.num_key_value_heads if unit == "kv_group" else c.num_attention_heads // c.num_key_value_heads
    )
    return ElasticConfig(
        family=c.model_type,
        unit=unit,
        num_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        vocab_size=c.vocab_size,
        tied=bool(c.tie_word_embeddings),
        attention_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        mlp_choices=_menu(mlp_choices, default_mlp_choices(c.intermediate_size)),
        head_choices=_menu(head_choices, default_head_choices(max_heads)),
    )


def _menu(given: Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    return default if given is None or len(given) == 0 else tuple(given)
