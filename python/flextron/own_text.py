"""Text that a checkpoint's parent writes for it: how it is asked for, and how much a stage needs of it.

Where no text is given, the stages that change weights take this: any other text makes a model forget what it is unlike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flextron.corpus import PARENT, Data, Mix
from flextron.data import Text

FILE = "written.jsonl"  # in the checkpoint's folder
LEAST = 1 << 14  # tokens; of fewer too few are held out to judge by
MOST = 1 << 17  # tokens; more take a small model minutes on a CPU


def enough(tokens: int) -> int:
    """How many tokens the parent is to write for a stage that reads ``tokens``: a part of them is held out."""
    return min(max(math.ceil(tokens / 0.9), LEAST), MOST)


def is_asked(data: Data) -> bool:
    """Whether the parent is to write ``data``, or a part of it."""
    if isinstance(data, Mix):
        return any(one is not None and is_asked(one) for one in data.texts)
    path = data.path if isinstance(data, Text) else data
    return path is None or (isinstance(path, str) and path.startswith(PARENT))


def written(data: Data, tokens: int, write: Callable[[int], Path]) -> Data:
    """``data`` with a file in the place of what the parent is to write; None: ``tokens`` of it."""
    if isinstance(data, Mix):
        return replace(
            data, texts=[one if one is None else written(one, tokens, write) for one in data.texts]
        )
    if data is None:
        return write(tokens)
    if not is_asked(data):
        return data
    path = str(data.path if isinstance(data, Text) else data)
    if isinstance(data, Text) and data.field is not None:
        raise ValueError(f"text: field must be given for text with fields, got {data.field!r} for {path}")
    count = path.removeprefix(PARENT)
    if not count.isdecimal() or not int(count):
        raise ValueError(f"text: the parent's own must be named as {PARENT}TOKENS, got {path}")
    return write(int(count))
