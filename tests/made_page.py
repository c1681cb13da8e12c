"""A page of the documentation whose second part a program makes: written with --update, compared without."""

from __future__ import annotations

import sys
from pathlib import Path


def run(page: Path, mark: str, made: str, origin: str) -> int:
    """Do what the command line asks for; returns the exit code.

    Args:
        page: the file.
        mark: the line that ends what is written by hand.
        made: what must stand below it.
        origin: what the page must be, for the message.
    """
    by_hand, found, rest = page.read_text(encoding="utf-8").partition(mark)
    if not found:
        raise SystemExit(f"{page}: it must hold the line {mark.strip()}, got none")
    if sys.argv[1:] == ["--update"]:
        page.write_text(f"{by_hand}{mark}\n{made}", encoding="utf-8")
    elif rest != f"\n{made}":
        script = Path(sys.argv[0]).name
        print(f"{page.name}: it must be {origin}; run python tests/{script} --update", file=sys.stderr)
        return 1
    return 0
