"""Which documents are trained on and which judge: a hash of the text decides, so that equal texts stay together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def split_documents(documents: Sequence[str], held_out: float = 0.05) -> tuple[list[str], list[str]]:
    """Split documents into (train, validation) by a hash of their text, so that equal texts stay together.

    A document keeps its side when others are added. If one side would be empty, the document nearest to the border
    changes sides. A single document is cut at a paragraph near its end.
    """
    check_share("split_documents", held_out)
    if not documents:
        raise ValueError("split_documents: documents must not be empty, got []")
    ranks = {d: rank_of(d) for d in documents}
    if len(ranks) == 1:
        return cut(documents[0], held_out)
    border = border_between(held_out, sorted(ranks.values()))
    train = [d for d in documents if ranks[d] > border]
    return train, [d for d in documents if ranks[d] <= border]


def check_share(who: str, held_out: float) -> None:
    if not 0 < held_out < 1:
        raise ValueError(f"{who}: held_out must lie between 0 and 1, got {held_out}")


def rank_of(document: str) -> float:
    """A number in [0, 1) that depends only on the text; documents up to the border are held out."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:6], "big") / 2**48


def border_between(held_out: float, ranks: Sequence[float]) -> float:
    """The border that leaves a document on both sides.

    Args:
        held_out: the border that is wished for.
        ranks: two ranks at least, ascending; those between the second and the last but one are not looked at.
    """
    border = max(held_out, ranks[0])
    return ranks[-2] if border >= ranks[-1] else border


def cut(document: str, held_out: float) -> tuple[list[str], list[str]]:
    """Both sides of a single document."""
    place = round(len(document) * (1 - held_out))
    # Cut at the next paragraph, else line, else word, if that leaves something to hold out.
    for mark in ("\n\n", "\n", " "):
        found = document.find(mark, place)
        if 0 < found < len(document.rstrip()):
            return [document[:found]], [document[found:]]
    raise ValueError(f"split_documents: documents must hold text to part, got {document[:60]!r}")
