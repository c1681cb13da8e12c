"""One file per op: typed wrapper, fake, gradient, autocast. Importing this package registers them all."""

from .elastic_linear import elastic_linear

__all__ = ["elastic_linear"]
