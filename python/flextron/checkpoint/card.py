"""The files that follow a model's weights from parent to child: licence and card, and a card of our own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CARD_FILE, PARENT_CARD_FILE = "README.md", "parent_README.md"
_CARRIED = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", PARENT_CARD_FILE)
_KEPT = ("license", "license_name", "license_link", "language", "base_model")


def write_card(
    folder: Path, parent: str | Path | None, title: str, paragraphs: Sequence[str], base: str | None = None
) -> None:
    """Write ``README.md`` into a folder, and carry over what the parent has of licences and cards.

    Args:
        folder: where the new model is written.
        parent: directory of the old one; None where it is not known.
        title: the card's title.
        paragraphs: the card's text, Markdown.
        base: hub id of the parent, where it is known.
    """
    parent = None if parent is None else Path(parent)
    known = _carry(folder, parent) if parent is not None and parent.is_dir() else {}
    if base is not None:
        known["base_model"] = base
    body = "\n\n".join([f"# {title}", *paragraphs])
    (folder / CARD_FILE).write_text(f"---\n{_front_matter(known)}\n---\n\n{body}\n", encoding="utf-8")


def _carry(folder: Path, parent: Path) -> dict[str, Any]:
    """Copy licences and the parent's card; returns the licence and language that the card's head names."""
    for pattern in _CARRIED:
        for path in parent.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    card = parent / CARD_FILE
    if not card.is_file():
        return {}
    if not (
        folder / PARENT_CARD_FILE
    ).exists():  # the first parent's: a card of ours says no more than its own
        shutil.copyfile(card, folder / PARENT_CARD_FILE)
    return _said_by(card)


def _said_by(card: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        said = metadata_load(card) or {}
    except Exception:  # no front matter, or none that anything can read: nothing to carry over
        return {}
    return {name: said[name] for name in _KEPT if name in said}


def _front_matter(known: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        **known, library_name="transformers", pipeline_tag="text-generation", tags=["flextron", "elastic"]
    ).to_yaml()
