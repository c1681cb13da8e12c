"""The processes that torchrun started for one command: joining them, and what they agree on, share and average.

A process that torchrun did not start is alone: everything here works, and does nothing. Messages between processes are
JSON and tensors; nothing is pickled.
"""

from flextron.ranks.ending import LostError
from flextron.ranks.joining import (
    ALONE,
    Ranks,
    agree,
    ask,
    divided,
    every,
    first,
    gathered,
    is_first,
    is_started,
    joined,
    mean,
    now,
    over_rows,
    part,
    rows_of,
    shared,
    total,
)

__all__ = [
    "ALONE",
    "LostError",
    "Ranks",
    "agree",
    "ask",
    "divided",
    "every",
    "first",
    "gathered",
    "is_first",
    "is_started",
    "joined",
    "mean",
    "now",
    "over_rows",
    "part",
    "rows_of",
    "shared",
    "total",
]
