"""What several commands print, and how a warning is shown."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from flextron.sentences import first_line


def say(args: argparse.Namespace, text: str) -> None:
    """Print a line of the result, unless the result is asked for as JSON."""
    if not args.json:
        print(text)


def warn(message: Warning | str, *_: Any) -> None:
    """Show a warning as a sentence, without the line of code that it came from."""
    print(f"flextron: warning: {first_line(message)}", file=sys.stderr)


def dtypes(counts: dict[str, int]) -> str:
    """``bfloat16``; where there are several dtypes, ``bfloat16 (21 tensors), float32 (7)``."""
    if len(counts) == 1:
        return next(iter(counts))
    (first, number), *others = counts.items()
    return ", ".join([f"{first} ({number} tensors)", *(f"{name} ({n})" for name, n in others)])


def rounding(parity: dict[str, Any]) -> str:
    """How much of a certificate's figure comes from a narrower dtype, and what it is in float64, where known."""
    share, exact = parity.get("rounding", {}).get("max_rel"), parity.get("float64")
    stored = f" ({share:.1e} of it from rounding)" if share else ""
    return stored if exact is None else f"{stored}, {exact:.1e} in float64: the network amplifies rounding"


def training_result(report: Any) -> dict[str, Any]:
    """What ``train`` and ``tune`` print as JSON."""
    names = ("tokens", "seconds", "resumed_from", "losses", "evaluations")
    return {name: getattr(report, name) for name in names}
