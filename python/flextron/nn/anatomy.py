"""How a decoder layer of each family is built: a row for every ``model_type``, from which all else is derived.

A row says where the parts of a layer are, which axis the rows and columns of its tensors follow, and what happens
between them. Sorting, extraction, packing, counting and scoring read the tensors; the layers read the rest; the decoder
op is given a model only where `decoder_fault` finds nothing that it does not compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from flextron.config import ElasticConfig

Axes = tuple[
    str, ...
]  # what lies one after another along one dimension of a tensor; () follows nothing elastic


class Sizes(NamedTuple):
    """How much of a layer there is: neurons of the MLP, key/value groups, query heads of each group."""

    neurons: int
    groups: int
    per_group: int


class Experts(NamedTuple):
    """How many experts a layer has, and how many of them a token is sent to."""

    number: int
    chosen: int


def _shape(axis: str, s: Sizes, head_size: int) -> tuple[int, ...]:
    """An axis as a grid."""
    return {
        "neurons": (s.neurons,),
        "pairs": (s.neurons, 2),  # gate and up of a neuron side by side
        "query": (s.groups, s.per_group, head_size),
        "groups": (s.groups, head_size),
        "grouped": (s.groups, s.per_group + 2, head_size),  # of a group its queries, its key, its value
        "query_heads": (s.groups, s.per_group),
        "group_heads": (s.groups,),
    }[axis]


def size(axes: Axes, s: Sizes, head_size: int) -> int:
    """The length of a dimension that follows these axes."""
    return sum(prod(_shape(axis, s, head_size)) for axis in axes)


def places(axes: Axes, part: Sizes, whole: Sizes, head_size: int) -> Tensor:
    """Where a prefix of every axis lies in a dimension of the whole: [size of the part] int64, ascending."""
    found, start = [], 0
    for axis in axes:
        shape = _shape(axis, whole, head_size)
        grid = torch.arange(start, start + prod(shape)).view(shape)
        if axis == "grouped":
            grid = grid[: part.groups]
            kept = torch.cat([grid[:, : part.per_group], grid[:, -2:]], dim=1)
        else:
            kept = grid[tuple(slice(n) for n in _shape(axis, part, head_size))]
        found.append(kept.flatten())
        start += prod(shape)
    return torch.cat(found)


def permuted(
    axes: Axes, neurons: Tensor, groups: Tensor, heads: Tensor, whole: Sizes, head_size: int
) -> Tensor:
    """The old place of each new one in a dimension, when a layer is sorted: [size] int64.

    Args:
        neurons, groups, heads: the old neuron [F], group [G] and, inside that group, query head [G, M] at each new
            place.
    """
    found, start = [], 0
    for axis in axes:
        shape = _shape(axis, whole, head_size)
        grid = torch.arange(start, start + prod(shape)).view(shape)
        if axis in ("neurons", "pairs"):
            moved = grid[neurons]
        elif axis in ("groups", "group_heads"):
            moved = grid[groups]
        else:
            moved = grid[groups[:, None], heads]
            if axis == "grouped":
                moved = torch.cat([moved, grid[groups, -2:]], dim=1)
        found.append(moved.flatten())
        start += prod(shape)
    return torch.cat(found)


@dataclass(frozen=True)
class Anatomy:
    """A decoder layer, and where it stands in its model. The defaults are Llama's.

    Attributes:
        base: path of the module that has the layers.
        layers, attention, mlp: names of the list of layers, and of a layer's two parts; ``mlp`` is empty where the
            layer itself has the projections.
        norm: name of the last norm, in ``base``.
        qkv: the projections of queries, keys and values, or the one that has all three.
        grouped: the one has, for each group, its queries, its key and its value; else all queries come first.
        output: the projection of attention's output.
        up: gate and up projection, the one that has both, or up alone where the MLP has no gate.
        gated: whether the MLP is ``down(act(gate(x)) * up(x))``, and not ``down(act(up(x)))``.
        down: the MLP's last projection.
        activation: the configuration's name of the activation; names are tried in turn.
        experts: names of the router and of the experts in ``mlp``, whose projections have a dimension more; or none.
        paired: whether the experts' gate and up lie side by side, [inputs, outputs], with biases.
        transposed: whether projections store [inputs, outputs].
        head_norms: the norms of queries and keys.
        norm_over: ``"head"``: one weight for each head alike. ``"heads"``: over all heads of a token together.
            ``"each"``: a weight of each head's own.
        norm_last: whether queries and keys are normalised after their rotation.
        rotary: ``"half"``, ``"half_once"`` (of tables that hold every frequency once), ``"interleaved"`` (pairs side by
            side), ``"interleaved_halves"`` (the same, of tables in halves), ``"interleaved_sin_first"``, or ``""``
            where attention knows no positions.
        counted: whether the model itself counts positions, over visible tokens.
        table_of_type: whether layers of each of the configuration's ``layer_types`` have a table of rotations of their
            own.
        unrotated: what says that a layer does not rotate: ``"no_rope_layers"`` (the configuration), ``"full"`` (layers
            without a window, where others have one), ``"unwindowed"`` (layers without a window).
        clip: the configuration's bound of queries, keys and values.
        softcap: the configuration's bound of attention's scores.
        sinks: name of a parameter of attention, a logit of each head that is no key's.
        scale: the attribute of attention that multiplies scores.
        norm_kind: ``"rms"``, ``"rms+1"``, ``"layer"``, ``"layer+1"``.
        attention_norm, attention_post, mlp_norm, mlp_post: norms before and after a layer's parts; empty without.
        norm_eps: the attribute of a norm that is added to the mean square; empty where norms have neither it nor
            weights.
        stream_norms: whether ``attention_post`` and ``mlp_post`` normalise the stream, and not what is added to it.
        parallel: whether attention and MLP read the same input.
        multiplier: the layer's attribute that multiplies what is added to the stream.
        scales: what the configuration multiplies embeddings, stream or logits by; ``"hidden_size"`` is Gemma's root.
        logit_cap: the configuration's bound of the logits.
        pair: whether a layer returns a pair.
        dropouts: the configuration's probabilities of dropping inside a layer, which must be 0.
        must: fields of the configuration, and the only values that are supported.
        sizes: the configuration's names of the neurons and of the key/value heads, empty where it has as many as heads.
        groups: the number of key/value heads, where the configuration does not say it as a number.
        counts: attributes of a stock attention that say how many heads it has, and what each counts: ``"query"``,
            ``"groups"``, ``"per_group"`` heads, or features, ``"query_features"``. A name ``"config.*"`` is a field of
            the attention's configuration.
    """

    base: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    norm: str = "norm"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    grouped: bool = False
    output: str = "o_proj"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    gated: bool = True
    down: str = "down_proj"
    activation: tuple[str, ...] = ("hidden_act", "hidden_activation", "activation_function", "activation")
    experts: tuple[str, ...] = ()
    paired: bool = False
    transposed: bool = False
    head_norms: tuple[str, ...] = ()
    norm_over: str = "head"
    norm_last: bool = False
    rotary: str = "half"
    counted: bool = False
    table_of_type: bool = False
    unrotated: str = ""
    clip: str = ""
    softcap: str = ""
    sinks: str = ""
    scale: str = "scaling"
    norm_kind: str = "rms"
    norm_eps: str = "variance_epsilon"
    attention_norm: str = "input_layernorm"
    attention_post: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_post: str = ""
    stream_norms: bool = False
    parallel: bool = False
    multiplier: str = ""
    scales: tuple[str, ...] = ()
    logit_cap: str = ""
    pair: bool = False
    dropouts: tuple[str, ...] = ("attention_dropout",)
    must: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    sizes: tuple[str, str] = ("intermediate_size", "num_key_value_heads")
    groups: int = 0
    counts: dict[str, str] = field(default_factory=lambda: {"num_key_value_groups": "per_group"})

    def whole(self, config: Any) -> Sizes:
        """The sizes of a full layer."""
        neurons = getattr(config, self.sizes[0], None) or 4 * config.hidden_size  # GPT-2 says None
        heads = config.num_attention_heads
        groups = self.groups or (getattr(config, self.sizes[1], None) if self.sizes[1] else None) or heads
        return Sizes(neurons, groups, heads // groups)

    def activation_in(self, config: Any) -> str:
        """The activation that a configuration says, by transformers' name."""
        return next(v for name in self.activation if isinstance(v := getattr(config, name, None), str))

    def layers_in(self, model: Any) -> Any:
        """The list of a model's layers."""
        return getattr(self.base_in(model), self.layers)

    def base_in(self, model: Any) -> Any:
        """The module that has a model's layers."""
        return model.get_submodule(self.base)

    def attention_in(self, layer: Any) -> Any:
        return getattr(layer, self.attention)

    def mlp_in(self, layer: Any) -> Any:
        """The module that has the MLP's projections."""
        return getattr(layer, self.mlp) if self.mlp else layer

    def layer_path(self, layer: int) -> str:
        return f"{self.base}.{self.layers}.{layer}"

    def path(self, part: str, name: str) -> str:
        """Where a parameter of a layer's part is, from the layer."""
        return f"{part}.{name}" if part else name

    @property
    def turns_pairs(self) -> bool:
        """Whether elements side by side are turned together, and not those of two halves of a head."""
        return self.rotary.startswith("interleaved")

    @property
    def qkv_axes(self) -> dict[str, Axes]:
        """The projections of queries, keys and values, and what their rows follow."""
        if len(self.qkv) > 1:
            return dict(zip(self.qkv, (("query",), ("groups",), ("groups",)), strict=True))
        return {self.qkv[0]: ("grouped",) if self.grouped else ("query", "groups", "groups")}

    @property
    def up_axes(self) -> dict[str, Axes]:
        """The MLP's first projections, and what their rows follow."""
        is_one = self.gated and len(self.up) == 1
        return dict.fromkeys(self.up, ("neurons", "neurons") if is_one else ("neurons",))

    def tensors(self) -> dict[str, tuple[Axes, ...]]:
        """What each dimension of a layer's elastic parameters follows, by the name in the layer."""
        found: dict[str, tuple[Axes, ...]] = {}

        def projection(part: str, name: str, rows: Axes, columns: Axes) -> None:
            stem = self.path(part, name)
            found[f"{stem}.weight"] = (columns, rows) if self.transposed else (rows, columns)
            if rows:
                found[f"{stem}.bias"] = (rows,)

        for name, rows in self.qkv_axes.items():
            projection(self.attention, name, rows, ())
        projection(self.attention, self.output, (), ("query",))
        if self.experts:
            found |= self._expert_tensors()
        else:
            for name, rows in self.up_axes.items():
                projection(self.mlp, name, rows, ())
            projection(self.mlp, self.down, (), ("neurons",))
        if self.norm_over != "head":
            is_one = self.norm_over == "heads"
            axes = (("query",),), (("groups",),)
            each = (("query_heads",), ()), (("group_heads",), ())
            for name, dims in zip(self.head_norms, axes if is_one else each, strict=False):
                found[f"{self.attention}.{name}.weight"] = dims
        if self.sinks:
            found[f"{self.attention}.{self.sinks}"] = (("query_heads",),)
        return found

    def _expert_tensors(self) -> dict[str, tuple[Axes, ...]]:
        """The same of experts, which come first in each parameter."""
        stem = f"{self.mlp}.{self.experts[1]}"
        up, down = f"{stem}.{self.up[0]}", f"{stem}.{self.down}"
        if not self.paired:
            return {up: ((), ("neurons", "neurons"), ()), down: ((), (), ("neurons",))}
        return {up: ((), (), ("pairs",)), f"{up}_bias": ((), ("pairs",)), down: ((), ("neurons",), ())}

    def output_biases(self, attention: bool, mlp: bool) -> list[str]:
        """The biases, by their names in the layer, of what one or both of its parts add to the stream."""
        down = f"{self.experts[1]}.{self.down}_bias" if self.experts else f"{self.down}.bias"
        found = [self.path(self.attention, f"{self.output}.bias")] if attention else []
        return found + ([self.path(self.mlp, down)] if mlp else [])

    def experts_of(self, config: Any) -> Experts | None:
        """How many experts a layer has; None where it has one MLP."""
        if not self.experts:
            return None
        number = getattr(config, "num_local_experts", None) or config.num_experts
        return Experts(number, config.num_experts_per_tok)

    def window(self, config: PreTrainedConfig, layer: int) -> int | None:
        """How many keys, its own among them, a token of a layer sees; None: all before it."""
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if window is None or not getattr(config, "use_sliding_window", True):
            return None
        return window if types is None or types[layer] == "sliding_attention" else None

    def rotates(self, config: PreTrainedConfig, layer: int) -> bool:
        """Whether positions turn the queries and keys of a layer."""
        if not self.rotary:
            return False
        if self.unrotated == "no_rope_layers":
            return bool(config.no_rope_layers[layer])
        windowed = self.window(config, layer) is not None
        if self.unrotated == "full":
            return windowed or config.sliding_window is None
        return windowed if self.unrotated == "unwindowed" else True

    def rotation(self, config: PreTrainedConfig, layer: int) -> str:
        """The name of the table that turns a layer's heads; empty where there is one for all layers."""
        return config.layer_types[layer] if self.table_of_type else ""

    def rotations(self, config: PreTrainedConfig) -> list[str]:
        """The names of a model's tables of rotations."""
        return sorted({self.rotation(config, i) for i in range(config.num_hidden_layers)})

    def decoder_kind(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What a `DecoderShape` must say of a model that the decoder op computes, beyond sizes; of Llama nothing."""
        layers, names = range(config.num_hidden_layers), self.rotations(config)
        tables = [names.index(self.rotation(config, i)) + 1 if self.rotates(config, i) else 0 for i in layers]
        windows = [self.window(config, i) or 0 for i in layers]
        kind: dict[str, Any] = {_DECODER_SCALES[name]: getattr(config, name) for name in self.scales}
        if "hidden_size" in self.scales:
            kind["embedding_scale"] **= 0.5
        if "logits_scaling" in self.scales:
            kind["logit_scale"] = 1 / kind["logit_scale"]
        kind = {name: value for name, value in kind.items() if value != 1}
        kind |= {} if self.norm_kind == "rms" else {"norms": self.norm_kind}
        kind |= {"rotation": "pairs"} if self.turns_pairs else {}
        kind |= {"norm_over": self.norm_over} if self.norm_over != "head" else {}
        kind |= {"norm_last": True} if self.norm_last else {}
        kind |= {} if self.gated else {"gated": False}
        kind |= {"parallel": True} if self.parallel else {}
        for name, bound in (("logit_cap", self.logit_cap), ("softcap", self.softcap), ("clip", self.clip)):
            if bound and getattr(config, bound, None) is not None:
                kind[name] = getattr(config, bound)
        kind |= {"tables": tables} if {*tables} != {1} else {}
        return kind | ({"windows": windows} if any(windows) else {})

    def is_llama(self, config: PreTrainedConfig) -> bool:
        """Whether a model's layers are Llama's, with norms of heads and biases at most."""
        norms = self.attention_norm and self.mlp_norm and not (self.attention_post or self.mlp_post)
        apart = len(self.qkv) == 3 and len(self.up) == 2
        return bool(norms) and apart and self.decoder_fault(config) is None and not self.decoder_kind(config)

    def decoder_fault(self, config: PreTrainedConfig) -> str | None:
        """What of a model of this family the decoder op does not compute, in a few words; None: it computes all."""
        plain = Anatomy()
        for name, what in (
            ("transposed", "transposed weights"),
            ("experts", "experts"),
            ("stream_norms", "norms of the stream"),
            ("sinks", "attention sinks"),
        ):
            if getattr(self, name) != getattr(plain, name):
                return what
        if self.rotary != "half" and (self.table_of_type or not self.turns_pairs):
            return "positions"
        is_other = self.grouped or self.norm_last or not self.norm_kind.startswith("rms")
        return "norms over all heads" if self.norm_over == "heads" and is_other else None


# the decoder op's name of what a configuration multiplies by
_DECODER_SCALES = {
    "hidden_size": "embedding_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
}
LLAMA = Anatomy()
_HEAD_NORMS = ("q_norm", "k_norm")
_SANDWICH: dict[str, Any] = dict(
    attention_post="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post="post_feedforward_layernorm",
)
_AFTER: dict[str, Any] = dict(
    attention_norm="",
    attention_post="post_attention_layernorm",
    mlp_norm="",
    mlp_post="post_feedforward_layernorm",
)
_CAUSAL = {"use_bidirectional_attention": (None, False)}
_GEMMA = replace(LLAMA, norm_kind="rms+1", norm_eps="eps", scales=("hidden_size",), must=_CAUSAL)
_GEMMA2 = replace(_GEMMA, **_SANDWICH, softcap="attn_logit_softcapping", logit_cap="final_logit_softcapping")
_OLMO2 = replace(LLAMA, **_AFTER, head_norms=_HEAD_NORMS, norm_over="heads")
_COHERE = replace(
    LLAMA,
    parallel=True,
    mlp_norm="",
    norm_kind="layer",
    rotary="interleaved",
    scales=("logit_scale",),
)
_GLM = replace(LLAMA, up=("gate_up_proj",), rotary="interleaved_halves")
_EXPERTS = replace(LLAMA, experts=("gate", "experts"), up=("gate_up_proj",))
_LAYER_NORMS = replace(LLAMA, norm_kind="layer", norm_eps="eps")
_GPT2 = replace(
    _LAYER_NORMS,
    base="transformer",
    layers="h",
    attention="attn",
    norm="ln_f",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("c_attn",),
    output="c_proj",
    up=("c_fc",),
    gated=False,
    down="c_proj",
    transposed=True,
    rotary="",
    sizes=("n_inner", ""),
    counts={"num_heads": "query", "split_size": "query_features"},
    dropouts=("attn_pdrop", "resid_pdrop"),
    must={"add_cross_attention": (False,)},
)
_BIG_CODE = replace(
    _LAYER_NORMS,
    up=("c_fc",),
    gated=False,
    down="c_proj",
    dropouts=("attention_dropout", "residual_dropout"),
)
_GROUPED = replace(
    _LAYER_NORMS,
    qkv=("query_key_value",),
    grouped=True,
    output="dense",
    up=("dense_h_to_4h",),
    gated=False,
    down="dense_4h_to_h",
    dropouts=("attention_dropout", "hidden_dropout"),
)


def _phi(config: Any) -> Anatomy:
    return replace(
        _LAYER_NORMS,
        norm="final_layernorm",
        output="dense",
        up=("fc1",),
        gated=False,
        down="fc2",
        head_norms=("q_layernorm", "k_layernorm") if config.qk_layernorm else (),
        mlp_norm="",
        parallel=True,
        dropouts=("attention_dropout", "resid_pdrop"),
    )


def _stablelm(config: Any) -> Anatomy:
    return replace(
        _LAYER_NORMS,
        mlp_norm="" if config.use_parallel_residual else "post_attention_layernorm",
        parallel=config.use_parallel_residual,
        counts={"num_heads": "query", "num_key_value_heads": "groups", "num_key_value_groups": "per_group"},
        dropouts=("attention_dropout", "hidden_dropout"),
        must={"qk_layernorm": (False,)},
    )


def _cohere(config: Any) -> Anatomy:
    return replace(_COHERE, head_norms=_HEAD_NORMS, norm_over="each") if config.use_qk_norm else _COHERE


def _neox(config: Any) -> Anatomy:
    return replace(
        _GROUPED,
        base="gpt_neox",
        attention="attention",
        norm="final_layer_norm",
        parallel=config.use_parallel_residual,
        sizes=("intermediate_size", ""),
        counts={},
    )


def _falcon(config: Any) -> Anatomy:
    several = config.num_kv_heads if config.new_decoder_architecture else config.num_attention_heads
    groups = 1 if config.multi_query and not config.new_decoder_architecture else several
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    return replace(
        _GROUPED,
        base="transformer",
        layers="h",
        attention="self_attention",
        norm="ln_f",
        scale="inv_norm_factor",
        attention_norm="ln_attn" if two else "input_layernorm",
        mlp_norm="ln_mlp" if two else "" if config.parallel_attn else "post_attention_layernorm",
        parallel=config.parallel_attn,
        pair=True,
        sizes=("ffn_hidden_size", ""),
        groups=groups,
        counts={"num_heads": "query", "num_kv_heads": "groups"},
        must={"alibi": (False,)} | ({"parallel_attn": (True,)} if config.new_decoder_architecture else {}),
    )


def _opt(config: Any) -> Anatomy:
    names = ("self_attn_layer_norm", "", "final_layer_norm", "")
    before = names if config.do_layer_norm_before else ("", names[0], "", names[2])
    attention_norm, attention_post, mlp_norm, mlp_post = before
    return replace(
        _LAYER_NORMS,
        base="model.decoder",
        mlp="",
        norm="final_layer_norm",
        output="out_proj",
        up=("fc1",),
        gated=False,
        down="fc2",
        rotary="",
        counted=True,
        attention_norm=attention_norm,
        attention_post=attention_post,
        mlp_norm=mlp_norm,
        mlp_post=mlp_post,
        stream_norms=not config.do_layer_norm_before,
        sizes=("ffn_dim", ""),
        counts={"num_heads": "query"},
        dropouts=("attention_dropout", "dropout", "layerdrop"),
    )


LIKE_KEY = "flextron_like"  # in config.json: the family whose row serves one that is not in the table
# Rows by `model_type`; a row that depends on the configuration is a function of it.
FAMILIES: dict[str, Anatomy | Callable[[Any], Anatomy]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": replace(LLAMA, head_norms=_HEAD_NORMS),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, head_norms=_HEAD_NORMS, softcap="", table_of_type=True),
    "arcee": replace(LLAMA, up=("up_proj",), gated=False),
    "granite": replace(
        LLAMA,
        multiplier="residual_multiplier",
        scales=("embedding_multiplier", "residual_multiplier", "logits_scaling"),
    ),
    "smollm3": replace(LLAMA, unrotated="no_rope_layers"),
    "hunyuan_v1_dense": replace(LLAMA, head_norms=("query_layernorm", "key_layernorm"), norm_last=True),
    "phi": _phi,
    "phi3": replace(
        LLAMA,
        qkv=("qkv_proj",),
        up=("gate_up_proj",),
        counts={
            "num_key_value_heads": "groups",
            "num_key_value_groups": "per_group",
            "config.num_attention_heads": "query",
        },
        dropouts=("attention_dropout", "resid_pdrop"),
    ),
    "olmo": replace(LLAMA, norm_kind="layer", norm_eps="", clip="clip_qkv"),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, table_of_type=True),
    "exaone4": replace(LLAMA, **_AFTER, head_norms=_HEAD_NORMS, unrotated="full"),
    "cohere": _cohere,
    "cohere2": replace(_COHERE, unrotated="unwindowed"),
    "helium": replace(LLAMA, rotary="interleaved_halves"),
    "glm": _GLM,
    "glm4": replace(_GLM, attention_post="post_self_attn_layernorm", mlp_post="post_mlp_layernorm"),
    "nemotron": replace(LLAMA, norm_kind="layer+1", norm_eps="eps", up=("up_proj",), gated=False),
    "starcoder2": _BIG_CODE,
    "stablelm": _stablelm,
    "gpt2": _GPT2,
    "gpt_neox": _neox,
    "gptj": replace(
        _GPT2,
        qkv=LLAMA.qkv,
        output="out_proj",
        up=("fc_in",),
        down="fc_out",
        transposed=False,
        rotary="interleaved_sin_first",
        mlp_norm="",
        parallel=True,
        counts={},
        must={},
    ),
    "opt": _opt,
    "falcon": _falcon,
    "mixtral": replace(_EXPERTS, must={"router_jitter_noise": (0.0,)}),
    "qwen3_moe": replace(
        _EXPERTS,
        head_norms=_HEAD_NORMS,
        sizes=("moe_intermediate_size", "num_key_value_heads"),
        must={"mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
    ),
    "olmoe": replace(_EXPERTS, head_norms=_HEAD_NORMS, norm_over="heads", clip="clip_qkv"),
    "gpt_oss": replace(
        _EXPERTS, experts=("router", "experts"), paired=True, sinks="sinks", rotary="half_once"
    ),
}


def stop_dropping(config: PreTrainedConfig) -> dict[str, float]:
    """Set what a configuration drops inside layers to 0, since elastic layers drop nothing; what it was, by name."""
    dropped = {name: p for name in anatomy_of(config).dropouts if (p := getattr(config, name, 0.0))}
    for name in dropped:
        setattr(config, name, 0.0)
    return dropped


_ONE_HEAD_SIZE = ("gpt2", "gptj", "gpt_neox", "opt", "falcon", "stablelm", "olmoe", "helium")


def row_of(config: ElasticConfig) -> str:
    """The family of the table whose layers a model has."""
    return config.like or config.family


def has_one_head_size(config: ElasticConfig) -> bool:
    """Whether a family takes the head size from the number of heads, so that its configuration can say no other."""
    return row_of(config) in _ONE_HEAD_SIZE or (row_of(config) == "phi" and config.qk_norm)


def normalises_all_heads(config: ElasticConfig) -> bool:
    """Whether a norm runs over all heads of a token, so that more heads of zeros would change it."""
    row = FAMILIES[row_of(config)]
    return isinstance(row, Anatomy) and row.norm_over == "heads"


def like_of(config: PreTrainedConfig) -> str:
    """The family whose row serves a configuration that has none of its own, as it says; empty where it says none."""
    like = getattr(config, LIKE_KEY, "")
    return like if config.model_type not in FAMILIES and isinstance(like, str) else ""


def liken(config: PreTrainedConfig, like: str | None) -> None:
    """Let a configuration say that its layers are those of the family ``like``; None leaves it as it is.

    Raises:
        ValueError: the table has no such family, or one for the configuration itself.
    """
    if like is None:
        return
    if like not in FAMILIES:
        raise ValueError(f"convert: like must be one of {', '.join(FAMILIES)}, got {like!r}")
    if config.model_type in FAMILIES:
        raise ValueError(
            f"convert: like must be None for a {config.model_type}, which the table of families has, got {like!r}"
        )
    setattr(config, LIKE_KEY, like)


def anatomy_of(config: PreTrainedConfig) -> Anatomy:
    """The row of a transformers configuration.

    Raises:
        NotImplementedError: its family is not in the table, or a field has a value that is not supported.
    """
    model_type = getattr(config, "model_type", None)
    family = like_of(config) or model_type
    if family not in FAMILIES:
        raise NotImplementedError(
            f"flextron: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}; --like FAMILY (like=) "
            "converts it by the row of one that is built alike, if that is proven"
        )
    row = FAMILIES[family]
    anatomy = row if isinstance(row, Anatomy) else row(config)
    for name, values in anatomy.must.items():
        if getattr(config, name, values[0]) not in values:
            wanted = " or ".join(map(repr, values))
            raise NotImplementedError(
                f"flextron: {name} of a {model_type} must be {wanted}, got {getattr(config, name)!r}"
            )
    return anatomy
