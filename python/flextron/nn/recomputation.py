"""Activation checkpointing: in training a layer keeps its input alone, and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from flextron.nn.protocol import Elastic
from flextron.nn.setting import Settings

_SWITCHES = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
)  # of transformers' GradientCheckpointingLayer


@contextmanager
def recomputing(model: Elastic) -> Iterator[None]:
    """Inside a ``with`` block, checkpoint the activations of each decoder layer (Chen et al., arXiv 1604.06174).

    A layer runs again at the setting that its forward had, and its policy draws the same noise, so losses and gradients
    keep their bits. transformers wraps a layer's ``forward`` and not its call: hooks, FSDP2's among them, run once.
    """
    run = partial(checkpoint, use_reentrant=False, context_fn=partial(_contexts, model.settings))
    layers = [layer.__dict__ for layer in model.decoder_layers]
    before = [{name: layer[name] for name in _SWITCHES if name in layer} for layer in layers]
    for layer in layers:
        layer.update(zip(_SWITCHES, (True, run), strict=True))
    try:
        yield
    finally:
        for layer, found in zip(layers, before, strict=True):
            for name in _SWITCHES:
                del layer[name]
            layer.update(found)


def _contexts(settings: Settings) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a layer's forward, which begins, and of its repetition."""
    setting = settings.now()
    policy = None if setting.policy is None else setting.policy.again()
    return nullcontext(), settings.block(replace(setting, policy=policy, watched=None))
