"""The directory of an elastic checkpoint, read at one moment: its model, tables, planner and routers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from flextron.artefacts import adaptive_router, static_router
from flextron.artefacts.adaptive_router import AdaptiveResult, costs_of
from flextron.artefacts.elastic_model import Cut, read_meta, read_model, read_stock_config
from flextron.artefacts.ladder import Ladder, uniform_ladder
from flextron.artefacts.latency_files import Tables, by_phase, kept_tables, load_tables, machines, of_machine
from flextron.artefacts.machine import Machine, machine_of, name_of
from flextron.artefacts.planner import Planner
from flextron.artefacts.static_router import RouterResult, load_ladder
from flextron.checkpoint import ELASTIC_FILE, CheckpointError, Files, Origin, opened
from flextron.checkpoint.origin import made_for
from flextron.checkpoint.schema import build, checking
from flextron.nn.placement import CPU
from flextron.nn.protocol import Elastic
from flextron.nn.storage import Dtype


class ElasticDirectory:
    """An elastic checkpoint whose files were opened together: all of them belong to one save.

    An interrupted save is finished once, when the directory is opened, and its files are checked once. What was made
    for other weights than those here is left out with a warning that names the command to run.
    """

    def __init__(self, files: Files) -> None:
        self.path = files.directory
        self._files = files

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: str | Path) -> Iterator[ElasticDirectory]:
        """The checkpoint in ``directory``, for the length of a ``with`` block.

        Raises:
            CheckpointError: no such directory, or a save that was interrupted cannot be finished.
        """
        with opened(directory) as files:
            yield cls(files)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The contents of ``flextron.json``."""
        return read_meta(self._files)

    @cached_property
    def origin(self) -> Origin:
        """The identity of the model here, which files that were made for it record."""
        return Origin.of(self.meta)

    @cached_property
    def tables(self) -> Tables:
        """The latency tables, of all machines."""
        return load_tables(self._files, self.origin.elastic)

    def model(
        self, dtype: Dtype | None = torch.float32, device: torch.device = CPU, cut: Cut | None = None
    ) -> Elastic:
        """The elastic model alone, at full width and in eval mode; see `flextron.nn.placement.memory_dtype`.

        ``cut`` shards it; see `read_model`.
        """
        model = read_model(self._files, self.origin.elastic, dtype, self.meta["checksums"], device, cut)
        model.sidecar = self.meta
        return model

    def check_length(self, who: str, length: int) -> None:
        """Refuse sequences of more tokens than the model has positions."""
        check_length(who, length, read_stock_config(self._files, self.origin.elastic))

    def kept_tables(self, machine: Machine) -> Tables:
        """What is stored again beside new tables of ``machine``; see `flextron.artefacts.latency_files.kept_tables`."""
        return kept_tables(self._files, self.origin.elastic, machine)

    def planner(self, machine: Machine | None = None) -> Planner:
        """The planner of the tables and the routed ladder; without routers, of one that came with the weights, or of
        the uniform one.

        ``machine`` is the one that budgets are about; None: the only one that was profiled.
        """
        routed = load_ladder(self._files, self.origin, self.tables)
        ladder = routed or self._brought_ladder() or uniform_ladder(self.origin.elastic)
        return Planner(self.origin.elastic, self.tables, ladder, machine)

    def _brought_ladder(self) -> Ladder | None:
        """The ladder that was converted with the weights that are here; None where none was."""
        path, values = self.path / ELASTIC_FILE, self.meta.get("ladder")
        if not isinstance(values, dict) or values.get("weights") != self.origin.weights:
            return None
        own = {k: v for k, v in values.items() if k != "weights"}
        ladder = build(Ladder, own, path, "ladder")
        with checking(path):
            ladder.check(self.origin.elastic)
        return ladder

    def static(self) -> RouterResult | None:
        """The static routers and their report."""
        return static_router.load(self._files, self.origin)

    def adaptive(self) -> AdaptiveResult | None:
        """The adaptive router and its report."""
        return adaptive_router.load(self._files, self.origin)

    def made_for(self, name: str) -> Origin | None:
        """The model that the JSON file ``name`` was made for; None where there is none, or it does not say."""
        try:
            return made_for(self._files, name)
        except CheckpointError:
            return None

    def equipped(
        self, dtype: Dtype | None = torch.float32, device: torch.device = CPU, cut: Cut | None = None
    ) -> Elastic:
        """The model with its planner and, where one was trained, its adaptive router.

        Warns where this machine was not profiled, or was another then, and where the router is for other tables.
        """
        model = self.model(dtype, device, cut)
        here = machine_of(model)
        model.planner = self.planner(here)
        if (result := self.adaptive()) is not None:
            with checking(self.path / adaptive_router.DESCRIPTION):
                result.router.check(model.elastic)
            model.attach_router(result.router)
            if model.planner.here and result.costs != costs_of(by_phase(model.planner.here)):
                self._warn(
                    "the adaptive router is calibrated for other latency tables",
                    "flextron route",
                    " --adaptive",
                )
        self.warn_of_another_use(here)
        if self.tables and not model.planner.here:
            known = " and ".join(machines(self.tables))
            self._warn(f"has latency tables of {known} only, none of {name_of(here)}", "flextron profile")
        return model

    def warn_of_another_use(self, machine: Machine) -> None:
        """Say where the tables that are meant on ``machine`` were measured in another use, or with other versions."""
        changes = [change for table in of_machine(self.tables, machine) for change in table.differs(machine)]
        if changes:
            self._warn("; ".join(dict.fromkeys(changes)), "flextron profile")

    def _warn(self, what: str, command: str, options: str = "") -> None:
        warnings.warn(f"{self.path}: {what}; run `{command} {self.path}{options}`", stacklevel=4)


def check_length(who: str, length: int, config: PreTrainedConfig, name: str = "length") -> None:
    """Refuse sequences of more tokens than a model of ``config`` has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"{who}: {name} must be at most the {positions} positions of the model, got {length}"
        )


def load_elastic(directory: str | Path, dtype: Dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """The elastic model of a checkpoint, alone, and the contents of its ``flextron.json``."""
    with ElasticDirectory.open(directory) as checkpoint:
        return checkpoint.model(dtype), checkpoint.meta
