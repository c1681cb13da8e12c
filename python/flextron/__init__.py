"""Elastic language models: one checkpoint that runs at any latency target."""

from importlib import import_module
from typing import Any

# Public names and where they live. Loaded on first use: transformers alone takes seconds, and
# `flextron --help` needs none of it.
_HOME = {
    "AdaptiveConfig": "flextron.recipes",
    "ElasticConfig": "flextron.config",
    "Text": "flextron.data",
    "Mix": "flextron.corpus",
    "RouteConfig": "flextron.recipes",
    "TrainConfig": "flextron.recipes",
    "TuneConfig": "flextron.recipes",
    "Widths": "flextron.config",
    "Workload": "flextron.artefacts.latency_table",
    "convert": "flextron.pipeline",
    "elastic_config": "flextron.nn",
    "export": "flextron.exporting",
    "export_gguf": "flextron.exporting",
    "extract": "flextron.exporting",
    "from_pretrained": "flextron.inference",
    "load_plain": "flextron.exporting",
    "make_elastic": "flextron.artefacts.elastic_model",
    "pack": "flextron.nn",
    "profile": "flextron.pipeline",
    "refit": "flextron.pipeline",
    "route": "flextron.pipeline",
    "route_adaptive": "flextron.pipeline",
    "sample": "flextron.pipeline",
    "tokenize": "flextron.tokens.writing",
    "train": "flextron.pipeline",
    "tune": "flextron.pipeline",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flextron' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
