"""A directory here, or the id of a checkpoint on the Hugging Face hub, which is fetched into the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flextron.checkpoint.format import CheckpointError
from flextron.sentences import first_line

_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
_READ = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md")
_LEFT = ("training/*", "tuning/*")  # not fetched: only resuming a run needs them


def local(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    tokenizer_only: bool = False,
) -> Path:
    """The directory that ``source`` names.

    What may be a mistyped path is not looked for on the hub: an id is ``owner/name``, where ``owner`` is no folder
    of the working directory.

    Args:
        source: a directory, or an id.
        revision: branch, tag or commit of an id.
        cache_dir, token: what ``huggingface_hub.snapshot_download`` takes.
        tokenizer_only: leave the weights on the hub.

    Raises:
        CheckpointError: neither is there.
        ValueError: a revision of a directory.
        TypeError: a source that names nothing.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"directory must be a path or a hub id, got {source!r}")
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"{source}: revision must be given of a hub id only, got {revision!r} of a path")
        return path
    if not isinstance(source, str) or not _ID.fullmatch(source) or source.startswith((".", "-")):
        raise CheckpointError(f"{source}: must be a directory, or a hub id as owner/name, got nothing there")
    if path.parent.is_dir():
        raise CheckpointError(f"{source}: must be a directory, got nothing of that name in {path.parent}")
    left = (*_LEFT, "*.safetensors") if tokenizer_only else _LEFT
    return _fetched(source, revision, cache_dir, token, left)


def _fetched(
    name: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    left: Sequence[str],
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=list(_READ),
            ignore_patterns=list(left),
        )
    except Exception as error:  # of the network, the hub or the disk: they have no class in common
        raise CheckpointError(
            f"{name}: must be a directory, or the id of a checkpoint that the hub gives, got: "
            f"{first_line(error).removeprefix('Got: ')}"
        ) from None
    return Path(found)
