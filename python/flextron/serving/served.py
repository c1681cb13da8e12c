"""What this process serves: a worker of vLLM has one model, and its parts meet here.

vLLM makes the parts itself (a configuration hook, a processor of logits, a model) and hands none to another.
"""

from __future__ import annotations

from flextron.serving.batch import Batch
from flextron.serving.budgets import Offer

_offer: Offer | None = None
_batch: Batch | None = None


def serve(offer: Offer, batch: Batch | None = None) -> None:
    """Say what is served from now on; ``batch`` where the model itself runs in this process."""
    global _offer, _batch
    _offer, _batch = offer, batch or _batch


def offer() -> Offer:
    """The budgets that are offered."""
    if _offer is None:
        raise RuntimeError("flextron: an elastic checkpoint must be served by this process, got none")
    return _offer


def batch() -> Batch:
    """The requests of the running batch."""
    if _batch is None:
        raise RuntimeError("flextron: an elastic model must run in this process, got none")
    return _batch
