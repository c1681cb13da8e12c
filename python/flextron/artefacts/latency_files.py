"""The latency tables of a checkpoint: one file for each machine, ``latency/<machine>.json``, and which table is meant.

A file holds a table for each workload that was measured there. Older checkpoints have one file, ``latency.json``, with
a table for each phase; it is read, and goes when a table is next stored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flextron.artefacts.latency_table import LatencyTable
from flextron.artefacts.machine import DEVICE, IDENTITY, USE, Machine, is_same, name_of
from flextron.checkpoint.files import Files, opened
from flextron.checkpoint.format import FORMAT, LATENCY_FOLDER, CheckpointError, check_format
from flextron.checkpoint.io import write_json
from flextron.checkpoint.schema import build
from flextron.config import ElasticConfig
from flextron.sentences import listed

OLD_FILE = "latency.json"
_FAR = 2  # how many times beyond what was profiled a number of sequences or tokens may be

Tables = tuple[LatencyTable, ...]


def load_tables(directory: str | Path | Files, config: ElasticConfig) -> Tables:
    """The tables of an elastic checkpoint, of all machines; empty when it was never profiled.

    A table that does not say which model it is of is left out with a warning.

    Raises:
        CheckpointError: a file is damaged, or a table is of a model that is not ``config``.
    """
    with opened(directory) as files:
        names = sorted(name for name in files.names() if name.startswith(f"{LATENCY_FOLDER}/"))
        older = [OLD_FILE] if OLD_FILE in files else []
        return _ordered(table for name in older + names for table in _read(files, name, config))


def kept_tables(directory: str | Path | Files, config: ElasticConfig, machine: Machine) -> Tables:
    """What is stored again beside new tables of ``machine``: its own, and those of the file that older versions wrote.

    What is damaged, or of another model, is left out.
    """
    found: list[LatencyTable] = []
    with opened(directory) as files:
        for name in (OLD_FILE, _file_of(name_of(machine))):
            if name in files:
                try:
                    found += _read(files, name, config)
                except CheckpointError:
                    continue
    return _ordered(_completed(table, machine) for table in found)


def save_tables(tables: Iterable[LatencyTable], directory: str | Path) -> None:
    """Write the file of each machine that ``tables`` are of; files of other machines stay untouched."""
    folder = Path(directory) / LATENCY_FOLDER
    by_machine: dict[str, list[LatencyTable]] = {}
    for table in _ordered(tables):
        by_machine.setdefault(table.machine_name, []).append(table)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: must be a directory, got a file")
    folder.mkdir(exist_ok=True)
    for name, own in by_machine.items():
        content = {"format": FORMAT, "tables": [table.to_dict() for table in own]}
        write_json(Path(directory) / _file_of(name), content)
    (Path(directory) / OLD_FILE).unlink(missing_ok=True)  # after what it held is written


def of_machine(tables: Iterable[LatencyTable], machine: Machine | str) -> Tables:
    """The tables of one machine, by its facts or its name.

    Where its device was profiled in one other use only, of threads and dtype, those tables are meant.
    """
    if isinstance(machine, str):
        return tuple(table for table in tables if table.machine_name == machine)
    own = [table for table in tables if is_same(table.machine, machine, DEVICE)]
    exact = [table for table in own if is_same(table.machine, machine)]
    if not exact:
        uses = {tuple(table.machine.get(fact) for fact in USE) for table in own}
        return _ordered(own) if len(uses) == 1 else ()
    exact.sort(
        key=lambda table: table.machine_name == name_of(machine)
    )  # before an older record of fewer facts
    return _ordered(_completed(table, machine) for table in exact)


def machines(tables: Iterable[LatencyTable]) -> list[str]:
    """The names of the machines that tables are of."""
    return sorted({table.machine_name for table in tables})


def by_phase(tables: Iterable[LatencyTable]) -> dict[str, LatencyTable]:
    """Of one machine, the table of each phase that is meant where nothing else is said: the smallest workload's."""
    largest_first = sorted(tables, key=lambda table: table.workload.order, reverse=True)
    return {table.workload.phase: table for table in largest_first}


def nearest(tables: Iterable[LatencyTable], batch: int | None, depth: int | None) -> LatencyTable:
    """The table of the nearest profiled batch, and of those the one of the nearest depth (see `Workload.depth`).

    Near is a matter of ratio. None: the smallest.

    Raises:
        ValueError: ``batch`` or ``depth`` is more than twice as large, or small, as whatever was profiled.
    """
    left = list(tables)
    wishes = (
        ("batch", batch, lambda table: table.workload.batch),
        ("context", depth, lambda table: table.workload.depth),
    )
    for what, wanted, of in wishes:
        profiled = sorted({of(table) for table in left})
        if wanted is None:
            wanted = profiled[0]
        if not profiled[0] / _FAR <= wanted <= profiled[-1] * _FAR:
            raise ValueError(
                f"budget: {what} must be near {listed(map(str, profiled))}, as in the {left[0].workload.phase} latency "
                f"tables, got {wanted}; profile the model with the {what} you want"
            )
        best = min(profiled, key=lambda n: abs(math.log(n / max(wanted, 1))))
        left = [table for table in left if of(table) == best]
    return left[0]


def _file_of(name: str) -> str:
    return f"{LATENCY_FOLDER}/{name}.json"


def _read(files: Files, name: str, config: ElasticConfig) -> list[LatencyTable]:
    """The tables of one file, all of them or an error."""
    path, content = files / name, files.read_json(name)
    check_format(content, path)
    read = _old if name == OLD_FILE else _new
    tables = list(read(content, path))
    for table in tables:
        if differing := table.elastic.differs(config):
            raise CheckpointError(
                f"{path}: must be made for the model here, got one of {listed(differing)}; run `flextron profile "
                f"{files.directory}` on that machine, or remove the file"
            )
    return tables


def _new(content: dict[str, Any], path: Path) -> Iterator[LatencyTable]:
    for place, values in enumerate(build(tuple[dict[str, Any], ...], content.get("tables"), path, "tables")):
        table = LatencyTable.from_dict(values, path, f"tables[{place}]")
        if table.machine_name != path.stem:
            raise CheckpointError(
                f"{path}: tables[{place}] must be of the machine {path.stem}, got {table.machine_name}"
            )
        yield table


def _old(content: dict[str, Any], path: Path) -> Iterator[LatencyTable]:
    for phase, values in build(dict[str, dict[str, Any]], content.get("tables"), path, "tables").items():
        if "elastic" not in values:
            warnings.warn(
                f"{path}: a table does not say which model it is of, and is left out; "
                f"run `flextron profile {path.parent}`",
                stacklevel=2,
            )
            continue
        table = LatencyTable.from_dict(values, path, f"tables.{phase}")
        if table.workload.phase != phase:
            raise CheckpointError(f"{path}: tables.{phase} must be of {phase}, got {table.workload.phase}")
        yield table


def _completed(table: LatencyTable, here: Machine) -> LatencyTable:
    """``table`` with all facts of the machine ``here``, where it is of it: an older record has fewer."""
    if not is_same(table.machine, here):
        return table
    rest = {fact: value for fact, value in table.machine.items() if fact not in IDENTITY}
    return replace(table, machine={fact: here[fact] for fact in IDENTITY if fact in here} | rest)


def _ordered(tables: Iterable[LatencyTable]) -> Tables:
    """By machine and workload; of several of the same, the last."""
    found = {(table.machine_name, table.workload.order): table for table in tables}
    return tuple(table for _, table in sorted(found.items(), key=lambda entry: entry[0]))
