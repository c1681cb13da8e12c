"""A class of transformers with one of ours in front of it, made at run time for whichever class a model has."""

from __future__ import annotations

from typing import Any, SupportsIndex

_MADE: dict[tuple[type, type], type] = {}


class Mixin:
    """The base of what goes in front: copies and pickles find the class by the two that it is made of.

    Attributes:
        mixin, stock: our class, and that of transformers.
    """

    mixin: type[Mixin]
    stock: Any

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        """What the class in front of ``stock`` has beyond the two."""
        return {}

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _empty, (self.mixin, self.stock), self.__getstate__()


def mixed(mixin: type[Mixin], stock: Any) -> Any:
    """The class under the name of ``stock``, which transformers writes to configurations and looks layers up by."""
    if (mixin, stock) not in _MADE:
        members = {"__module__": stock.__module__, "mixin": mixin, "stock": stock, **mixin.members(stock)}
        _MADE[mixin, stock] = type(stock.__name__, (mixin, stock), members)
    return _MADE[mixin, stock]


def _empty(mixin: Any, stock: Any) -> Any:
    """What `copy.deepcopy` and pickle fill."""
    cls = mixed(mixin, stock)
    return cls.__new__(cls)
