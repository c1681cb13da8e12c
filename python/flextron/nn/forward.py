"""All layers of an elastic model as one op: what forward takes on a CPU, in inference, of prompts and of new tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import contains, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from transformers.modeling_outputs import CausalLMOutputWithPast

from flextron.config import ElasticConfig
from flextron.nn.anatomy import Anatomy
from flextron.nn.cache import ElasticCache
from flextron.nn.elastic_attention import ElasticAttention
from flextron.nn.elastic_mlp import ElasticMLP
from flextron.nn.masks import first_keys, is_left_padded
from flextron.nn.projection import RECORDER, PackedLinear, PackedRows, is_alone, rows_of
from flextron.nn.protocol import Elastic
from flextron.nn.rotary import once, rotary_of
from flextron_ext import Decoder, DecoderShape, DecoderStep

NORMS = ("in_norm", "attention_post", "mlp_norm", "mlp_post", "q_norm", "k_norm")
UNSAID_EPS = 1e-5  # in transformers' OLMo
FORWARD = "_decoder"  # the attribute of a model that keeps its `ElasticForward`
_END = object()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TAKEN = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache",
    "logits_to_keep",
    "use_cache",
    "return_dict",
)


class _Part(NamedTuple):
    """What the decoder op has a name for: a module, or those of a projection's outputs that it has beside others."""

    module: Any
    rows: slice | None = None


def _of_layer(a: Anatomy) -> dict[str, tuple[str, str]]:
    """The same in each layer of a family that the decoder op computes; a projection may stand for several."""
    q, k, v = a.qkv if len(a.qkv) == 3 else 3 * a.qkv
    qkv = {"qkv": q} if a.grouped else {"q": q, "k": k, "v": v}
    up = a.up if len(a.up) == 1 + a.gated else 2 * a.up
    norms = dict(zip(("q_norm", "k_norm"), a.head_norms, strict=False))
    return {
        "in_norm": ("", a.attention_norm),
        "attention_post": ("", a.attention_post),
        **{name: (a.attention, projection) for name, projection in qkv.items()},
        "o": (a.attention, a.output),
        **{name: (a.attention, norm) for name, norm in norms.items()},
        "mlp_norm": ("", a.mlp_norm),
        "mlp_post": ("", a.mlp_post),
        **dict(zip(("gate", "up")[-len(up) :], ((a.mlp, name) for name in up), strict=True)),
        "down": (a.mlp, a.down),
    }


class _Snapshot:
    """The modules, parameters and buffers of a model at one moment, and the addresses of its tensors.

    Modules keep them in dicts of their own. `holds` compares these dicts' values by identity, at the speed of C: 500
    values in 30 layers, before each forward. torch has no counter that says whether a module was changed.
    """

    def __init__(self, model: Elastic) -> None:
        inner: Any = model.base_model
        layers = (part for layer in model.decoder_layers for part in layer.modules())
        # the rotary tables are made by their own module here too
        own = [part for name, part in inner.named_children() if name != "rotary_emb"]
        modules: list[nn.Module] = list(dict.fromkeys((inner, *layers, *own, model.lm_head)))
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        whole: list[Any] = [model, *modules]
        self.dicts = [d for m in whole for d in (m._modules, m._parameters, m._buffers) if d]
        self.values = [*chain.from_iterable(map(dict.values, self.dicts)), _END]
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        self.parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        self.places = list(map(Tensor.data_ptr, self.tensors))
        self.attributes = [m.__dict__ for m in modules]
        self.replaced = self._replaced()

    def _replaced(self) -> bool:
        """Whether some module's forward was replaced."""
        return any(map(contains, self.attributes, repeat("forward")))

    def holds(self) -> bool:
        values = chain(chain.from_iterable(map(dict.values, self.dicts)), (_END,))
        return (
            all(map(is_, values, self.values))
            and list(map(Tensor.data_ptr, self.tensors)) == self.places
            and self._replaced() == self.replaced
        )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is on, which only the modules support."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_known(method: Callable[..., Any]) -> bool:
    """Whether a method of a model's class is transformers' or torch's own, so that its behaviour is known."""
    return method.__module__.startswith(("transformers.", "torch."))


def _is_stock(module: nn.Module) -> bool:
    """Whether a module's class is transformers' own."""
    return type(module).__module__.startswith("transformers.models.")


