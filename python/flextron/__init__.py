"""Elastic language models: one checkpoint that runs at any latency target."""

from importlib import import_module
from typing import Any

# Loaded on first use: transformers alone takes seconds, and `flextron --help` needs none of it.
_HOME = {
    "ElasticConfig": "flextron.config",
    "RouteConfig": "flextron.route.trainer",
    "TrainConfig": "flextron.train",
    "Widths": "flextron.config",
    "Workload": "flextron.route.latency",
    "convert": "flextron.pipeline",
    "elastic_config": "flextron.nn",
    "export": "flextron.export",
    "extract": "flextron.export",
    "from_pretrained": "flextron.pipeline",
    "load_plain": "flextron.export",
    "make_elastic": "flextron.nn",
    "profile": "flextron.pipeline",
    "route": "flextron.pipeline",
    "train": "flextron.pipeline",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flextron' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
