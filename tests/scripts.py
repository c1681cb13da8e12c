"""Programs of the repository that are no modules of a package, as modules for their tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_PYTHON = Path(__file__).resolve().parents[1] / "python"


def load_script(path: str) -> ModuleType:
    """The module that a program is, by its path below ``python/``; ``sys.modules`` has it by its own name."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, _PYTHON / path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    return module