def _is_norm(module: nn.Module, a: Anatomy) -> bool:
    known = _is_stock(module) or type(module) is nn.LayerNorm
    return known and ("weight" in module._parameters or not a.norm_eps)


def _eps_of(norm: nn.Module, a: Anatomy) -> Any:
    """What a norm adds to the mean square; None where it does not say."""
    return getattr(norm, a.norm_eps, None) if a.norm_eps else UNSAID_EPS


def _is_embedding(module: Any, a: Anatomy) -> bool:
    """Whether a module looks tokens up, and multiplies them by its root of the hidden size where the family does."""
    is_scaled = "hidden_size" in a.scales
    known = (
        _is_stock(module) and "embed_scale" in module._buffers if is_scaled else type(module) is nn.Embedding
    )
    return known and module.max_norm is None and "weight" in module._parameters


def runs_on(device: torch.device) -> bool:
    """Whether the decoder op computes on this device."""
    return device.type == "cpu"


def _parts_of(layer: nn.Module, a: Anatomy) -> dict[str, _Part] | None:
    """The parts of a layer by the decoder's names, or None where one is not what the op computes."""
    attention, mlp = layer._modules.get(a.attention), layer._modules.get(a.mlp)
    if not _is_stock(layer) or type(attention) is not ElasticAttention or type(mlp) is not ElasticMLP:
        return None
    places = _of_layer(a)
    modules = _modules_of({"": layer, a.attention: attention, a.mlp: mlp}, places)
    parts = {name: _Part(module) for name, module in modules.items()}
    if len(a.qkv) == 1 and not a.grouped:
        parts |= {
            name: _of_fused(parts[name], rows) for name, rows in zip("qkv", attention.rows(), strict=True)
        }
    if a.gated and len(a.up) == 1:
        gate, up, _ = mlp._parts()
        parts |= {"gate": _Part(*gate), "up": _Part(*up)}
        if gate[0] is None:  # its panels are among those of up
            del parts["gate"]
    known = {*attention._modules, *mlp._modules} <= {name for _, name in places.values()}
    understood = known and all(
        _is_norm(part.module, a) if name in NORMS else is_alone(part.module) for name, part in parts.items()
    )
    return parts if understood else None


def _of_fused(part: _Part, rows: slice) -> _Part:
    """The part that has these rows of a projection of queries, keys and values."""
    module = part.module
    return _Part(module.part(rows)) if isinstance(module, PackedRows) else _Part(module, rows)


def _modules_of(owners: dict[str, Any], places: dict[str, tuple[str, str]]) -> dict[str, nn.Module]:
    """The modules that are there, by the decoder's names."""
    found = {part: owners[owner]._modules.get(name) for part, (owner, name) in places.items()}
    return {part: module for part, module in found.items() if module is not None}


def _is_one(
    norm: nn.Module,
    a: Anatomy,
    layers: Sequence[dict[str, _Part]],
    modules: Sequence[tuple[ElasticAttention, ElasticMLP]],
) -> bool:
    """Whether what the op takes once for all layers is the same in all: the norms' epsilon and attention's scale."""
    norms = (part.module for parts in layers for name, part in parts.items() if name in NORMS)
    eps = {_eps_of(each, a) for each in (norm, *norms)}
    return len(eps) == 1 and None not in eps and len({attention.scaling for attention, _ in modules}) == 1


