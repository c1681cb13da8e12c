"""Read JSON into dataclasses: every value must have the type that its field is annotated with."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from flextron.checkpoint.format import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, CheckpointError

T = TypeVar("T")
_LARGEST = 2**63  # an int beyond it fits no tensor
_NAMES = {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false"}


@overload
def build(kind: type[T], value: Any, path: str | Path, place: str = "") -> T: ...
@overload
def build(kind: Any, value: Any, path: str | Path, place: str = "") -> Any: ...
def build(kind: Any, value: Any, path: str | Path, place: str = "") -> Any:
    """Make a ``kind`` of what stands at ``place`` of a JSON file.

    Args:
        kind: a dataclass, ``int``, ``float``, ``str``, ``bool``, ``Any``, an optional one, or a ``tuple`` or ``dict``
            of them. Tuples are JSON lists; a dataclass is an object with its fields, no others.
        value: as `read_json` returns it.
        path: the file, for messages.
        place: where the value stands in the file, for messages.

    Raises:
        CheckpointError: one sentence that says which value must be what.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (kind,) = (t for t in inner if t is not type(None))
        return build(kind, value, path, place)
    if is_dataclass(kind):
        return _dataclass(kind, value, path, place)
    if origin is tuple:
        return _tuple(inner, value, path, place)
    if origin is dict:
        _require(isinstance(value, dict), "an object", value, path, place)
        return {name: build(inner[1], one, path, _below(place, name)) for name, one in value.items()}
    return _scalar(kind, value, path, place)


def _dataclass(kind: Any, value: Any, path: str | Path, place: str) -> Any:
    _require(isinstance(value, dict), "an object", value, path, place)
    if hasattr(kind, "from_stored"):
        with checking(path):
            value = kind.from_stored(value)
    hints, known = _hints(kind), fields(kind)
    if extra := sorted(value.keys() - {f.name for f in known}):
        raise CheckpointError(f"{path}: {_below(place, extra[0])} must not be there, got one")
    for f in known:
        if f.name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise CheckpointError(f"{path}: {_below(place, f.name)} must be there, got nothing")
    given = {name: build(hints[name], one, path, _below(place, name)) for name, one in value.items()}
    with checking(path):
        return kind(**given)


def checksums_of(values: Mapping[str, Any], path: str | Path) -> dict[str, str]:
    """The sha256 by name that a sidecar records: those of weights and configuration must be there."""
    found = build(dict[str, str], values.get("checksums"), path, "checksums")
    weights = WEIGHTS_FILE if INDEX_FILE not in found else INDEX_FILE
    if missing := [name for name in (weights, CONFIG_FILE) if name not in found]:
        raise CheckpointError(f"{path}: checksums must name {' and '.join(missing)}, got none")
    return found


@contextlib.contextmanager
def checking(path: str | Path) -> Iterator[None]:
    """Turn a class's error about its values into a sentence about the file that the values came from."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _tuple(inner: tuple[Any, ...], value: Any, path: str | Path, place: str) -> tuple[Any, ...]:
    _require(isinstance(value, list | tuple), "a list", value, path, place)
    if inner[-1] is Ellipsis:
        inner = inner[:1] * len(value)
    _require(len(value) == len(inner), f"a list of {len(inner)}", value, path, place)
    return tuple(
        build(kind, one, path, f"{place}[{i}]")
        for i, (kind, one) in enumerate(zip(inner, value, strict=True))
    )


def _scalar(kind: Any, value: Any, path: str | Path, place: str) -> Any:
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        _require(number and math.isfinite(value), _NAMES[float], value, path, place)
        return float(value)
    fits = isinstance(value, kind) and (kind is not int or (value is not True and value is not False))
    _require(fits and (kind is not int or abs(value) < _LARGEST), _NAMES[kind], value, path, place)
    return value


def _require(holds: bool, what: str, value: Any, path: str | Path, place: str) -> None:
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise CheckpointError(f"{path}: {place or 'it'} must be {what}, got {shown}")


def _below(place: str, name: Any) -> str:
    return f"{place}.{name}" if place else str(name)


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind)
