"""From a stock checkpoint to an elastic one: score, sort, prove that nothing changed, store."""

from flextron.conversion.elastify import ORDERS, convert
from flextron.conversion.importance import AGGREGATES, Importance, score
from flextron.conversion.reorder import LayerOrder, identity_orders, random_orders, reorder, sorted_orders
from flextron.conversion.store import load_elastic, make_elastic, save_elastic
from flextron.nn.proof import ParityError

__all__ = [
    "AGGREGATES",
    "ORDERS",
    "Importance",
    "LayerOrder",
    "ParityError",
    "convert",
    "identity_orders",
    "load_elastic",
    "make_elastic",
    "random_orders",
    "reorder",
    "save_elastic",
    "score",
    "sorted_orders",
]