class ElasticForward:
    """The weights of a model, gathered and handed to the op once; `snapshot` says whether they still are the model's.

    Gathering them by attribute takes half a millisecond of Python for 30 layers, a tenth of the smallest step.
    A model with a module that does more than the op would in its place (another class, adapters) is not served.
    """

    def __init__(self, model: Elastic) -> None:
        self.decoder: Decoder | None = None  # until it is called
        self.snapshot: _Snapshot | None = None
        self.fault = model.anatomy.decoder_fault(model.config)
        self.serves = self.fault is None and self._serves(model)

    def _serves(self, model: Elastic) -> bool:
        """Whether every module of a model of a family that the op computes is what it should be."""
        a = model.anatomy
        embed, norm, head = model.get_input_embeddings(), model.base_model._modules[a.norm], model.lm_head
        layers: list[Any] = [_parts_of(layer, a) for layer in model.decoder_layers]
        self.modules = [
            (layer._modules.get(a.attention), layer._modules.get(a.mlp)) for layer in model.decoder_layers
        ]
        self.snapshot = _Snapshot(model)
        self.dropouts = [module for module in model.base_model.children() if isinstance(module, nn.Dropout)]
        return (
            not self.snapshot.replaced
            and _is_embedding(embed, a)
            and is_alone(head)
            and _is_stock(model.base_model)
            and _is_norm(norm, a)
            and None not in layers
            and _is_one(norm, a, layers, self.modules)
            and self._gather(model, dict(embedding=embed, norm=norm, head=head), layers)
        )

    def _gather(self, model: Elastic, whole: dict[str, Any], layers: Sequence[dict[str, Any]]) -> bool:
        """Find the weights; False where the op does not take them."""
        a, embedding = model.anatomy, whole["embedding"].weight
        self.weights = _weights(whole, layers, embedding)
        self.norm, self.eps = self.weights["norm"], _eps_of(whole["norm"], a)
        self.format = whole["head"].format if isinstance(whole["head"], PackedLinear) else "plain"
        self.dtype = self.norm.dtype
        self.kind = a.decoder_kind(model.config)
        if "hidden_size" in a.scales:  # the embedding's own root, as it rounds it
            self.kind["embedding_scale"] = float(whole["embedding"].embed_scale.to(self.dtype))
        self.tables = _tables_of(model)
        assert self.snapshot is not None
        return (
            self.dtype in _DTYPES
            and all(p.dtype == self.dtype and p.device == self.norm.device for p in self.snapshot.parameters)
            and all(isinstance(w, Tensor) or len(w) == len(layers) for w in self.weights.values())
            and embedding.is_contiguous()
        )

    @classmethod
    def of(cls, model: Elastic) -> ElasticForward:
        """The one that the model keeps, made again where its weights were replaced."""
        step = model.__dict__.get(FORWARD)
        if step is None or not (step.snapshot is None or step.snapshot.holds()):
            step = model.__dict__[FORWARD] = cls(model)
        return step

    def is_watched(self) -> bool:
        """Whether there is a hook on a module that a step does not call."""
        hooks = [] if self.snapshot is None else self.snapshot.hooks
        return any(hooks) and any(hook.__module__ != RECORDER for each in hooks for hook in each.values())

    def drops(self) -> bool:
        """Whether embeddings are dropped, as some families do in training."""
        return any(module.training and module.p > 0 for module in self.dropouts)

    def extents(self, model: Elastic, B: int) -> DecoderStep | None:
        """What the op keeps of B sequences; None where the modules must run."""
        if not self.serves or not runs_on(self.norm.device) or self.is_watched() or self.drops():
            return None
        return model.settings.now().extents(B)

    def _hold(self, config: ElasticConfig) -> Decoder:
        attention, mlp = self.modules[0]
        shape = DecoderShape(
            layers=len(self.modules),
            neurons=config.intermediate_size,
            query_heads=config.num_heads,
            groups=config.num_kv_heads,
            head_size=config.head_dim,
            eps=self.eps,
            scale=attention.scaling,
            unit=config.unit,
            activation=mlp.activation,
            format=self.format,
            **self.kind,
        )
        return Decoder(self.weights, shape)

    def __call__(
        self,
        model: Elastic,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: ElasticCache | None,
        k_start: Tensor | None,
        keep: int,
        extents: DecoderStep,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, keep, V], and where the last token's are greatest, [B]."""
        config, (B, T) = model.elastic, ids.shape
        if self.decoder is None:
            self.decoder = self._hold(config)
        if cache is not None:
            cached = cache.get_seq_length()
            keys, values = cache.reserve(self.norm, B, T, extents.kv_heads, config.head_dim)
        else:  # a layer's keys and values are read by the layer alone: one room serves all
            cached, layers = 0, len(extents.kv_heads)
            room = self.norm.new_empty(2, B, max(extents.kv_heads), T, config.head_dim).transpose(2, 3)
            keys, values = [room[0]] * layers, [room[1]] * layers
        result = self.decoder.step(ids, cos, sin, keys, values, cached, extents, keep, k_start)
        if cache is not None:
            cache.advance(T, extents.kv_heads)
        return result


