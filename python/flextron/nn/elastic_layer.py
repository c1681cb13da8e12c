"""A decoder layer that decides what each token keeps of it, and hands the decision to its attention and its MLP."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from flextron.config import ElasticConfig
from flextron.nn.anatomy import Anatomy
from flextron.nn.elastic_attention import ElasticAttention
from flextron.nn.elastic_experts import ElasticExperts
from flextron.nn.elastic_mlp import ElasticMLP
from flextron.nn.mixin import Mixin, mixed
from flextron.nn.projection import goes_on
from flextron.nn.setting import Settings


class ElasticLayer(NamedTuple):
    """The two parts of a layer that keep to the budget."""

    attention: ElasticAttention
    mlp: ElasticMLP


class ElasticDecoderLayer(Mixin, GradientCheckpointingLayer):
    """Goes in front of a family's own layer class: transformers records hidden states of instances of that class.

    ``h = x + attention(norm(x))``, ``y = h + mlp(norm(h))``, with the norms, and in the order, of the family's anatomy.
    A part of which no token keeps anything is skipped, and the norms round it are.
    """

    arguments: tuple[str, ...]  # names of the family's layer's, after the hidden states

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        return {"arguments": tuple(inspect.signature(stock.forward).parameters)[2:]}

    def __init__(
        self,
        layer: nn.Module,
        mlp: ElasticMLP,
        anatomy: Anatomy,
        settings: Settings,
        layer_idx: int,
    ) -> None:
        self.__dict__.update(layer.__dict__)  # its modules, hooks and flags (gradient checkpointing)
        self.anatomy, self.settings, self.layer_idx = anatomy, settings, layer_idx
        if not anatomy.mlp:  # no module of the layer, for its projections are the layer's own
            object.__setattr__(self, "elastic_mlp", mlp)
            object.__setattr__(mlp, "layer", self)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [B, T, K]; the other arguments are those of the family's layer, handed on to attention."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        if "layer_past" in given:  # GPT-NeoX's and Falcon's name of it
            given["cache"] = given.pop("layer_past")
        a, setting, cache = self.anatomy, self.settings.now(), given.get("cache")
        attention, mlp = parts_of(a, self)
        has_cache = cache is not None or getattr(attention, "host", None) is not None
        stores = has_cache and setting.kv_heads[self.layer_idx] > 0
        attends = stores or setting.widths.heads[self.layer_idx] > 0
        feeds = setting.widths.mlp[self.layer_idx] > 0
        shared = a.parallel and not a.mlp_norm  # the MLP reads what attention does

        x = result = hidden_states
        if attends or (feeds and shared) or setting.policy is not None:
            x = self._norm(a.attention_norm, hidden_states)
        decision = setting.decide(x, self.layer_idx)
        if attends:
            out, _ = attention(hidden_states=x, setting=setting, decision=decision.heads, **given)
            result = self._added(hidden_states, out, a.attention_post)
        else:
            attention.pass_over(hidden_states, cache)
        if feeds:
            x = x if shared else self._norm(a.mlp_norm, hidden_states if a.parallel else result)
            result = self._added(result, mlp(x, setting, decision.mlp), a.mlp_post)
        if torch.is_grad_enabled() and not (attends and feeds):
            result = result + self._untouched(hidden_states, attends, feeds)
        return (result, None) if a.pair else result

    def _untouched(self, x: Tensor, attends: bool, feeds: bool) -> Tensor:
        """A zero of x's dtype, by which the parameters of what is skipped get a gradient of zeros.

        As those beyond a width do: processes that skip different parts average the gradients of all.
        """
        a = self.anatomy
        attention, mlp = parts_of(a, self)
        zeros = [x.new_zeros(())]
        for runs, weights, names in (
            (attends, attention.parameters, (a.attention_norm, a.attention_post)),
            (feeds, mlp.weights, (a.mlp_norm, a.mlp_post)),
        ):
            norms = [p for name in names if name for p in self._modules[name].parameters()]
            zeros += [
                p[:0].sum().to(x.dtype) for p in ([] if runs else [*weights(), *norms]) if p.requires_grad
            ]
        return torch.stack(zeros).sum()

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self._modules[name](x) if name else x

    def _added(self, stream: Tensor, out: Tensor, norm: str) -> Tensor:
        """What a part gives, in the stream."""
        a = self.anatomy
        if a.stream_norms:
            return self._norm(norm, stream + out)
        out = self._norm(norm, out)
        return stream + (out * getattr(self, a.multiplier) if a.multiplier else out)


def parts_of(anatomy: Anatomy, layer: Any) -> ElasticLayer:
    """The two parts of an elastic layer as they are now: a module may have been put in the place of one."""
    mlp: Any = getattr(layer, anatomy.mlp) if anatomy.mlp else getattr(layer, "elastic_mlp", None)
    return ElasticLayer(getattr(layer, anatomy.attention), mlp)


def make_layer_elastic(
    layer: Any,
    anatomy: Anatomy,
    hf_config: PreTrainedConfig,
    activation: str,
    config: ElasticConfig,
    settings: Settings,
    layer_idx: int,
) -> nn.Module:
    """The layer to put in the place of a transformers one, whose attention and MLP are replaced by elastic ones.

    A layer with a forward that is not transformers' stays and goes on calling its parts. It hands them no decision,
    so only budgets at which every token has the same widths can be set.
    """
    own = (config, settings, layer_idx)
    attention = ElasticAttention(anatomy.attention_in(layer), anatomy, hf_config, *own)
    kind = ElasticExperts if anatomy.experts else ElasticMLP
    mlp = kind(anatomy.mlp_in(layer), anatomy, activation, *own)
    setattr(layer, anatomy.attention, attention)
    if anatomy.mlp:
        setattr(layer, anatomy.mlp, mlp)
    stock, made = type(layer), (mlp, anatomy, settings, layer_idx)
    if not stock.__module__.startswith("transformers.models."):
        return layer
    if "forward" not in layer.__dict__:
        return mixed(ElasticDecoderLayer, stock)(layer, *made)
    if not goes_on(layer):
        return layer
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hook = layer._hf_hook  # its forward is called in the place of the layer's own, so it is put on again
    remove_hook_from_module(layer)
    del layer.forward
    return add_hook_to_module(mixed(ElasticDecoderLayer, stock)(layer, *made), hook)
