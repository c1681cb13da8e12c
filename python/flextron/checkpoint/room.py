"""Where a model may be written: a directory that is new or empty, or one whose model is to be replaced."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from flextron.checkpoint.format import CONFIG_FILE, ELASTIC_FILE, CheckpointError, listed
from flextron.checkpoint.io import recover
from flextron.checkpoint.lock import LOCK_FILE

# What belongs to a model, by its name: ours, transformers', the hub's. Anything else in a directory is its owner's.
_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *(CONFIG_FILE, "generation_config.json", ELASTIC_FILE, "export.json", "latency.json"),
    *("routers.json", "adaptive.json", "report.html", "training", "tuning"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template*", "additional_chat_templates", "README.md", "parent_README.md"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
_IGNORED = (LOCK_FILE, ".staged")  # of a writer that was killed, or that asks


def room_for_model(directory: str | Path, who: str, force: bool = False) -> list[str]:
    """The names in ``directory`` that go when a model is written there; none where it is new or empty.

    Args:
        who: begins the message.
        force: a model that is there may be replaced. What has none of a model's names stays.

    Raises:
        CheckpointError: it holds something, and ``force`` is not given, or no model is there to be replaced.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{who}: {directory} must be a directory, got a file")
    recover(directory)
    names = (
        sorted(p.name for p in directory.iterdir() if p.name not in _IGNORED) if directory.exists() else []
    )
    if not names:
        return []
    if not force:
        raise CheckpointError(
            f"{who}: {directory} must be new or empty, got {listed(names)}; --force (force=True) replaces a model"
        )
    if CONFIG_FILE not in names:
        raise CheckpointError(
            f"{who}: {directory} must hold a model to be replaced, got no {CONFIG_FILE} beside {listed(names)}"
        )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in _MODEL)]