def _tensors(name: str, part: _Part, ones: Tensor) -> dict[str, Tensor]:
    """A part's tensors by the decoder's names."""
    module, rows = part
    if isinstance(module, PackedLinear):
        tensors = {name: module.panels, f"{name}_scales": module.scales, f"{name}_bias": module.bias}
        if name == "up":
            tensors["gate_bias"] = module.gate_bias  # packed with up
    else:
        weight, bias = getattr(module, "weight", ones), getattr(module, "bias", None)
        if rows is not None:  # a view, which must not ask for a gradient
            weight, bias = (
                rows_of(tensor.detach(), rows) if tensor is not None else None for tensor in (weight, bias)
            )
        tensors = {name: weight, f"{name}_bias": bias}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _weights(whole: dict[str, nn.Module], layers: Sequence[dict[str, _Part]], like: Tensor) -> dict[str, Any]:
    """The decoder's weights: one tensor for each name of the model, a list for each name of its layers."""
    ones = like.new_ones(like.shape[1])  # of norms that have no weight
    weights: dict[str, Any] = {}
    for name, module in whole.items():
        weights |= _tensors(name, _Part(module), ones)
    for layer in layers:
        for name, part in layer.items():
            for each, tensor in _tensors(name, part, ones).items():
                weights.setdefault(each, []).append(tensor)
    return weights


def _tables_of(model: Elastic) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What makes the rotary embedding's tables of positions, cos and sin [B or 1, T, R]; several side by side."""
    a, rotary = model.anatomy, rotary_of(model, model.anatomy)
    kinds = a.rotations(model.config)

    def tables(like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if a.table_of_type:
            every = [rotary(like, positions, kind) for kind in kinds]
            cos, sin = (torch.cat(each, -1) for each in zip(*every, strict=True))
        else:
            cos, sin = rotary(like, positions)
        if a.turns_pairs:
            cos, sin = (t.repeat_interleave(2, -1) for t in once(a.rotary, cos, sin))
        return cos.to(like.dtype), sin.to(like.dtype)  # OLMo's are float32

    return tables


def try_forward(model: Elastic, arguments: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """The output of a causal LM's forward by the decoder op, or None where its modules must run."""
    ids, cache = arguments.get("input_ids"), arguments.get("cache")
    mask, k_start = arguments.get("attention_mask"), None
    if ids is None or ids.numel() == 0 or not (mask is None or isinstance(mask, Tensor)):
        return None
    if wants_cache(model, arguments) if cache is None else type(cache) is not ElasticCache:
        return None
    if torch.is_grad_enabled() or not runs_on(ids.device) or is_transformed():
        return None
    if any(value is not None for name, value in arguments.items() if name not in _TAKEN):
        return None
    keep, config = arguments.get("logits_to_keep", 0), model.config
    plain = (
        arguments.get("return_dict") is not False and config.return_dict and not config.output_hidden_states
    )
    if not plain or not isinstance(keep, int) or keep < 0 or torch.is_autocast_enabled("cpu"):
        return None
    step = ElasticForward.of(model)
    extents = step.extents(model, ids.shape[0])
    if extents is None or (cache is not None and not _ready(cache, ids, step)):
        return None

    past, T = 0 if cache is None else cache.get_seq_length(), ids.shape[1]
    if mask is not None:
        if mask.shape != (ids.shape[0], past + T) or not is_left_padded(mask):
            return None
        if not mask.all():
            k_start = first_keys(mask)
    positions = arguments.get("position_ids")
    if positions is not None and mask is None and cache is None and (positions.diff(dim=-1) != 1).any():
        return None  # packed sequences
    if positions is None:
        positions = torch.arange(past, past + T)[None]
    cos, sin = step.tables(step.norm, positions)
    keep = T if keep == 0 else min(keep, T)
    logits, _ = step(model, ids, cos, sin, cache, k_start, keep, extents)
    return CausalLMOutputWithPast(logits=logits, cache=cache)


def wants_cache(model: Elastic, arguments: dict[str, Any]) -> bool:
    """Whether a forward with these arguments is to cache its tokens."""
    asked = arguments.get("use_cache")
    return model.config.use_cache if asked is None else asked


def _ready(cache: ElasticCache, ids: Tensor, step: ElasticForward) -> bool:
    """Whether every layer has cached the same tokens of these sequences in the weights' dtype, or nothing at all."""
    layers, length = cache.layers, cache.get_seq_length()
    if length == 0:
        return all(layer.length == 0 for layer in layers)
    B, dtype = ids.shape[0], step.dtype
    return len(layers) == len(step.modules) and all(
        layer.length == length
        and layer.keys.dtype == dtype
        and layer.keys.shape[0] == B
        and not layer.keys.requires_grad
        for layer in layers
    )
