"""The elastic ops for PyTorch: importing this makes ``torch.ops.flextron.*`` exist, fakes and gradients included."""

from pathlib import Path

import torch

try:
    from . import _C
except ImportError as error:
    _built = any(Path(__file__).parent.glob("_C.*"))
    raise ImportError(
        f"flextron_ext: the op library must load with torch {torch.__version__}, got: {error}"
        if _built
        else "flextron_ext: the op library must be built first: run `pip install .` in the repository"
    ) from error

from .ops import *  # noqa: F403
from .ops import __all__ as _ops
from .panels import PanelFormat

OP_LIBRARY = str(
    Path(__file__).with_name("libflextron.so")
)  # for torch.ops.load_library, without this package

build_info = _C.build_info
machine = _C.machine
schemas = _C.schemas

__all__ = ["OP_LIBRARY", "PanelFormat", "build_info", "machine", "schemas", *_ops]
