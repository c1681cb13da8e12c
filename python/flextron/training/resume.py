"""What a killed run needs to go on bit for bit; the run itself is in ``loop.py``.

A run's folder holds ``run.json`` (what the run is), ``metrics.jsonl`` (what it measured) and, for each kept
step, the folder ``step-N`` (weights, optimiser, generators: ``storing.py``) and ``step-N.json`` (data position, sha256
of its files). The JSON file is written last: a step counts when it is there. Where the teacher was the checkpoint
itself, ``teacher*.safetensors`` keep it; ``teacher-logits`` has its cached logits (`teacher.py`). All but the first two
only resuming needs, and `clean` removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextron import ranks
from flextron.checkpoint import CheckpointError, load_tensors, read_json, write_json
from flextron.checkpoint.io import sync
from flextron.checkpoint.schema import build
from flextron.nn.protocol import Elastic
from flextron.nn.storage import DTYPES
from flextron.recipes import TrainConfig
from flextron.training import teacher, tensorboard
from flextron.training.metrics import METRICS_FILE
from flextron.training.sharding import sampled
from flextron.training.storing import Writer, check_files, names_in, read

RUN_FILE = "run.json"
TEACHER_FILES = "teacher*.safetensors"  # as many as the model's weights have
HELD = "held"  # key of run.json's teacher: the dtype that it is in where that is narrower than what it computes in
CLEANED = "cleaned"  # key of run.json: the last step, whose checkpoint `clean` removed
_ROUNDINGS = (torch.bfloat16, torch.float16)  # dtypes that a user may ask a model to be stored in
# The JSON file goes first: without it the step does not count, so no half of one is ever read.
_PATTERNS = ("step-*.json", "step-*", ".step-*.tmp")
_AFRESH = "resume=False (on the command line --restart) starts it afresh"
_OTHERS = {
    "tokens": "other tokens (--data)",
    "teacher": "another teacher",
    "elastic": "another model",
    "trained": "other parameters to train",
}
KEPT = 2  # checkpoints: the newest, and one in case that is damaged


@dataclass(frozen=True)
class Saved:
    """One intact checkpoint."""

    step: int
    place: Path
    position: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        directory: the folder; made when missing.
        identity: JSON that must be the same when the run is resumed.
        weights: fingerprint of the model as it was given; when the run is resumed, that of its first step or of
            a checkpoint, for otherwise the run would replace some other model's weights unasked.
        stored: the dtypes in which a model is stored by default, by name: a trained one comes back rounded to them.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], weights: str, stored: Mapping[str, torch.dtype]
    ) -> None:
        self.directory = directory
        self.weights = weights
        self.stored = stored
        self.identity = json.loads(json.dumps(identity))  # as it will be read back: lists, not tuples
        self._writer = Writer()

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._writer.close()

    def begin(self) -> None:
        """Start afresh: remove every checkpoint and metric in the folder, and record what the run is."""
        if not ranks.is_first():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keep([])
        for path in (self.directory / METRICS_FILE, *self.directory.glob(TEACHER_FILES)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.directory / tensorboard.FOLDER, ignore_errors=True)
        write_json(self.directory / RUN_FILE, {**self.identity, "weights": self.weights})

    def extend(self, step: int) -> None:
        """Record that the run was given more steps, from ``step`` on; otherwise do nothing."""
        if not ranks.is_first():
            return
        self._keep(_steps_in(self.directory))
        found = read_json(self.directory / RUN_FILE)
        had = found["config"]["steps"]
        if had != self.identity["config"]["steps"]:
            # its weights too: they stay the model's until the run ends, longer than that step's checkpoint does
            extended = [*found.get("extended", []), {"step": step, "steps": had, "weights": self.weights}]
            write_json(self.directory / RUN_FILE, {**found, **self.identity, "extended": extended})

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
        position: Mapping[str, Any],
    ) -> None:
        """Write one checkpoint while training goes on, then drop those older than the last two.

        ``model`` is the model's ``state_dict``, by which it is known later.
        """
        # as it is, and as it may be stored
        roundings = ({}, self.stored, *(dict.fromkeys(model, dtype) for dtype in _ROUNDINGS))
        weights = list(dict.fromkeys(fingerprints(model, roundings)))
        temporary = self.directory / f".step-{step:08d}.tmp"

        def count(checksums: dict[str, str]) -> None:
            place = self._path(step)
            place.with_suffix(".json").unlink(missing_ok=True)  # of one that was damaged
            shutil.rmtree(place, ignore_errors=True)
            os.replace(temporary, place)
            sync(self.directory)
            meta = {"step": step, "sha256": checksums, "weights": weights, "position": dict(position)}
            write_json(place.with_suffix(".json"), meta)
            self._keep(_steps_in(self.directory)[-KEPT:])

        self._writer.write(temporary, tensors, count)

    def latest(self) -> Saved | None:
        """The newest intact checkpoint, or None where none was written.

        Raises:
            ValueError: the folder holds another run.
            CheckpointError: there are checkpoints, and all are damaged.
        """
        steps = _steps_in(self.directory)
        if not steps:
            self._refuse_cleaned()
            return None
        self._check_identity(steps)
        for step in reversed(steps):
            try:
                return self._read(step)
            except CheckpointError as error:
                damage = str(error)
                warnings.warn(f"train: passing over the checkpoint of step {step}: {damage}", stacklevel=2)
        raise CheckpointError(
            f"train: {self.directory} must hold an intact checkpoint to resume from, got {damage}; {_AFRESH}"
        )

    def _read(self, step: int) -> Saved:
        place = self._path(step)
        meta = read_json(place.with_suffix(".json"))
        checksums = meta.get("sha256")
        if meta.get("step") != step or not isinstance(meta.get("position"), dict):
            raise CheckpointError(f"{place}.json: must describe step {step}, got something else")
        if isinstance(checksums, str):  # of an earlier version: one file
            place = place.with_suffix(".safetensors")
            load_tensors(place, checksum=checksums)
        else:
            check_files(place, build(dict[str, str], checksums, f"{place}.json", "sha256"))
        return Saved(step, place, meta["position"])

    def _check_identity(self, steps: list[int]) -> None:
        found = _read_run(self.directory)
        began = [found, *(e for e in found.get("extended", ()) if isinstance(e, dict))]
        known = {w for start in began if isinstance(w := start.get("weights"), str)}
        found = {name: value for name, value in found.items() if name not in ("weights", "extended")}
        if isinstance(found.get("config"), dict):
            found["config"] = self._defaults(found["config"]) | found["config"]
            found["config"].pop("only", None)  # what `networks` of one were in earlier versions
        differing = _differing(self.identity, found)
        if differing and not (differing == ["config.steps"] and self._is_longer(found["config"]["steps"])):
            raise ValueError(
                f"train: the run in {self.directory} must be resumed as it was started, got "
                f"{', '.join(self._changes(differing, found))}; {_AFRESH}"
            )
        for step in steps:
            with suppress(CheckpointError):  # damaged: told when it is read
                weights = read_json(self._path(step).with_suffix(".json")).get("weights")
                known |= {w for w in weights if isinstance(w, str)} if isinstance(weights, list) else set()
        if self.weights not in known:
            raise ValueError(
                f"train: the run in {self.directory} must be resumed with the weights it started from or saved, "
                f"got another model's; {_AFRESH}"
            )

    def _changes(self, differing: list[str], found: Mapping[str, Any]) -> list[str]:
        """What is different now, in the words of the command line."""
        said = []
        for name in differing:
            part, _, option = name.partition(".")
            if part == "config" and option:
                now, before = (facts["config"].get(option) for facts in (self.identity, found))
                said.append(f"--{option.replace('_', '-')} {now} instead of {before}")
            else:
                said.append(_OTHERS.get(part, f"another {part}"))
        return list(dict.fromkeys(said))

    def _defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that the version which began the run did not have: there they had what is the default now."""
        later = self.identity["config"].keys() - config.keys()
        return json.loads(json.dumps({f.name: f.default for f in fields(TrainConfig) if f.name in later}))

    def _is_longer(self, steps: Any) -> bool:
        return isinstance(steps, int) and self.identity["config"]["steps"] > steps

    def _refuse_cleaned(self) -> None:
        path = self.directory / RUN_FILE
        if path.is_file() and CLEANED in read_json(path):
            raise ValueError(
                f"train: the run in {self.directory} must have its last checkpoint to go on from, got one that was "
                "cleaned away; resume=False (on the command line --restart) starts another from the weights as they are"
            )

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _keep(self, steps: list[int]) -> None:
        """Remove every file of another step, and what a killed writer left."""
        kept = {
            f"{self._path(step).name}{suffix}" for step in steps for suffix in ("", ".json", ".safetensors")
        }
        for pattern in _PATTERNS:
            for path in self.directory.glob(pattern):
                if path.name not in kept:
                    _remove(path)


