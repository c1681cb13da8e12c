"""The description of a transformers model as an elastic one, and the menus of widths that it gets by default."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from transformers import PreTrainedConfig, PreTrainedModel

from flextron.config import Counts, ElasticConfig
from flextron.nn.anatomy import Anatomy, Sizes, anatomy_of, like_of, size
from flextron.nn.skeleton import skeleton


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
    model: PreTrainedConfig | PreTrainedModel,
    unit: str = "kv_group",
    mlp_choices: tuple[int, ...] | None = None,
    head_choices: tuple[int, ...] | None = None,
) -> ElasticConfig:
    """Describe a transformers model (or its configuration) and its menus of widths.

    Raises:
        NotImplementedError: the family is not in the table, or has a feature that is not supported.
        ValueError: a menu does not ascend to the model's own size, or begins at 0 where a part cannot be skipped.
    """
    c = model.config if isinstance(model, PreTrainedModel) else model
    anatomy = anatomy_of(c)
    if not isinstance(model, PreTrainedModel):
        model = skeleton(type(c).from_dict(c.to_dict()))  # without what may have made it elastic
    whole = anatomy.whole(c)
    if anatomy.stream_norms and 0 in (*(mlp_choices or ()), *(head_choices or ())):
        raise ValueError(
            f"elastic_config: menus of a {c.model_type} whose norms follow the sum must begin above 0, got 0: without "
            "its part such a norm would still change the stream"
        )
    return ElasticConfig(
        family=c.model_type,
        unit=unit,
        num_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        intermediate_size=whole.neurons,
        num_heads=c.num_attention_heads,
        num_kv_heads=whole.groups,
        head_dim=head_size(c),
        vocab_size=c.vocab_size,
        tied=bool(c.tie_word_embeddings),
        qk_norm=bool(anatomy.head_norms),
        counts=count(model, anatomy, whole),
        mlp_choices=_menu(mlp_choices, default_mlp_choices(whole.neurons)),
        head_choices=_menu(
            head_choices, default_head_choices(whole.groups if unit == "kv_group" else whole.per_group)
        ),
        like=like_of(c),
    )


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def count(model: PreTrainedModel, anatomy: Anatomy, whole: Sizes) -> Counts:
    """What a model's parameters are counted by; all its layers have the same.

    A layer's parameters are a linear function of its neurons, groups and query heads: each is counted by what one more
    of it brings.
    """
    D = head_size(model.config)
    axes, prefix = anatomy.tensors(), anatomy.layer_path(0) + "."
    layer = {
        name.removeprefix(prefix): p.shape for name, p in model.named_parameters() if name.startswith(prefix)
    }

    def of(s: Sizes) -> int:
        return sum(
            prod(
                size(axis, s, D) if axis else length
                for axis, length in zip(axes.get(name, ((),) * len(shape)), shape, strict=True)
            )
            for name, shape in layer.items()
        )

    none = of(Sizes(0, 0, 0))
    groups = of(Sizes(0, 1, 0)) - none
    embedding = model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    full, neuron = of(whole), of(Sizes(1, 0, 0)) - none
    experts = anatomy.experts_of(model.config)
    return Counts(
        fixed=total - model.config.num_hidden_layers * (full - none),
        neuron=neuron,
        group=groups,
        query=of(Sizes(0, 1, 1)) - none - groups,
        active=neuron if experts is None else neuron // experts.number * experts.chosen,
        embedding=embedding,
    )


def _menu(given: Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    return default if given is None or len(given) == 0 else tuple(given)
