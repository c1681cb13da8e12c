"""`tokenize`: from documents to a folder of tokens, on all cores, going on where a killed run stopped."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flextron.checkpoint import CheckpointError, locked, read_json, write_json
from flextron.checkpoint.hf import read_tokenizer
from flextron.checkpoint.hub import local
from flextron.checkpoint.io import checksum_of
from flextron.checkpoint.lock import LOCK_FILE
from flextron.checkpoint.schema import build
from flextron.documents.reading import read_part
from flextron.documents.splitting import border_between, check_share, split_documents
from flextron.sentences import listed
from flextron.tokens.folder import (
    FORMAT,
    PLAN,
    PROGRESS,
    TOKENS_FILE,
    Description,
    Shard,
    TokenFolder,
    identity_of,
    mended,
)
from flextron.tokens.plan import Plan, Source, plan_of
from flextron.tokens.pool import Task, run
from flextron.tokens.work import LONGEST, SIDES, Settings, ends_of, whole

SHARD_TOKENS = 1 << 26  # tokens in a file: 128 MiB as uint16

Progress = Callable[[str, int, int, str], Any]


@dataclass(frozen=True)
class TokenizeReport:
    """What `tokenize` did.

    Attributes:
        tokens: in the folder, on both sides.
        held_out: tokens of the side that judges.
        documents, characters: how many were tokenised.
        files: how many hold the tokens.
        resumed: tokens that an earlier run had tokenised.
        seconds: duration of this call.
    """

    tokens: int
    held_out: int
    documents: int
    characters: int
    files: int
    resumed: int
    seconds: float


@dataclass(frozen=True)
class _Record:
    """A finished file, or one for each side, of a unit; see `flextron.tokens.work`."""

    unit: int
    part: int
    documents: int
    characters: int
    ranks: tuple[float, ...]
    read: int
    last: bool
    train: Shard | None
    held_out: Shard | None

    @property
    def shards(self) -> list[Shard]:
        return [shard for shard in (self.train, self.held_out) if shard is not None]


def tokenize(
    sources: Source | Sequence[Source],
    out: str | Path,
    model: str | Path,
    *,
    held_out: float = 0.05,
    workers: int | None = None,
    restart: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress = lambda *_: None,
) -> TokenizeReport:
    """Tokenise text once, into a folder that every stage takes as its data.

    The files are the same bytes whatever the number of processes. A killed run goes on when it is called again; a
    finished one is verified, file by file.

    Documents are those of `read_documents`; one of more than 1048576 characters counts as several, cut at the ends of
    paragraphs. Which are held out, their hash decides, as in `split_documents`.

    Args:
        sources: files, folders, ``hf:owner/name[split]``, or `Text` with the name of a field; several are one stream.
        out: the folder: new, empty, or begun by the same call.
        model: directory or hub id with the tokenizer.
        held_out: share of the documents that judge and are not trained on.
        workers: processes; by default one for each core.
        restart: remove the tokens that are in ``out`` first.
        shard_tokens: tokens after which another file begins.
        progress: called with what is done, units of the sources done, units in all, and the speed in words.

    Raises:
        ValueError, FileNotFoundError: a source cannot be read, or ``out`` holds something else.
    """
    began = time.perf_counter()
    check_share("tokenize", held_out)
    for name, value in (("workers", workers), ("shard_tokens", shard_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"tokenize: {name} must be at least 1, got {value}")
    sources = [sources] if not isinstance(sources, Sequence) or isinstance(sources, str) else list(sources)
    tokenizer = read_tokenizer(local(model, tokenizer_only=True))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = identity_of(tokenizer)
    plan = plan_of(sources)
    settings = Settings(
        folder=str(Path(out).absolute()),
        model=str(model),
        backend=None if backend is None else backend.to_str(),
        before=identity.before,
        after=identity.after,
        dtype="uint16" if identity.vocabulary <= 1 << 16 else "uint32",
        border=held_out,
        shard_tokens=shard_tokens,
    )
    facts = {
        "format": FORMAT,
        "tokenizer": asdict(identity),
        "sources": plan.sources,
        "share": held_out,
        "shard_tokens": shard_tokens,
    }
    with locked(out, "tokenize"):
        writing = _Writing(Path(out), plan, facts, settings, workers or os.cpu_count() or 1, progress)
        d = writing.to_the_end(restart)
    sides = [sum(shard.tokens for shard in side) for side in (d.train, d.held_out)]
    return TokenizeReport(
        tokens=sum(sides),
        held_out=sides[1],
        documents=d.documents,
        characters=d.characters,
        files=len(d.train) + len(d.held_out),
        resumed=writing.resumed,
        seconds=time.perf_counter() - began,
    )


class _Writing:
    """The moving parts of one call of `tokenize`."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        facts: dict[str, Any],
        settings: Settings,
        workers: int,
        progress: Progress,
    ) -> None:
        self.out, self.units, self.settings, self.workers = out, plan.units, settings, workers
        self.facts, self.progress = json.loads(json.dumps(facts)), progress
        self.records: dict[int, list[_Record]] = {}
        self.resumed = 0

    def to_the_end(self, restart: bool) -> Description:
        if restart:
            self._clear()
        if (self.out / TOKENS_FILE).is_file():
            return self._finished()
        self._take_up()
        try:
            self._work()
            if not all(self._shards(side) for side in SIDES):
                self._begin(**self._other_sides())
                self._work()
        except (ValueError, OSError):
            if not self._shards("train"):  # nothing that a later call could go on from
                self._clear()
            raise
        if not all(self._shards(side) for side in SIDES):
            self._clear()
            raise ValueError("tokenize: sources must hold text to train on and to hold out, got too little")
        records = self._in_order()
        description = {
            **self.facts,
            "dtype": self.settings.dtype,
            "border": self.settings.border,
            "documents": sum(r.documents for r in records),
            "characters": sum(r.characters for r in records),
            **{side: [asdict(shard) for shard in self._shards(side)] for side in SIDES},
        }
        with whole(self.out / TOKENS_FILE):
            write_json(self.out / TOKENS_FILE, description)
        shutil.rmtree(self.out / PROGRESS)
        return TokenFolder(self.out).description

    def _finished(self) -> Description:
        """What is there already, if it is what would be written; every file is read."""
        folder = TokenFolder(self.out)
        found = folder.description
        self._require_same({name: value for name, value in asdict(found).items() if name in self.facts})
        folder.verify()
        shutil.rmtree(self.out / PROGRESS, ignore_errors=True)
        self.resumed = sum(shard.tokens for shard in (*found.train, *found.held_out))
        return found

    def _take_up(self) -> None:
        """Begin in a new or empty folder, or go on with what an earlier call has recorded."""
        path = self.out / PROGRESS / PLAN
        if not path.is_file():
            if names := sorted(p.name for p in self.out.iterdir() if p.name not in (LOCK_FILE, PROGRESS)):
                raise CheckpointError(f"tokenize: {self.out} must be new or empty, got {listed(names)}")
            self._begin(self.settings.border)
            return
        with mended():
            found = read_json(path)
            border, cut = found.pop("border", None), found.pop("cut", False)
            own = build(float, border, path, "border"), build(bool, cut, path, "cut")
        self._require_same(found)
        self._set(*own)
        for left in self.out.glob(".*.tmp"):  # by a killed process
            left.unlink()
        for file in sorted((self.out / PROGRESS).glob("*-*.json")):
            with mended():
                record = build(_Record, read_json(file), file)
            known = self.records.setdefault(record.unit, [])
            if record.part == len(known) and all(map(self._is_whole, record.shards)):
                known.append(record)
                self.resumed += sum(shard.tokens for shard in record.shards)

    def _begin(self, border: float, cut: bool = False) -> None:
        self._clear()
        with whole(self.out / PROGRESS):
            (self.out / PROGRESS).mkdir()
            write_json(self.out / PROGRESS / PLAN, {**self.facts, "border": border, "cut": cut})
        self._set(border, cut)

    def _set(self, border: float, cut: bool) -> None:
        self.records, self.resumed = {}, 0
        self.settings = replace(self.settings, border=border, sides=None)
        if cut:
            train, held_out = split_documents([self._first()], self.facts["share"])
            self.settings = replace(self.settings, sides=(tuple(train), tuple(held_out)))
        self.units = [[]] if cut else self.units

    def _work(self) -> None:
        began, done, tokens = time.perf_counter(), 0, 0
        tasks = []
        for number, unit in enumerate(self.units):
            known = self.records.get(number, [])
            if known and known[-1].last:
                done += 1
            else:
                tasks.append(Task(number, unit, known[-1].read if known else 0, len(known)))
        for message in run(self.settings, tasks, min(self.workers, max(1, len(tasks)))):
            if "record" in message:
                record = build(_Record, message["record"], self.out)
                path = self.out / PROGRESS / f"{record.unit:05d}-{record.part:04d}.json"
                with whole(path):
                    write_json(path, message["record"])
                self.records.setdefault(record.unit, []).append(record)
                done += record.last
            tokens += message.get("tokens", 0)
            speed = tokens / (time.perf_counter() - began)
            note = f"{(tokens + self.resumed) / 1e6:.1f} M tokens, {speed / 1e6:.2f} M/s"
            self.progress("tokenising", done, len(self.units), note)

    def _other_sides(self) -> dict[str, Any]:
        """How to divide the documents where the share that is held out left nothing on one side."""
        ranks = ends_of(rank for record in self._in_order() for rank in record.ranks)
        if not ranks:
            raise ValueError(
                f"tokenize: sources must hold text, got none in {listed(s['path'] for s in self.facts['sources'])}"
            )
        if len(ranks) == 1:
            return {"border": self.settings.border, "cut": True}
        return {"border": border_between(self.facts["share"], ranks)}

    def _first(self) -> str:
        return next(d for unit in self.units for part in unit for d in read_part(part, LONGEST))

    def _in_order(self) -> list[_Record]:
        return [record for _, records in sorted(self.records.items()) for record in records]

    def _shards(self, side: str) -> list[Shard]:
        return [shard for record in self._in_order() if (shard := getattr(record, side)) is not None]

    def _is_whole(self, shard: Shard) -> bool:
        path = self.out / shard.file
        return path.is_file() and checksum_of(path) == shard.sha256

    def _require_same(self, found: dict[str, Any]) -> None:
        found = json.loads(json.dumps(found))
        if differing := [name for name in self.facts if found.get(name) != self.facts[name]]:
            raise CheckpointError(
                f"tokenize: {self.out} must be new or empty, or hold what the same call has written, got other values "
                f"of {listed(differing)}; --restart (restart=True) replaces its tokens"
            )

    def _clear(self) -> None:
        """Remove what `tokenize` writes, and nothing else; the description first, which makes it a whole."""
        (self.out / TOKENS_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.out / PROGRESS, ignore_errors=True)
        for pattern in (*(f"{side}-*.bin" for side in SIDES), ".*.tmp"):
            for path in self.out.glob(pattern):
                path.unlink()
