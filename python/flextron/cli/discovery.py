"""Which commands there are: the library's own, and those that installed packages add by entry points.

A package adds a command ``NAME`` by an entry point ``NAME`` of the group ``flextron.commands``, whose value is a
module like those of this folder. An entry point ``eval.tasks`` is not a command: `eval` calls it for ``--tasks``.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, cast

from flextron.sentences import first_line

GROUP = "flextron.commands"
OWN = (
    "tokenize",
    "convert",
    "sample",
    "refit",
    "train",
    "profile",
    "route",
    "tune",
    "eval",
    "generate",
    "export",
    "serve",
    "info",
    "scale",
    "clean",
)
LAB = ("report", "reproduce", "demo")  # flextron_lab's


class Command(Protocol):
    """A module that is a command."""

    __doc__: str | None
    EXAMPLE: str

    def options(self, parser: ArgumentParser) -> None: ...

    def run(self, args: Namespace) -> Any: ...


def commands() -> dict[str, Command]:
    """Every command that can be loaded, by name; a name of the library's own is never taken by another package."""
    found = {name: cast(Command, import_module(f"flextron.cli.{name}")) for name in OWN}
    for name, entry in _extensions().items():
        if name not in found and "." not in name:
            try:
                found[name] = entry.load()
            except Exception:
                continue
    return found


def is_missing(asked: str, found: Mapping[str, Command]) -> bool:
    """Whether a word names a command that exists, but not here or not in working order."""
    return asked not in found and (asked in LAB or asked in _extensions())


def extension(name: str, asked: str) -> Any:
    """The module behind the entry point ``name``.

    Raises:
        ValueError: one sentence on what ``asked`` for it lacks.
    """
    entry = _extensions().get(name)
    if entry is None:
        raise ValueError(
            f"{asked}: flextron_lab must be installed, got no entry point {name} in the group {GROUP}; "
            "install flextron again"
        )
    try:
        return entry.load()
    except Exception as error:
        raise ValueError(f"{asked}: {entry.value} must be importable, got {first_line(error)}") from error


def _extensions() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
