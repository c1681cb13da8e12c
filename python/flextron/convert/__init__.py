"""From a stock checkpoint to an elastic one: score, sort, prove that nothing changed, store."""

from flextron.convert.elastify import ORDERS, ParityError, convert, parity
from flextron.convert.importance import AGGREGATES, Importance, score
from flextron.convert.reorder import LayerOrder, identity_orders, random_orders, reorder, sorted_orders
from flextron.convert.store import load_elastic, save_elastic

__all__ = [
    "AGGREGATES",
    "ORDERS",
    "Importance",
    "LayerOrder",
    "ParityError",
    "convert",
    "identity_orders",
    "load_elastic",
    "parity",
    "random_orders",
    "reorder",
    "save_elastic",
    "score",
    "sorted_orders",
]
