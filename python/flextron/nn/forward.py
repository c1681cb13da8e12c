"""All layers of an elastic model as one op: what forward takes on a CPU, in inference, of prompts and of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from flextron.config import ElasticConfig
from flextron.nn.cache import ElasticCache
from flextron.nn.masks import first_keys, is_left_padded
from flextron.nn.packed import PackedLinear
from flextron.nn.policy import PerRequest, PerToken
from flextron_ext import HeldForward

_PACKED = ("panels", "scales")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# transformers' own hooks, which stay once hidden states were asked for; they act when asked again
_RECORDER = "transformers.utils.output_capturing"
_TAKEN = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache",
    "logits_to_keep",
    "use_cache",
    "return_dict",
)


class Used(NamedTuple):
    """What each layer keeps, in the op's order: of all, of each sequence, or as a router chooses for each token."""

    widths: Sequence[int]
    heads: Sequence[int]
    kv_heads: Sequence[int]
    router: tuple[Tensor, ...] | None = None
    mlp_choices: Sequence[int] | None = None
    head_choices: Sequence[int] | None = None


class ElasticForward:
    """The weights of a model, gathered and handed to the op once; `holds` says whether they are still the model's.

    Gathering them by attribute takes half a millisecond of Python for 30 layers, a tenth of the smallest step.
    """

    def __init__(self, model: Any) -> None:
        self.found: list[tuple[dict[str, Any], str, Tensor]] = []
        self.hooks: list[dict[int, Any]] = []
        self.parts: list[str] = []
        self.weights: list[Tensor] = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.parts = []
            for name, module in (
                ("in_norm", layer.input_layernorm),
                ("q", attention.q_proj),
                ("k", attention.k_proj),
                ("v", attention.v_proj),
                ("o", attention.o_proj),
                ("q_norm", attention.q_norm),
                ("k_norm", attention.k_norm),
                ("mlp_norm", layer.post_attention_layernorm),
                ("gate", mlp.gate_proj),
                ("up", mlp.up_proj),
                ("down", mlp.down_proj),
            ):
                if module is not None:
                    self._add(name, module)
            for module in (layer, attention, mlp, layer.input_layernorm, layer.post_attention_layernorm):
                self._watch(module)
            if attention.q_norm is not None:
                self._watch(attention.q_norm)
                self._watch(attention.k_norm)
        embed = model.model.embed_tokens
        for module in (model.model, embed, model.model.norm, model.lm_head):
            self._watch(module)
        self.embedding = self._find(embed, "weight")
        self.norm = self._find(model.model.norm, "weight")
        self.head, self.head_scales = self._weight(model.lm_head)
        self.eps = model.model.norm.variance_epsilon
        self.modules = [(layer.self_attn, layer.mlp) for layer in model.model.layers]
        self.dtype = self.norm.dtype
        self.held: HeldForward | None = None  # until it is called
        self.places = [tensor.data_ptr() for _, _, tensor in self.found]
        tensors = [tensor for owner, name, tensor in self.found if name not in _PACKED]
        self.serves = (
            self.dtype in _DTYPES
            and all(t.dtype == self.dtype and t.device.type == "cpu" for t in tensors)
            and getattr(model.lm_head, "bias", None) is None
            and type(embed) is nn.Embedding
            and embed.max_norm is None
            and self.embedding.is_contiguous()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the model gathers its own

    @classmethod
    def of(cls, model: Any) -> ElasticForward:
        """The model's own, made anew where its weights are others."""
        step = model.__dict__.get("_elastic_forward")
        if step is None or not step.holds():
            step = model.__dict__["_elastic_forward"] = cls(model)
        return step

    def _find(self, module: nn.Module, name: str) -> Tensor:
        owner = module._buffers if name in _PACKED else module._parameters
        self.found.append((owner, name, owner[name]))
        return owner[name]

    def _weight(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """A weight, or its panels and their scales."""
        if not isinstance(module, PackedLinear):
            return self._find(module, "weight"), None
        return self._find(module, "panels"), None if module.scales is None else self._find(module, "scales")

    def _add(self, part: str, module: nn.Module) -> None:
        weight, scales = self._weight(module)
        given = {part: weight, f"{part}_scales": scales}
        for name, bias in ((part, "bias"), ("gate", "gate_bias")):
            if module._parameters.get(bias) is not None:
                given[f"{name}_bias"] = self._find(module, bias)
        for name, tensor in given.items():
            if tensor is not None:
                self.weights.append(tensor)
                self.parts.append(name)

    def _watch(self, module: nn.Module) -> None:
        self.hooks += [module._forward_hooks, module._forward_pre_hooks]

    def is_watched(self) -> bool:
        """Whether somebody's hook waits for a module that a step does not call."""
        return any(hook.__module__ != _RECORDER for hooks in self.hooks if hooks for hook in hooks.values())

    def used(self, model: Any, B: int) -> Used | None:
        """What the layers keep of B sequences; None where the modules must run."""
        if not self.serves or self.is_watched():
            return None
        config, setting = model.elastic, model.settings.now()
        policies, kv_heads = setting.policies, setting.kv_heads
        if all(policy is None for policy in policies):
            return Used(setting.widths.mlp, setting.widths.heads, kv_heads)
        if all(isinstance(policy, PerRequest) for policy in policies):
            each, rest = divmod(B, len(policies[0].mlp))
            if rest:
                return None
            return Used(
                [n for policy in policies for n in policy.mlp.tolist() for _ in range(each)],
                [n for policy in policies for n in policy.heads.tolist() for _ in range(each)],
                kv_heads,
            )
        if all(isinstance(policy, PerToken) for policy in policies) and setting.seen is None:
            router, (state, base) = policies[0].router, policies[0].contexts
            if B % base.shape[1]:
                return None
            menus = config.mlp_choices, config.head_choices
            return Used((), (), kv_heads, (router.w1, router.w2, state, base), *menus)
        return None

    def holds(self) -> bool:
        return all(
            owner.get(name) is tensor and tensor.data_ptr() == place
            for (owner, name, tensor), place in zip(self.found, self.places, strict=True)
        )

    def _hold(self, config: ElasticConfig) -> HeldForward:
        attention, mlp = self.modules[0]
        return HeldForward(
            self.embedding,
            self.weights,
            " ".join(self.parts),
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            self.norm,
            self.head,
            self.head_scales,
            self.eps,
            config.unit,
            mlp.activation,
            attention.scaling,
        )

    def __call__(
        self,
        model: Any,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: ElasticCache | None,
        k_start: Tensor | None,
        keep: int,
        used: Used,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, keep, V], and where the last token's are greatest, [B]."""
        config, (B, T) = model.elastic, ids.shape
        if self.held is None:
            self.held = self._hold(config)
        if cache is not None:
            cached = cache.get_seq_length()
            keys, values = cache.reserve(self.norm, B, T, used.kv_heads, config.head_dim)
        else:  # a layer's keys and values are read by the layer alone: one room serves all
            cached, layers = 0, len(used.kv_heads)
            room = self.norm.new_empty(2, B, max(used.kv_heads), T, config.head_dim).transpose(2, 3)
            keys, values = [room[0]] * layers, [room[1]] * layers
        result = self.held(ids, cos, sin, keys, values, cached, *used[:3], keep, k_start, *used[3:])
        if cache is not None:
            cache.advance(T, used.kv_heads)
        return result


def try_forward(model: Any, arguments: dict[str, Any]) -> CausalLMOutputWithPast | None:
    """The output of a causal LM's forward by `elastic_forward`, or None where its modules must run."""
    ids, cache = arguments.get("input_ids"), arguments.get("cache")
    if ids is None or ids.numel() == 0:
        return None
    if wants_cache(model, arguments) if cache is None else not isinstance(cache, ElasticCache):
        return None
    if torch.is_grad_enabled() or ids.device.type != "cpu":
        return None
    if any(value is not None for name, value in arguments.items() if name not in _TAKEN):
        return None
    keep, config = arguments.get("logits_to_keep", 0), model.config
    plain = (
        arguments.get("return_dict") is not False and config.return_dict and not config.output_hidden_states
    )
    if not plain or not isinstance(keep, int) or torch.is_autocast_enabled("cpu"):
        return None
    step = ElasticForward.of(model)
    used = step.used(model, ids.shape[0])
    if used is None or (cache is not None and not _ready(cache, ids, step)):
        return None

    past, T = 0 if cache is None else cache.get_seq_length(), ids.shape[1]
    mask, k_start = arguments.get("attention_mask"), None
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
    cos, sin = model.model.rotary_emb(step.norm, positions)
    keep = T if keep == 0 else min(keep, T)
    logits, _ = step(model, ids, cos, sin, cache, k_start, keep, used)
    return CausalLMOutputWithPast(logits=logits, cache=cache)


def wants_cache(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether a forward with these arguments is to cache its tokens."""
    asked = arguments.get("use_cache")
    return model.config.use_cache if asked is None else asked


def _ready(cache: ElasticCache, ids: Tensor, step: ElasticForward) -> bool:
    """Whether every layer has cached the same tokens of these sequences, in the weights' dtype; or none any."""
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
