"""The model that a file beside the weights was made for, and whether that model is still there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flextron.checkpoint.files import Files, opened
from flextron.checkpoint.format import ELASTIC_FILE, CheckpointError, check_format
from flextron.checkpoint.schema import build, checksums_of
from flextron.config import ElasticConfig
from flextron.sentences import listed

KEY = "made_for"  # in the JSON of such a file


@dataclass(frozen=True)
class Origin:
    """The model that a file was made for.

    Attributes:
        elastic: shape and menus: what a latency depends on, whatever the weights' values.
        weights: sha256 of each file of the weights as saved, joined by a comma: what a loss depends on.
    """

    elastic: ElasticConfig
    weights: str

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Origin:
        """The origin that the contents of ``flextron.json`` describe."""
        return cls(ElasticConfig.from_dict(meta["elastic"]), weights_of(meta["checksums"]))

    @classmethod
    def read(cls, directory: str | Path | Files) -> Origin:
        """The origin of an elastic checkpoint."""
        with opened(directory) as files:
            path, meta = files / ELASTIC_FILE, files.read_json(ELASTIC_FILE)
        check_format(meta, path)
        checksums_of(meta, path)
        build(ElasticConfig, meta.get("elastic"), path, "elastic")
        return cls.of(meta)

    def to_dict(self) -> dict[str, Any]:
        return {"elastic": self.elastic.to_dict(), "weights": self.weights}


def weights_of(checksums: Mapping[str, str]) -> str:
    """The identity of weights: the sha256 of each of their files, joined by a comma."""
    return ",".join(checksums[name] for name in sorted(checksums) if name.endswith(".safetensors"))


def made_for(directory: str | Path | Files, name: str) -> Origin | None:
    """The origin of the JSON file ``name`` of a checkpoint; None where there is no such file, or it says none.

    Raises:
        CheckpointError: the file is damaged.
    """
    with opened(directory) as files:
        if name not in files:
            return None
        path, values = files / name, files.read_json(name)
    check_format(values, path)
    # older versions did not record it
    return build(Origin, values[KEY], path, KEY) if KEY in values else None


def fits(directory: str | Path | Files, name: str, origin: Origin, mend: str) -> bool:
    """Whether the JSON file ``name`` is there and was made for these weights.

    One of the same model at other weights, or of unknown ones, is left out with a warning: the checkpoint was trained
    since, and there is a command that mends it.

    Args:
        directory: an elastic checkpoint.
        name: the file's name.
        origin: the model that is in ``directory`` now.
        mend: the command that makes the file again.

    Raises:
        CheckpointError: the file is damaged, or another model's.
    """
    with opened(directory) as files:
        found, path = made_for(files, name), files / name
        if found is None and name in files:
            warnings.warn(
                f"{path}: does not say which weights it was made for, and is left out; run `{mend}`",
                stacklevel=3,
            )
    if found is None:
        return False
    check_model(path, found.elastic, origin.elastic, mend)
    if found.weights != origin.weights:
        warnings.warn(
            f"{path}: was made for other weights ({found.weights[:12]}) than those here "
            f"({origin.weights[:12]}), and is left out; run `{mend}`",
            stacklevel=3,
        )
    return found.weights == origin.weights


def check_model(path: Path, found: ElasticConfig, here: ElasticConfig, mend: str) -> None:
    """Refuse a file that was made for a model of other shapes or menus."""
    if differing := found.differs(here):
        raise CheckpointError(
            f"{path}: must be made for the model here, got one of {listed(differing)}; run `{mend}`"
        )
