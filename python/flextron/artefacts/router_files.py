"""The two files of a trained router: its weights, and a description of it that has their checksum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from torch import nn

from flextron.checkpoint.files import Files
from flextron.checkpoint.io import save_tensors, write_json
from flextron.checkpoint.origin import KEY, Origin
from flextron.checkpoint.schema import build
from flextron.checkpoint.transaction import commit


class RouterFiles:
    """A dataclass of a trained router and its report, as it is stored in an elastic checkpoint."""

    FILES: ClassVar[tuple[str, str]]  # weights, description
    router: nn.Module

    def to_dict(self) -> dict[str, Any]:
        """Everything but the router's weights."""
        raise NotImplementedError

    def save(self, directory: str | Path, origin: Origin) -> None:
        """Write both files into an elastic checkpoint, both or neither."""
        with commit(directory) as stage:
            self.write(stage, origin)

    def write(self, folder: Path, origin: Origin) -> None:
        """Write both files; ``origin`` is the model that they were made for."""
        tensors, description = self.FILES
        checksum = save_tensors(folder / tensors, self.router.state_dict())
        write_json(folder / description, {**self.to_dict(), KEY: origin.to_dict(), "checksum": checksum})

    @classmethod
    def weights(cls, files: Files) -> int:
        """How many weights are stored, by which a damaged description is found before a router is built."""
        return sum(map(prod, files.shapes(cls.FILES[0]).values()))

    @classmethod
    def load_weights(cls, router: nn.Module, files: Files, values: dict[str, Any]) -> None:
        """Load the stored weights into ``router``; ``values`` is the contents of the description."""
        tensors, description = cls.FILES
        checksum = build(str, values.get("checksum"), files / description, "checksum")
        router.load_state_dict(files.load_tensors(tensors, router.state_dict(), checksum))

    @classmethod
    def read_fields(cls, values: dict[str, Any], path: Path, but: Collection[str]) -> dict[str, Any]:
        """The fields of the dataclass as ``values`` have them, ``but`` these."""
        hints = get_type_hints(cls)
        names = [f.name for f in fields(cls) if f.name not in but]  # type: ignore[arg-type]  # of a subclass
        return {name: build(hints[name], values.get(name), path, name) for name in names}
