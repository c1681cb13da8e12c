"""Elastic modules, and the transformers model made of them."""

from flextron.nn.anatomy import FAMILIES
from flextron.nn.cache import ElasticCache
from flextron.nn.elastic_attention import ElasticAttention
from flextron.nn.elastic_layer import ElasticLayer
from flextron.nn.elastic_mlp import ElasticMLP
from flextron.nn.families import elastic_config
from flextron.nn.model import ElasticModel, make_elastic
from flextron.nn.packed import Packing, pack
from flextron.nn.policy import Dial
from flextron.nn.projection import PackedLinear, check_plain
from flextron.nn.protocol import Elastic
from flextron.nn.static_cache import StaticCache

__all__ = [
    "FAMILIES",
    "Dial",
    "Elastic",
    "ElasticAttention",
    "ElasticCache",
    "ElasticLayer",
    "ElasticMLP",
    "ElasticModel",
    "PackedLinear",
    "Packing",
    "StaticCache",
    "check_plain",
    "elastic_config",
    "make_elastic",
    "pack",
]
