"""Where a model may be written: a directory that is new or empty, or one whose model is to be replaced."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from flextron.checkpoint.format import CONFIG_FILE, ELASTIC_FILE, LATENCY_FOLDER, CheckpointError
from flextron.checkpoint.lock import LOCK_FILE
from flextron.checkpoint.transaction import recover
from flextron.sentences import listed

# Weights that transformers or we have written: a directory with these and a config.json holds a model.
_WEIGHTS = (
    *("model*.safetensors", "model*.safetensors.index.json", "consolidated*.safetensors"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json", "pytorch_model*.safetensors"),
)
# Other files of a model, by transformers' and the hub's names for them. Any other file is its owner's.
_MODEL = (
    *_WEIGHTS,
    *(CONFIG_FILE, "generation_config.json", "export.json", "modeling_flextron.py"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "tokenizer.txt", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template*", "additional_chat_templates", "README.md", "parent_README.md"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
# Files that only an elastic checkpoint has.
_ELASTIC = (
    ELASTIC_FILE,
    "latency.json",
    LATENCY_FOLDER,
    "routers.json",
    "adaptive.json",
    "report.html",
    "training",
    "tuning",
    "refit",
    "written.jsonl",
)
_IGNORED = (LOCK_FILE, ".staged")  # left by a writer that was killed, or held by the caller


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
    names = names_in(directory)
    if not names:
        return []
    if not force:
        raise CheckpointError(
            f"{who}: {directory} must be new or empty, got {listed(names)}; --force (force=True) replaces a model"
        )
    if not _holds_model(names):
        lacks = "weights" if CONFIG_FILE in names else CONFIG_FILE
        raise CheckpointError(
            f"{who}: {directory} must hold a model to be replaced, got no {lacks} beside {listed(names)}"
        )
    return _matching(names, (*_MODEL, *(_ELASTIC if ELASTIC_FILE in names else ())))


def names_in(directory: Path) -> list[str]:
    """What a directory holds, beside what is left by a writer or held by the caller; nothing where there is none."""
    if not directory.exists():
        return []
    return sorted(p.name for p in directory.iterdir() if p.name not in _IGNORED)


def _holds_model(names: list[str]) -> bool:
    """Whether these are a model's: a configuration alone may be another program's, in its user's own folder."""
    return CONFIG_FILE in names and (ELASTIC_FILE in names or bool(_matching(names, _WEIGHTS)))


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
