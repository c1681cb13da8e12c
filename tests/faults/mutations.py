"""Ways in which a file goes wrong: bits, ends, and what a JSON file may say instead of what it should."""

from __future__ import annotations

import json
import random
from typing import Any

VALUES = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 10**30, 0.5, -0.0, 1e308, 1e-308, "", "x", "1", "NaN", "é\n\n"),
    *([], [1], [[]], {}, {"a": 1}, [None, "x"], "../../etc/passwd", "\u0000"),
)
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "[" * 5000)  # what only a text can say
GARBAGE = (
    b"",
    b"\x00",
    b"{",
    b"[]",
    b"null",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"\x80\x04\x95",
    b"PK\x03\x04",
    b"\xff\xfe{}",
    b"<html><body>404</body></html>",
)
_MARK = "@@here@@"


def mutated(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Another file in place of ``data``, and what was done, in a few words."""
    kinds = [flipped, flipped, cut, holed, doubled, zeroed, longer, foreign]
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if isinstance(document, dict | list):
        kinds += [changed] * 12
    while True:
        what, found = rng.choice(kinds)(data, rng)
        if found != data:
            return what, found


def flipped(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    out = bytearray(data)
    places = [rng.randrange(len(out)) for _ in range(rng.choice((1, 1, 3)))]
    for place in places:
        out[place] ^= 1 << rng.randrange(8)
    return f"bits flipped at {places}", bytes(out)


def cut(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    length = rng.choice((rng.randrange(len(data)), rng.randrange(min(64, len(data))), len(data) - 1))
    return f"cut to {length} bytes", data[:length]


def holed(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    start = rng.randrange(len(data))
    return f"a hole at {start}", data[:start] + data[start + rng.randrange(1, 40) :]


def doubled(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    start = rng.randrange(len(data))
    return f"doubled from {start}", data[:start] + data[start : start + rng.randrange(1, 40)] + data[start:]


def zeroed(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    start = rng.randrange(len(data))
    length = min(rng.randrange(1, 4096), len(data) - start)
    return f"{length} zeros at {start}", data[:start] + bytes(length) + data[start + length :]


def longer(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    more = rng.choice((b"\x00", b"}", b"{}", b"\n\n{", rng.randbytes(20)))
    return f"{more!r} appended", data + more


def foreign(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    other = rng.choice(GARBAGE)
    return f"replaced by {other!r}", other


def changed(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One place of a JSON document holds something else, is gone, or has a neighbour."""
    document = json.loads(data)
    parents = list(_containers(document))
    parent = rng.choice(parents)
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    action = rng.choice(("value", "value", "value", "raw", "gone", "more")) if keys else "more"
    if action == "more":
        value = rng.choice(VALUES)
        if isinstance(parent, dict):
            parent[rng.choice(("more", "", "format", "0"))] = value
        else:
            parent.append(value)
        return f"{value!r} put in", json.dumps(document).encode()
    key = rng.choice(keys)
    old = parent[key]
    if action == "gone":
        del parent[key]
        return f"{key!r} gone", json.dumps(document).encode()
    if action == "raw":
        raw = rng.choice(RAW)
        parent[key] = _MARK
        return f"{key!r} = {raw[:12]}", json.dumps(document).replace(f'"{_MARK}"', raw).encode()
    parent[key] = rng.choice([v for v in VALUES if v != old or type(v) is not type(old)])
    return f"{key!r} = {parent[key]!r}", json.dumps(document).encode()


def _containers(value: Any) -> Any:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value[:8]:
            yield from _containers(inner)
