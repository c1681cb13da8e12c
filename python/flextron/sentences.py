"""Words of messages: what an error of any library says in one line, and a list that does not run on."""

from __future__ import annotations

from collections.abc import Iterable


def first_line(said: object) -> str:
    """The first line of an error or text; with the second, where the first ends in a colon and only announces it.

    An error without a text is told by its class.
    """
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(said).__name__


def listed(names: Iterable[str], shown: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
