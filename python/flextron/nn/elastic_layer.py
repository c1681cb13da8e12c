"""A decoder layer that decides what each token keeps of it, and hands the decision to its attention and its MLP."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flextron.config import ElasticConfig
from flextron.nn.elastic_attention import ElasticAttention
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

    ``h = x + attention(norm(x))``, ``y = h + mlp(norm(h))``: the pre-norm layer of Llama, Mistral, Qwen2 and Qwen3.
    """

    def __init__(self, layer: nn.Module, settings: Settings, layer_idx: int) -> None:
        self.__dict__.update(layer.__dict__)  # its modules, hooks and flags (gradient checkpointing)
        self.settings, self.layer_idx = settings, layer_idx

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """hidden_states [B, T, K]; the other arguments are the attention's."""
        x = self.input_layernorm(hidden_states)
        setting = self.settings.now()
        decision = setting.decide(x, self.layer_idx)
        out, _ = self.self_attn(
            hidden_states=x,
            attention_mask=attention_mask,
            setting=setting,
            decision=decision.heads,
            **kwargs,
        )
        hidden_states = hidden_states + out
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), setting, decision.mlp)


def make_layer_elastic(
    layer: Any, activation: str, config: ElasticConfig, settings: Settings, layer_idx: int
) -> nn.Module:
    """The layer to put in the place of a transformers one, whose attention and MLP are replaced by elastic ones.

    A layer with a forward that is not transformers' stays and goes on calling its parts. It hands them no decision,
    so only budgets at which every token has the same widths can be set.
    """
    layer.self_attn = ElasticAttention(layer.self_attn, config, settings, layer_idx)
    layer.mlp = ElasticMLP(layer.mlp, activation, config, settings, layer_idx)
    stock = type(layer)
    if not stock.__module__.startswith("transformers.models."):
        return layer
    if "forward" not in layer.__dict__:
        return mixed(ElasticDecoderLayer, stock)(layer, settings, layer_idx)
    if not goes_on(layer):
        return layer
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hook = layer._hf_hook  # its forward is called in the place of the layer's own, so it is put on again
    remove_hook_from_module(layer)
    del layer.forward
    return add_hook_to_module(mixed(ElasticDecoderLayer, stock)(layer, settings, layer_idx), hook)
