"""A sub-network as a model of its own, without flextron."""

from flextron.exporting.gguf import TYPES, export_gguf
from flextron.exporting.plain import export, load_plain
from flextron.nn.plain import LAYOUTS, extract, stock_problem

__all__ = ["LAYOUTS", "TYPES", "export", "export_gguf", "extract", "load_plain", "stock_problem"]
