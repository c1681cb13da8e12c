"""Elastic language models: one checkpoint that runs at any latency target."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Public names and where they live. Loaded on first use: transformers alone takes seconds, and
# `flextron --help` needs none of it.
_HOME = {
    "AdaptiveConfig": "flextron.route.adaptive",
    "ElasticConfig": "flextron.config",
    "Text": "flextron.data",
    "RouteConfig": "flextron.route.trainer",
    "TrainConfig": "flextron.train",
    "TuneConfig": "flextron.train",
    "Widths": "flextron.config",
    "Workload": "flextron.route.latency",
    "elastic_config": "flextron.nn",
    "extract": "flextron.export",
    "from_pretrained": "flextron.pipeline",
    "load_plain": "flextron.export",
    "make_elastic": "flextron.convert",
    "pack": "flextron.nn",
    "profile": "flextron.pipeline",
    "route_adaptive": "flextron.pipeline",
    "tune": "flextron.pipeline",
}

# Subpackages that are also the function of their name, and where that function is.
_STAGES = {
    "convert": "flextron.pipeline",
    "export": "flextron.export",
    "route": "flextron.pipeline",
    "train": "flextron.pipeline",
}

__all__ = sorted(_HOME.keys() | _STAGES.keys())


class _Stage(ModuleType):
    """``flextron.convert(...)`` runs the stage; ``flextron.convert.score`` is a part of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.removeprefix("flextron.")
        return getattr(import_module(_STAGES[name]), name)(*args, **kwargs)


class _Package(ModuleType):
    """Makes a stage callable when the import system hangs its subpackage in here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STAGES:
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return import_module(f"flextron.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'flextron' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
