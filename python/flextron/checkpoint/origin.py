"""What a file beside the weights was made for, and whether it still belongs to them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flextron.checkpoint.format import ELASTIC_FILE, CheckpointError, check_format, listed
from flextron.checkpoint.io import read_json, recover
from flextron.config import ElasticConfig

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
        checksums = meta["checksums"]
        weights = [checksums[name] for name in sorted(checksums) if name.endswith(".safetensors")]
        return cls(ElasticConfig.from_dict(meta["elastic"]), ",".join(weights))

    @classmethod
    def read(cls, directory: str | Path) -> Origin:
        """The origin of an elastic checkpoint."""
        recover(directory)
        path = Path(directory) / ELASTIC_FILE
        meta = read_json(path)
        check_format(meta, path)
        try:
            return cls.of(meta)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: must describe an elastic model, got {error!r}") from None

    def to_dict(self) -> dict[str, Any]:
        return {"elastic": self.elastic.to_dict(), "weights": self.weights}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Origin:
        return cls(ElasticConfig.from_dict(values["elastic"]), values["weights"])


def made_for(directory: str | Path, name: str) -> Origin | None:
    """The origin of the JSON file ``name`` of a checkpoint; None where there is no such file, or it says none.

    Raises:
        CheckpointError: the file is damaged.
    """
    recover(directory)
    path = Path(directory) / name
    if not path.exists():
        return None
    values = read_json(path)
    check_format(values, path)
    if KEY not in values:  # of a version that did not write it
        return None
    try:
        return Origin.from_dict(values[KEY])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {KEY} must describe a model, got {error!r}") from None


def fits(directory: str | Path, name: str, origin: Origin, mend: str) -> bool:
    """Whether the JSON file ``name`` is there and was made for these weights.

    One of the same model at other weights, or of unknown ones, is left out with a warning: the checkpoint was trained
    since, and there is a command that mends it.

    Args:
        directory: of an elastic checkpoint.
        name: of the file.
        origin: what is in ``directory`` now.
        mend: the command that makes the file anew.

    Raises:
        CheckpointError: the file is damaged, or another model's.
    """
    path = Path(directory) / name
    found = made_for(directory, name)
    if found is None and path.exists():
        warnings.warn(
            f"{path}: does not say which weights it was made for, and is left out; run `{mend}`", stacklevel=3
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