def has_checkpoints(directory: Path) -> bool:
    """Whether a run's folder holds something to resume from."""
    return bool(_steps_in(directory))


def teacher_dtype(directory: Path) -> torch.dtype:
    """The dtype that the teacher of the run in a folder is held in, which decides its last bits."""
    said = _read_run(directory).get("teacher")
    name = said.get(HELD, "float32") if isinstance(said, dict) else "float32"
    if name not in DTYPES[1:]:
        raise CheckpointError(
            f"{directory / RUN_FILE}: teacher.{HELD} must be one of {', '.join(DTYPES[1:])}, got {name!r}; {_AFRESH}"
        )
    return getattr(torch, name)


def _read_run(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / RUN_FILE)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_AFRESH}") from None


def clean(directory: Path, *, unfinished: bool = False, dry_run: bool = False) -> list[Path]:
    """Remove what only resuming needs from a run's folder; what the run was and measured stays.

    Args:
        directory: the folder; nothing is done where there is none.
        unfinished: also of a run that has not taken all its steps, which can then never take them.
        dry_run: remove nothing.

    Returns:
        The files that go.

    Raises:
        ValueError: the run is not finished, and ``unfinished`` is False.
    """
    logits = (f"{teacher.FOLDER}/{name}" for name in ("*.json", "*.safetensors", ".*.tmp"))
    patterns = (*_PATTERNS, TEACHER_FILES, ".*.tmp", *logits)
    found = list(dict.fromkeys(path for pattern in patterns for path in sorted(directory.glob(pattern))))
    if not found:
        return []
    path = directory / RUN_FILE
    run = read_json(path)
    config = run.get("config")
    steps = config.get("steps") if isinstance(config, dict) else None
    done = max(_steps_in(directory), default=0)
    if done != steps and not unfinished:
        raise ValueError(
            f"clean: the run in {directory} must be finished, got step {done} of {steps}; unfinished=True (on the "
            "command line --unfinished) removes it all the same"
        )
    files = [f for p in found for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
    if not dry_run:
        write_json(path, {**run, CLEANED: done})
        for each in found:
            _remove(each)
        with suppress(FileNotFoundError):
            (directory / teacher.FOLDER).rmdir()
    return files


def _steps_in(directory: Path) -> list[int]:
    """The steps that a run's folder has checkpoints of."""
    names = (path.stem.removeprefix("step-") for path in directory.glob("step-*.json"))
    return sorted(int(name) for name in names if name.isdecimal())


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A cheap hash of the name, shape and some values of each tensor, which tells models apart."""
    return fingerprints(tensors, [{}])[0]


def fingerprints(tensors: Mapping[str, Tensor], roundings: Iterable[Mapping[str, torch.dtype]]) -> list[str]:
    """For each of ``roundings``, the `fingerprint` of the tensors after they were stored in these dtypes and read back.

    All processes call this, for each has its part of sharded tensors.
    """
    digests = [(hashlib.sha256(), dtypes) for dtypes in roundings]
    for name, value in tensors.items():
        sample = sampled(value, max(1, value.numel() // 1024)).contiguous()
        for digest, dtypes in digests:
            rounded = sample.to(dtypes.get(name, value.dtype)).to(value.dtype)
            digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
            digest.update(rounded.view(torch.uint8).numpy().data)
    return [digest.hexdigest() for digest, _ in digests]


def training_tensors(model: Elastic, optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The weights, tied ones once, and the optimiser's state, flat. ``names`` are its parameters, in order."""
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if name not in tied}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{names[index]}.{key}": value for key, value in state.items()}
    return tensors


def load_training_tensors(
    place: Path,
    model: Elastic,
    optimizer: torch.optim.Optimizer,
    names: list[str],
    more: Mapping[str, Tensor],
) -> None:
    """Read what :func:`training_tensors` returned, and ``more`` tensors, into those that are here."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stored, state = names_in(place), {}
    for i, (name, p) in enumerate(zip(names, parameters, strict=True)):
        if f"optimizer.{name}.step" in stored:
            state[i] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    moments = {f"optimizer.{names[i]}.{key}": t for i, found in state.items() for key, t in found.items()}
    weights = {n: t for n, t in training_tensors(model, optimizer, names).items() if n.startswith("model.")}
    read(place, {**weights, **moments, **more})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _differing(ours: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the entries that differ, those of inner objects with a dot."""
    names = []
    for key in sorted({*ours, *found}):
        a, b = ours.get(key), found.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(prefix + key)
    return names
