"""One file per op: typed wrapper, fake, gradient, autocast. Importing this package registers them all."""

from .. import _C
from . import _common
from .decoder import Decoder, DecoderRouter, DecoderShape, DecoderStep
from .elastic_linear import elastic_linear
from .elastic_mlp import elastic_mlp, elastic_mlp_with_hidden
from .head_attention import head_attention
from .head_attention_decode import head_attention_decode
from .packed_linear import pack_linear, packed_linear
from .packed_mlp import pack_mlp, packed_mlp
from .prefix_gate import prefix_gate
from .route import Routing, route

for _op in (schema.split("(")[0] for schema in _C.schemas()):
    if _op != "decoder_drop":  # which has no tensors
        _common.refuse_other_tensors(_op)

__all__ = [
    "Decoder",
    "DecoderRouter",
    "DecoderShape",
    "DecoderStep",
    "Routing",
    "elastic_linear",
    "elastic_mlp",
    "elastic_mlp_with_hidden",
    "head_attention",
    "head_attention_decode",
    "pack_linear",
    "pack_mlp",
    "packed_linear",
    "packed_mlp",
    "prefix_gate",
    "route",
]
