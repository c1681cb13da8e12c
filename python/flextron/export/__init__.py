"""A sub-network as a model of its own, without flextron."""

from flextron.export.plain import LAYOUTS, export, extract, load_plain, stock_problem

__all__ = ["LAYOUTS", "export", "extract", "load_plain", "stock_problem"]
