"""From a stock checkpoint to an elastic one: score, sort, prove that nothing changed."""

from flextron.conversion.elastify import ORDERS, convert
from flextron.conversion.importance import AGGREGATES, Importance, score
from flextron.conversion.reorder import LayerOrder, identity_orders, random_orders, reorder, sorted_orders
from flextron.nn.proof import ParityError

__all__ = [
    "AGGREGATES",
    "ORDERS",
    "Importance",
    "LayerOrder",
    "ParityError",
    "convert",
    "identity_orders",
    "random_orders",
    "reorder",
    "score",
    "sorted_orders",
]
