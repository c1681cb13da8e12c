"""The code beside a ragged export, by which stock transformers builds each layer from a configuration of its own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from flextron.config import ElasticConfig, Widths
from flextron.nn.anatomy import has_one_head_size
from flextron.nn.plain import SIZES, kept_sizes
from flextron.nn.protocol import Elastic

MODELING_FILE = "modeling_flextron.py"
PER_LAYER_KEY = "per_layer_config"  # in config.json: what of each layer differs from the rest of it
_CODE = '''"""A {base} whose layers have widths of their own: layer i is built from config.per_layer_config[i].

Needs transformers 5.24 or newer. Written by flextron.
"""

import torch
from torch import nn
from transformers.models.{package}.configuration_{package} import {configuration}
from transformers.models.{package}.modeling_{package} import {layer}, {causal}, {base}


class Ragged{configuration}({configuration}):
    allow_global_per_layer_attribute_access = True  # those who ask for all layers' width get the full network's


class NoAttention(nn.Module):
    """In the place of an attention that a layer skips: zeros, and a mark for each token, which the cache counts."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, cache=None, **kwargs):
        if cache is not None:
            mark = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(mark, mark, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """In the place of an MLP that a layer skips."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def build_layer(config, i):
    own = config.per_layer_config[i]
    layer = {layer}(own, i)
    if "attention" in own.skip:
        layer.{attention} = NoAttention(i)
    if "mlp" in own.skip:
        layer.{mlp} = NoMLP()
    return layer


class Ragged{base}({base}):
    config_class = Ragged{configuration}
    _keys_to_ignore_on_load_unexpected = [r"{layers}\\.\\d+\\.({attention}|{mlp})\\."]  # empty, where a layer skips it

    def __init__(self, config):
        super().__init__(config)
        self.{layers} = nn.ModuleList(build_layer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class Ragged{causal}({causal}):
    config_class = Ragged{configuration}
    _keys_to_ignore_on_load_unexpected = Ragged{base}._keys_to_ignore_on_load_unexpected

    def __init__(self, config):
        super().__init__(config)
        self.{prefix} = Ragged{base}(config)
        self.post_init()
'''


def remote_problem(model: Elastic, widths: Widths) -> str | None:
    """Why a layer of this sub-network cannot be built from a configuration, in one sentence; None when it can."""
    config: ElasticConfig = model.elastic
    if "." in model.anatomy.base:
        return f"the layers of a {config.family} lie deeper than its base model"
    if has_one_head_size(config) and {*widths.heads} - {0, config.max_heads}:
        return f"a {config.family} configuration has hidden_size / heads for its head size"
    if model.anatomy.experts and 0 in widths.mlp:
        return f"a {config.family} has experts, which are not skipped"
    return None


def remote_code(model: Elastic, plain: PreTrainedModel, widths: Widths) -> tuple[str, dict[str, Any]]:
    """The modeling file of a ragged network, and what its config.json has beside the parent's.

    Args:
        plain: the ragged network of `flextron.nn.plain.build`.
    """
    anatomy = model.anatomy
    causal, base = type(plain).__name__, type(plain.base_model).__name__
    names = {
        "causal": causal,
        "base": base,
        "configuration": type(plain.config).__name__,
        "layer": type(anatomy.layers_in(plain)[0]).__name__,
        "package": type(plain).__module__.split(".")[-2],
        "prefix": plain.base_model_prefix,
        "layers": anatomy.layers,
        "attention": anatomy.attention,
        "mlp": anatomy.mlp,
    }
    code = _CODE
    for name, value in names.items():
        code = code.replace(f"{{{name}}}", value)
    layers = {}
    for i, s in enumerate(kept_sizes(model.elastic, widths)):
        named = (anatomy.sizes[0], SIZES[1], anatomy.sizes[1])
        sizes = dict(zip(named, (s.neurons, s.groups * s.per_group, s.groups), strict=True))
        skip = [part for part, n in (("attention", s.groups), ("mlp", s.neurons)) if n == 0]
        layers[str(i)] = {k: n for k, n in sizes.items() if k and n} | ({"skip": skip} if skip else {})
    module = MODELING_FILE.removesuffix(".py")
    classes = {"AutoConfig": names["configuration"], "AutoModel": base, "AutoModelForCausalLM": causal}
    auto = {name: f"{module}.Ragged{own}" for name, own in classes.items()}
    return code, {"auto_map": auto, "architectures": [f"Ragged{causal}"], PER_LAYER_KEY: layers}
